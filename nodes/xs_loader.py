"""Nodes that load a ControlNet-XS and set the options that only it has."""

from __future__ import annotations

from typing import Any

from ..controlnext_core.comfy_adapter.feedback import report
from ..controlnext_core.comfy_adapter.files import folders
from ..controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs
from ..controlnext_core.xs_specs import NORM_RULES, parse_heads
from ._api import ControlNode, blame, io, refuse_wrong_choice
from .apply import our_control, xs_inputs, xs_options


class ControlNetXSLoader(ControlNode):
    """Node that loads a ControlNet-XS from a file."""

    SEARCH = ("controlnet", "canny", "edges", "depth")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNetXSLoader",
            display_name="Load ControlNet-XS",
            category="ControlNeXt",
            description="Loads a ControlNet-XS (SD1.5, SD2.1, SDXL) with the released names or as diffusers' adapter.",
            inputs=[
                io.Combo.Input(
                    "control_name",
                    options=folders.control_names(),
                    tooltip="A ControlNet-XS file of models/controlnext or models/controlnet.",
                ),
                io.Combo.Input(
                    "norm_rule",
                    options=["auto", *NORM_RULES],
                    default="auto",
                    optional=True,
                    tooltip="How the norms are grouped, which the file does not hold. auto: as released, and as "
                    "diffusers does it for adapters of other sizes than the released ones, which were trained there.",
                ),
                io.String.Input(
                    "num_heads",
                    default="",
                    optional=True,
                    tooltip="Attention heads per level, e.g. 1,1,2, where the file needs other ones than the released "
                    "sizes have. Empty: from the file's metadata, its config.json, or the released sizes.",
                ),
            ],
            outputs=[io.ControlNet.Output(tooltip="For Apply ControlNeXt, or the stock Apply ControlNet nodes.")],
        )

    @classmethod
    def validate_inputs(cls, num_heads: str | None = None) -> bool | str:
        return blame(parse_heads, num_heads)

    @classmethod
    def fingerprint_inputs(cls, control_name: str, **_: Any) -> str:
        return folders.fingerprint_alone(control_name)

    @classmethod
    def execute(cls, control_name: str, norm_rule: str = "auto", num_heads: str = "") -> io.NodeOutput:
        refuse_wrong_choice(norm_rule=(norm_rule, ["auto", *NORM_RULES]))
        loaded = load_controlnet_xs(folders.control_path(control_name), norm_rule, num_heads)
        return io.NodeOutput(loaded.control, ui=report(loaded.report))


class ControlNetXSOptions(ControlNode):
    """Node that sets the strengths of the three parts of a ControlNet-XS and of its time embedding."""

    SEARCH = ("controlnet", "strength", "encoder", "decoder")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNetXSOptions",
            display_name="ControlNet-XS Options",
            category="ControlNeXt",
            description="Sets how strongly a ControlNet-XS acts on the model's encoder, middle and decoder. Goes "
            "between Load ControlNet-XS and any Apply node, before or after ControlNeXt Options.",
            inputs=[io.ControlNet.Input("control_net", tooltip="From Load ControlNet-XS."), *xs_inputs()],
            outputs=[io.ControlNet.Output(tooltip="The control with these strengths.")],
        )

    @classmethod
    def execute(
        cls,
        control_net: Any,
        encoder_strength: float,
        middle_strength: float,
        decoder_strength: float,
        time_mix: float,
    ) -> io.NodeOutput:
        control = our_control(control_net)
        if not control.has_parts:
            raise ValueError(
                f"control_net: {control.name} is a ControlNeXt, which has no such parts. Connect Load ControlNet-XS "
                "or remove this node."
            )
        return io.NodeOutput(
            control.with_options(**xs_options(encoder_strength, middle_strength, decoder_strength, time_mix))
        )
