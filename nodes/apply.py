"""Nodes that apply a control to a model and set its options."""

from __future__ import annotations

from typing import Any

from ..controlnext_core.comfy_adapter.feedback import report
from ..controlnext_core.comfy_adapter.sampling.attach import attach
from ..controlnext_core.comfy_adapter.sampling.cautions import (
    control_cautions,
    mask_cautions,
    model_cautions,
    schedule_cautions,
)
from ..controlnext_core.comfy_adapter.sampling.host_control import HostControl
from ..controlnext_core.keyframes import read_keyframes
from ..controlnext_core.schedule import parse_schedule
from ..controlnext_core.specs import Halves
from ._api import ControlNode, blame, io, refuse_wrong_choice

MASK_TOOLTIP = "Where the control acts: 1 fully, 0 not at all. Masks of Options and Apply multiply."


FOLLOW_STRENGTH = -1.0
"""Value of time_mix with which the mix follows the strength."""


def our_control(control_net: Any) -> HostControl:
    """Return a CONTROL_NET of this pack. Raises ValueError, which names the node to use, for a stock one."""
    if not isinstance(control_net, HostControl):
        raise ValueError(
            "control_net: is a stock ControlNet. Use the stock Apply ControlNet node for it; both can be in one "
            "workflow. This node takes the output of Load ControlNeXt or Load ControlNet-XS."
        )
    return control_net


class ControlNeXtApply(ControlNode):
    """Node that applies a control to a model, for workflows without a positive and a negative conditioning to route."""

    SEARCH = ("controlnext", "controlnet", "apply control", "sdxl", "sd3", "flux", "qwen", "z-image", "wan", "video")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNeXtApply",
            display_name="Apply ControlNeXt",
            category="ControlNeXt",
            description="Applies a control to every conditioning of a model. To control single conditionings, areas or "
            "timestep ranges, connect the control to the stock Apply ControlNet node instead.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="MODEL from Load ControlNeXt, directly or through LoRA loaders. For ControlNet-XS: the "
                    "checkpoint's.",
                ),
                io.ControlNet.Input(
                    "control_net", tooltip="From Load ControlNeXt, Load ControlNet-XS or ControlNeXt Options."
                ),
                io.Image.Input(
                    "image",
                    tooltip="The hint: one for all, or one per image of the batch or frame of the video. Any size; "
                    "gray, RGB or RGBA.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="1 as released, 0 no control.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="The control acts from this point of sampling on.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="The control acts up to this point of sampling.",
                ),
                io.Mask.Input("mask", optional=True, tooltip=MASK_TOOLTIP),
            ],
            outputs=[io.Model.Output(tooltip="The controlled model; connect it to a sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        control_net: Any,
        image: Any,
        strength: float,
        start_percent: float,
        end_percent: float,
        mask: Any = None,
    ) -> io.NodeOutput:
        control = our_control(control_net).with_options(masks=() if mask is None else (mask,))
        control.set_cond_hint(image.movedim(-1, 1), strength, (start_percent, end_percent))
        controlled = attach(model, control)
        shown = report("", [*control_cautions(control), *model_cautions(control, model)])
        return io.NodeOutput(controlled, ui=shown)


def xs_inputs(**others: Any) -> list[io.Input]:
    """Inputs for the options that only ControlNet-XS has. others: further arguments of each."""
    return [
        *(_part_input(part, **others) for part in ("encoder", "middle", "decoder")),
        io.Float.Input(
            "time_mix",
            default=FOLLOW_STRENGTH,
            min=FOLLOW_STRENGTH,
            max=1.0,
            step=0.01,
            tooltip="ControlNet-XS with a time embedding of its own: how much that counts (time_mix^0.3). -1 "
            "follows the strength, 1 is what diffusers does.",
            **others,
        ),
    ]


def _part_input(part: str, **others: Any) -> io.Float.Input:
    return io.Float.Input(
        f"{part}_strength",
        default=1.0,
        min=0.0,
        max=10.0,
        step=0.01,
        tooltip=f"ControlNet-XS: multiplies what the model's {part} gets, beside the strength of the Apply node.",
        **others,
    )


def hidden(inputs: list[io.Input]) -> list[io.Input]:
    """Mark the inputs as advanced, so that pages hide them by default.

    Earlier hosts' inputs have no argument for it.
    """
    for made in inputs:
        made.extra_dict = {**made.extra_dict, "advanced": True}
    return inputs


def xs_options(encoder: float, middle: float, decoder: float, time_mix: float) -> dict[str, Any]:
    """Options behind the values of `xs_inputs`, for `HostControl.with_options`."""
    parts = {"parts": (encoder, middle, decoder)}
    return parts if time_mix < 0 else {**parts, "time_mix": time_mix}


class ControlNeXtOptions(ControlNode):
    """Node that sets options of a control: its half of the guidance, its mask, its strength schedule."""

    SEARCH = ("controlnet", "schedule", "mask", "strength")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNeXtOptions",
            display_name="ControlNeXt Options",
            category="ControlNeXt",
            description="Limits a control to a half of the guidance, a mask or a strength schedule. Goes between a "
            "loader and any Apply node.",
            inputs=[
                io.ControlNet.Input("control_net", tooltip="From Load ControlNeXt or Load ControlNet-XS."),
                io.Combo.Input(
                    "apply_to",
                    options=[half.value for half in Halves],
                    default=Halves.AUTO.value,
                    tooltip="Half of the guidance that gets the control. auto: as released (SVD the positive, all "
                    "others both).",
                ),
                io.Mask.Input("mask", optional=True, tooltip=MASK_TOOLTIP),
                io.String.Input(
                    "schedule",
                    default="",
                    optional=True,
                    tooltip="percent:strength pairs, e.g. 0:1, 0.4:1, 0.8:0.2, linear in between; multiplies the "
                    "strength of the Apply node.",
                ),
                *hidden(xs_inputs(optional=True)),  # of graphs that are older than ControlNetXSOptions
                io.Custom("TIMESTEP_KEYFRAME").Input(
                    "timestep_keyframes",
                    optional=True,
                    tooltip="From a Timestep Keyframe node of Advanced-ControlNet: strength and mask from a percent "
                    "on; multiplies all other strengths.",
                ),
                io.Custom("LATENT_KEYFRAME").Input(
                    "latent_keyframes",
                    optional=True,
                    tooltip="From a Latent Keyframe node of Advanced-ControlNet: strengths of single images of a "
                    "batch or frames of a video.",
                ),
            ],
            outputs=[io.ControlNet.Output(tooltip="The control with these options.")],
        )

    @classmethod
    def validate_inputs(cls, schedule: str | None = None) -> bool | str:
        return blame(parse_schedule, schedule)

    @classmethod
    def execute(
        cls,
        control_net: Any,
        apply_to: str,
        mask: Any = None,
        schedule: str = "",
        encoder_strength: float = 1.0,
        middle_strength: float = 1.0,
        decoder_strength: float = 1.0,
        time_mix: float = FOLLOW_STRENGTH,
        timestep_keyframes: Any = None,
        latent_keyframes: Any = None,
    ) -> io.NodeOutput:
        refuse_wrong_choice(apply_to=(apply_to, [half.value for half in Halves]))
        options: dict[str, Any] = {
            "apply_to": Halves(apply_to),
            "masks": () if mask is None else (mask,),
            **xs_options(encoder_strength, middle_strength, decoder_strength, time_mix),
        }
        if schedule.strip():
            options["schedule"] = parse_schedule(schedule)
        if timestep_keyframes is not None or latent_keyframes is not None:
            options["keyframes"] = read_keyframes(timestep_keyframes, latent_keyframes)
        control = our_control(control_net).with_options(**options)
        shown = report("", [*mask_cautions(control.options), *schedule_cautions(control.options.schedule)])
        return io.NodeOutput(control, ui=shown)
