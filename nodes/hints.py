"""Hints from keypoints."""

from __future__ import annotations

from typing import Any

import torch

from ..controlnext_core.hints.pose import MIN_SIDE, SIDE_STEP, align_poses
from ..controlnext_core.hints.pose_drawing import draw_poses
from ._api import ControlNode, io

PoseKeypoint = io.Custom("POSE_KEYPOINT")


class ControlNeXtPoseAlign(ControlNode):
    """Pose frames for ControlNeXt on SVD: a clip's poses fitted to the person in the reference image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        side = {"min": MIN_SIDE, "max": 4096, "step": SIDE_STEP}
        return io.Schema(
            node_id="ControlNeXtPoseAlign",
            display_name="ControlNeXt Pose Align",
            category="ControlNeXt/hints",
            description="Moves and scales the poses of a clip onto the person in the reference image and draws them as "
            "the released SVD controls expect. The first frame is the reference pose.",
            inputs=[
                PoseKeypoint.Input(
                    "reference_pose",
                    tooltip="Keypoints of the reference image, from a DWPose or OpenPose estimator.",
                ),
                PoseKeypoint.Input(
                    "driving_poses",
                    tooltip="Keypoints of the clip that drives the motion, one entry per frame. A frame without a "
                    "person holds the pose of the frame before.",
                ),
                io.Int.Input("width", default=576, **side, tooltip="Width of the video in pixels, a multiple of 8."),
                io.Int.Input("height", default=1024, **side, tooltip="Height of the video in pixels, a multiple of 8."),
            ],
            outputs=[
                io.Image.Output(
                    tooltip="Pose frames: the reference pose first, then one per frame of the clip. The video gets as "
                    "many frames as there are here.",
                )
            ],
        )

    @classmethod
    def execute(cls, reference_pose: Any, driving_poses: Any, width: int, height: int) -> io.NodeOutput:
        poses = align_poses(reference_pose, driving_poses, (width, height))
        return io.NodeOutput(torch.from_numpy(draw_poses(poses, (width, height))))
