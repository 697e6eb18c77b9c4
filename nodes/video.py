"""Nodes for video: whole UNets as models, and sampling in windows."""

from __future__ import annotations

from typing import Any

from ..controlnext_core.comfy_adapter.feedback import report
from ..controlnext_core.comfy_adapter.files import whole_unets
from ..controlnext_core.comfy_adapter.files.folders import file_stamp
from ..controlnext_core.comfy_adapter.sampling import windows
from ._api import ControlNode, io, wrong_choice


class ControlNeXtUNetLoader(ControlNode):
    """Node that loads the whole UNets of some ControlNeXt releases."""

    SEARCH = ("controlnet", "svd", "video", "diffusion model")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNeXtUNetLoader",
            display_name="Load ControlNeXt UNet",
            category="ControlNeXt",
            description="Loads a whole UNet, with the names that the authors or the host use, as a model. For SVD v2, "
            "whose release is a full UNet. Weights that go onto a loaded model belong into Load ControlNeXt.",
            inputs=[
                io.Combo.Input(
                    "weights_name",
                    options=whole_unets.unet_names(),
                    tooltip="A whole UNet from models/controlnext or models/diffusion_models.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(whole_unets.WEIGHT_DTYPES),
                    default="default",
                    tooltip="Number format in memory, as in the stock Load Diffusion Model node.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The UNet; CLIP vision and VAE come from the base checkpoint.")],
        )

    @classmethod
    def validate_inputs(cls, weight_dtype: str | None = None) -> bool | str:
        return wrong_choice(weight_dtype=(weight_dtype, whole_unets.WEIGHT_DTYPES)) or True

    @classmethod
    def fingerprint_inputs(cls, weights_name: str, weight_dtype: str = "default") -> str:
        try:
            return f"{file_stamp(whole_unets.unet_path(weights_name))}:{weight_dtype}"
        except ValueError as error:  # the node itself raises it, where the user sees it
            return str(error)

    @classmethod
    def execute(cls, weights_name: str, weight_dtype: str = "default") -> io.NodeOutput:
        path = whole_unets.unet_path(weights_name)
        model = whole_unets.load_unet(path, weight_dtype)
        return io.NodeOutput(model, ui=report(whole_unets.describe_loaded(model, path)))


class ControlNeXtVideoWindows(ControlNode):
    """Node that samples any number of frames in windows."""

    SEARCH = ("svd", "video", "context", "long video")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNeXtVideoWindows",
            display_name="ControlNeXt Video Windows",
            category="ControlNeXt",
            description="Samples videos of any length in overlapping windows; every frame gets its own hint.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the sampler gets, before or after Apply ControlNeXt."),
                io.Int.Input(
                    "length", default=14, min=1, max=4096, tooltip="Frames in a window; what the model was trained on."
                ),
                io.Int.Input("overlap", default=4, min=0, max=4095, tooltip="Frames shared by neighbouring windows."),
                io.Combo.Input(
                    "schedule",
                    options=list(windows.SCHEDULES),
                    default=windows.SCHEDULES[0],
                    tooltip="standard_static: the same windows at each step, the last one aligned to the end. uniform: "
                    "shifted from step to step. looped: wrap around the end. batched: side by side, no overlap.",
                ),
                io.Combo.Input(
                    "fuse",
                    options=list(windows.FUSES),
                    default="pyramid",
                    tooltip="How overlapping results are weighted.",
                ),
                io.Boolean.Input(
                    "repeat_first_hint",
                    default=False,
                    optional=True,
                    tooltip="Give the first frame of each window the first hint, the reference pose, and drop its "
                    "result, as the authors' long-video pipeline does. Needs an overlap, so not batched.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, sampling in windows.")],
        )

    @classmethod
    def validate_inputs(
        cls,
        length: int | None = None,
        overlap: int | None = None,
        schedule: str | None = None,
        fuse: str | None = None,
        repeat_first_hint: bool | None = False,
    ) -> bool | str:
        wrong = wrong_choice(schedule=(schedule, windows.SCHEDULES), fuse=(fuse, windows.FUSES))
        if wrong or length is None or overlap is None or schedule is None or repeat_first_hint is None:
            return wrong or True  # what is connected is checked when it is known, in `execute`
        return windows.problem_of(length, overlap, schedule, repeat_first_hint) or True

    @classmethod
    def execute(
        cls, model: Any, length: int, overlap: int, schedule: str, fuse: str, repeat_first_hint: bool = False
    ) -> io.NodeOutput:
        return io.NodeOutput(windows.add_video_windows(model, length, overlap, schedule, fuse, repeat_first_hint))
