"""What the loaded base model is, and the map from a Site to the host's blocks (the only place it stands)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel

from ..specs import Family, Site, Spec

Block = tuple[str, int]
"""A block as the host names it in `transformer_options["block"]`."""


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """The facts of a base model that decide whether and where a control fits."""

    family: Family
    unet_config: dict[str, Any]
    blocks: dict[Site, Block]
    widths: dict[Site, int]
    """Channels at each site."""


def base_facts(model: Any) -> BaseFacts:
    """Facts of a host BaseModel (what a MODEL's patcher holds as `.model`)."""
    unet = model.diffusion_model
    if not isinstance(unet, UNetModel):
        return BaseFacts(Family.OTHER, {}, {}, {})
    first_down = next(
        (i for i, block in enumerate(unet.input_blocks) if any(isinstance(part, Downsample) for part in block)),
        len(unet.input_blocks) - 1,
    )
    middle_width = unet.model_channels * unet.channel_mult[-1]
    return BaseFacts(
        family=_family(model.model_config.unet_config),
        unet_config=dict(model.model_config.unet_config),
        blocks={
            Site.AFTER_CONV_IN: ("input", 0),
            Site.AFTER_DOWN_0: ("input", first_down),
            Site.BEFORE_MIDDLE: ("input", len(unet.input_blocks) - 1),
            Site.AFTER_MIDDLE: (
                "output",
                0,
            ),  # nothing but other residuals between the middle and this block's patch
        },
        widths={
            Site.AFTER_CONV_IN: unet.model_channels,
            Site.AFTER_DOWN_0: unet.model_channels * unet.channel_mult[0],
            Site.BEFORE_MIDDLE: middle_width,
            Site.AFTER_MIDDLE: middle_width,
        },
    )


def _family(unet_config: dict[str, Any]) -> Family:
    """From the UNet's own shape: temporal layers, then the width of the text context."""
    if unet_config.get("use_temporal_resblock"):
        return Family.SVD
    by_context = {768: Family.SD15, 1024: Family.SD21, 2048: Family.SDXL}
    return by_context.get(unet_config.get("context_dim", 0), Family.OTHER)


def check_pair(facts: BaseFacts, spec: Spec, out_channels: int, name: str) -> None:
    """Raise ValueError unless a control of `spec` fits this base model; `name` is the control's file."""
    if facts.family is not spec.family:
        raise ValueError(
            f"{name}: is a {spec.family.value} control ({spec.name}), but the connected model is "
            f"{facts.family.value}. Connect a {spec.family.value} checkpoint or choose another control."
        )
    width = facts.widths[spec.fusion.site]
    if width != out_channels:
        raise ValueError(
            f"{name}: gives {out_channels} channels, but the model has {width} {spec.fusion.site.value}. "
            f"Connect the {spec.family.value} checkpoint that this control was trained for."
        )
