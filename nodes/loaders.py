"""Nodes that load, inspect and save ControlNeXt files."""

from __future__ import annotations

from typing import Any

from ..controlnext_core.checkpoint import CheckpointError
from ..controlnext_core.comfy_adapter.feedback import report
from ..controlnext_core.comfy_adapter.files import folders, inspecting, loading, saving
from ..controlnext_core.comfy_adapter.files.saving import save_xs
from ..controlnext_core.comfy_adapter.sampling.next_control import ControlNeXtControl
from ..controlnext_core.comfy_adapter.sampling.xs_control import ControlNetXSControl
from ..controlnext_core.comfy_adapter.short_paths import short_paths
from ..controlnext_core.control_files import DTYPES, LAYOUTS
from ..controlnext_core.metadata import WEIGHTS_KINDS
from ..controlnext_core.specs import SPECS
from ..controlnext_core.xs_convert import LAYOUTS as XS_LAYOUTS
from ._api import ControlNode, io, ui, wrong_choice


class ControlNeXtLoader(ControlNode):
    """Node that loads an encoder and its base weights from files."""

    SEARCH = (
        "controlnext",
        "controlnet",
        "canny",
        "edges",
        "depth",
        "pose",
        "lora",
        "sdxl",
        "sd3",
        "flux",
        "qwen",
        "z-image",
        "wan",
        "video",
    )

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = folders.control_names()
        return io.Schema(
            node_id="ControlNeXtLoader",
            display_name="Load ControlNeXt",
            category="ControlNeXt",
            description="Loads a ControlNeXt encoder and adds the weights that belong to it to the model, a UNet or "
            "a diffusion transformer (SD3, Flux.1, Chroma, Qwen-Image, Lumina2, Z-Image, Wan).",
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint's MODEL; LoRA loaders may come before or after."),
                io.Combo.Input(
                    "control_name",
                    options=names,
                    tooltip="The encoder, usually controlnet.safetensors, of models/controlnext, models/controlnet or "
                    "models/model_patches.",
                ),
                io.Combo.Input(
                    "weights_name",
                    options=[folders.AUTO, folders.NONE, *names],
                    default=folders.AUTO,
                    tooltip="Weights of the base model that come with the control. auto: bundled in the encoder's "
                    "file, or named by it, or the only unet*.safetensors beside it. none: the encoder alone.",
                ),
                io.Float.Input(
                    "weights_strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Scales the differences of the base model's weights; 1 as released, 0 leaves the model "
                    "unchanged.",
                ),
                io.Combo.Input(
                    "variant",
                    options=["auto", *SPECS],
                    default="auto",
                    optional=True,
                    tooltip="Variant of the file. auto: from the file, or from the model where it cannot tell. sd3, "
                    "flux, chroma, qwen_image, lumina2, z_image, wan and wan_5b are for diffusion transformers.",
                ),
                io.Combo.Input(
                    "weights_kind",
                    options=["auto", *WEIGHTS_KINDS],
                    default="auto",
                    optional=True,
                    tooltip="Kind of the weights: differences, full weights, or low_rank (differences as two factors). "
                    "auto: from the file, or measured on the model.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the control's weights added."),
                io.ControlNet.Output(tooltip="For Apply ControlNeXt, or the stock Apply ControlNet nodes."),
            ],
        )

    @classmethod
    def validate_inputs(cls, variant: str | None = None, weights_kind: str | None = None) -> bool | str:
        kinds = ["auto", *WEIGHTS_KINDS]
        return wrong_choice(variant=(variant, ["auto", *SPECS]), weights_kind=(weights_kind, kinds)) or True

    @classmethod
    def fingerprint_inputs(cls, control_name: str, weights_name: str = folders.AUTO, **_: Any) -> str:
        return folders.fingerprint(control_name, weights_name)

    @classmethod
    def execute(
        cls,
        model: Any,
        control_name: str,
        weights_name: str,
        weights_strength: float,
        variant: str = "auto",
        weights_kind: str = "auto",
    ) -> io.NodeOutput:
        path = folders.control_path(control_name)
        loaded = loading.load_controlnext(model, path, weights_name, weights_strength, variant, weights_kind)
        return io.NodeOutput(loaded.model, loaded.control, ui=report(loaded.report, loaded.cautions))


class ControlNeXtInspect(ControlNode):
    """Node that reports the kind and the content of a file."""

    SEARCH = ("controlnet", "metadata", "info")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNeXtInspect",
            display_name="Inspect ControlNeXt file",
            category="ControlNeXt",
            description="Says what a control file is: variant, base model, size, gain, weights of the base, metadata.",
            inputs=[
                io.Combo.Input(
                    "control_name",
                    options=folders.control_names(),
                    tooltip="A file of models/controlnext, models/controlnet or models/model_patches.",
                )
            ],
            outputs=[io.String.Output(tooltip="The description, also shown on the node.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, control_name: str) -> str:
        return folders.fingerprint(control_name, folders.AUTO)

    @classmethod
    def execute(cls, control_name: str) -> io.NodeOutput:
        try:
            text = inspecting.inspect_file(folders.control_path(control_name))
        except CheckpointError as error:  # a file of another kind, or a damaged one: the answer says which
            text = short_paths(str(error))
        return io.NodeOutput(text, ui={**ui.PreviewText(text).as_dict(), **report(text)})


class ControlNeXtSave(ControlNode):
    """Node that saves a control as one file, or as the two files of the authors' layout."""

    SEARCH = ("controlnet", "export", "merge")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNeXtSave",
            display_name="Save ControlNeXt",
            category="ControlNeXt",
            description="Saves a control, with the weights that Load ControlNeXt put on the model.",
            inputs=[
                io.ControlNet.Input("control_net", tooltip="From Load ControlNeXt or Load ControlNet-XS."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="From Load ControlNeXt: its control weights are saved too, never a LoRA's.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default=f"{folders.FOLDER}/ControlNeXt",
                    tooltip="Below the output folder; files in its sub-folder controlnext appear in the loaders.",
                ),
                io.Combo.Input(
                    "layout",
                    options=[*LAYOUTS, *XS_LAYOUTS],
                    default=LAYOUTS[0],
                    optional=True,
                    tooltip="single: one file. published: controlnet.safetensors and unet.safetensors in a folder, as "
                    "the authors' scripts read them. lora: the encoder and, beside it, the weights as a LoRA. "
                    "ControlNet-XS: xs_official has the released names, xs_diffusers is a folder for diffusers.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="fp16",
                    optional=True,
                    tooltip="Number format in the file. fp16 halves the size and is what most releases use.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The encoder's file.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, layout: str | None = None, dtype: str | None = None) -> bool | str:
        layouts = [*LAYOUTS, *XS_LAYOUTS]
        return wrong_choice(layout=(layout, layouts), dtype=(dtype, DTYPES)) or True

    @classmethod
    def execute(
        cls,
        control_net: Any,
        filename_prefix: str,
        model: Any = None,
        layout: str = LAYOUTS[0],
        dtype: str = "fp16",
    ) -> io.NodeOutput:
        if isinstance(control_net, ControlNetXSControl):
            path = save_xs(control_net, filename_prefix, layout, dtype)
        elif isinstance(control_net, ControlNeXtControl):
            path = saving.save_control(control_net, model, filename_prefix, layout, dtype)
        else:
            raise ValueError("control_net: is a stock ControlNet. Connect Load ControlNeXt or Load ControlNet-XS.")
        return io.NodeOutput(str(path), ui={**ui.PreviewText(str(path)).as_dict(), **report(f"saved {path}")})
