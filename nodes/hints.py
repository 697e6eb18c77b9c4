"""Nodes for hints from keypoints, and for sample inputs that come with the pack."""

from __future__ import annotations

from typing import Any

import torch

from ..controlnext_core.hints.pose import MIN_SIDE, SIDE_STEP, align_poses
from ..controlnext_core.hints.pose_drawing import draw_poses
from ..controlnext_core.hints.sample_inputs import KINDS, PERIOD, SCENE_NAMES, sample
from ._api import ControlNode, io, ui, wrong_choice

PoseKeypoint = io.Custom("POSE_KEYPOINT")


class ControlNeXtPoseAlign(ControlNode):
    """Node that fits the poses of a clip to the person in the reference image, for ControlNeXt on SVD."""

    SEARCH = ("pose", "openpose", "dwpose", "svd", "video", "preprocessor")

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


class ControlNeXtSampleInputs(ControlNode):
    """Node with hints, a photograph and clips to try a graph with."""

    SEARCH = ("example", "demo", "canny", "edges", "depth", "pose", "controlnet")

    @classmethod
    def define_schema(cls) -> io.Schema:
        side = {"default": 512, "min": MIN_SIDE, "max": 4096, "step": SIDE_STEP}
        return io.Schema(
            node_id="ControlNeXtSampleInputs",
            display_name="ControlNeXt Sample Inputs",
            category="ControlNeXt/hints",
            description="Hints, a photograph and clips that come with the pack, so that a graph can be tried at once. "
            "For your own, put Load Image or a hint node in its place.",
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default="edges",
                    tooltip="edges, depth, mask: of the scene. pose: a standing person. photo: a portrait, also the "
                    "person of pose_clip. depth_clip, clip: the camera moves along the scene.",
                ),
                io.Int.Input("width", **side, tooltip="Width in pixels; the latent's, or in its proportions."),
                io.Int.Input("height", **side, tooltip="Height in pixels; the latent's, or in its proportions."),
                io.Combo.Input(
                    "scene",
                    options=list(SCENE_NAMES),
                    default=SCENE_NAMES[0],
                    optional=True,
                    tooltip="Drawing that edges, depth, mask, depth_clip and clip show.",
                ),
                io.Int.Input(
                    "frames",
                    default=PERIOD,
                    min=1,
                    max=512,
                    optional=True,
                    tooltip="Number of frames of a clip; the first pose is that of the photo.",
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="The hint, the photograph, or the frames of the clip."),
                io.Mask.Output(tooltip="White where things, the person or the drawn pose are."),
            ],
        )

    @classmethod
    def validate_inputs(cls, kind: str | None = None, scene: str | None = None) -> bool | str:
        return wrong_choice(kind=(kind, KINDS), scene=(scene, SCENE_NAMES)) or True

    @classmethod
    def execute(
        cls, kind: str, width: int, height: int, scene: str = SCENE_NAMES[0], frames: int = PERIOD
    ) -> io.NodeOutput:
        made = sample(kind, (width, height), scene, frames)
        images = torch.from_numpy(made.images)
        return io.NodeOutput(images, torch.from_numpy(made.masks), ui=ui.PreviewImage(images[:1], cls=cls))
