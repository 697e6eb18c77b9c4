"""The diffusion transformers: how each is told, where its first joint block is, which weights a control may change.

Names of weights are the host's. The encoder's time is 1000 times sigma for all of them: the number that a model
itself is given is sigma for some, where a sinusoidal embedding hardly moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from torch import Tensor

from ...families import FAMILIES
from ...key_maps import KeyMap, mmdit_key_map
from ...specs import Family, Site
from .base import Base, Door, Place
from .tokens import PictureTokens, Start, from_the_front, replace_block

SITE = Site.AFTER_JOINT_0


def thousandths(model_sampling: Any, sigmas: Tensor) -> Tensor:
    """1000 * sigma, of a flow model's sigmas in 0..1."""
    return 1000 * sigmas


def first_block(
    family: Family, width: int, door: Door, kind: str = "double_block", start: Start = from_the_front
) -> Any:
    """The one place of a transformer: after its first joint block."""
    tokens = PictureTokens(start)
    cell = FAMILIES[family].cells[SITE]
    place = Place(door=door, block=(kind, 0), width=width, cell=cell, to_map=tokens.to_map, from_map=tokens.from_map)
    return {SITE: place}


def no_published_names(config: Mapping[str, Any]) -> KeyMap:
    """Raises ValueError: controls of this family have the host's names."""
    raise ValueError(
        "weights for this model's family have the host's names and come with the control (`base.` names). Set "
        "weights_name to auto, or to a file of a control for this family."
    )


def transformer(
    family: Family,
    matches: Callable[[Any], bool],
    places: Callable[[Any], dict[Site, Place]],
    attention_out: str,
    key_map: Callable[[Mapping[str, Any]], KeyMap] = no_published_names,
    subsets: Mapping[str, str] | None = None,
) -> Base:
    """One row. attention_out: the output projections of the picture's attention, the default subset."""
    return Base(
        family=family,
        matches=matches,
        places=places,
        key_map=key_map,
        encoder_time=thousandths,
        trainable={"none": r"(?!)", "attention_out": attention_out, **(subsets or {}), "all": r""},
        sides={},
    )


def _mmdit_names(config: Mapping[str, Any]) -> KeyMap:
    return mmdit_key_map(
        config["depth"],
        num_blocks=config.get("num_blocks"),
        qk_norm=config.get("qk_norm") is not None,
        dual_attention=config.get("x_block_self_attn_layers", ()),
    )


SD3 = transformer(
    Family.SD3,
    matches=lambda model: isinstance(model.diffusion_model, MMDiT),
    places=lambda model: first_block(Family.SD3, model.diffusion_model.hidden_size, replace_block),
    attention_out=r"^joint_blocks\.\d+\.x_block\.attn2?\.proj\.weight$",
    key_map=_mmdit_names,
)

TRANSFORMERS: tuple[Base, ...] = (SD3,)
