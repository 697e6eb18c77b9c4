"""Diffusion transformers: how a family is recognised, its first joint block, and the weights that a control may change.

Names of weights are the host's. The encoder's timestep is 1000 * sigma for all families: some models themselves get
sigma, over which a sinusoidal embedding hardly changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.model_patcher import ModelPatcher
from torch import Size, Tensor

from ...families import FAMILIES
from ...key_maps import KeyMap, mmdit_key_map
from ...low_rank import Part, Slice
from ...specs import Family, Site
from .base import ALL, Base, Door, Place
from .tokens import (
    FromTheEnd,
    PictureTokens,
    Start,
    after_the_reference,
    from_the_front,
    hook_block,
    patch_block,
    replace_block,
)

SITE = Site.AFTER_JOINT_0
STREAMS = {"double": "double_blocks.", "single": "single_blocks."}
LAYERS = {"joint": "layers.", "refiner": "noise_refiner."}
"""Groups of blocks of Lumina2 and Z-Image; STREAMS has those of Flux.1 and Chroma."""
HAS_LAYER_PATCHES = hasattr(ModelPatcher, "set_model_noise_refiner_patch")
"""True: the host's Lumina2 and Z-Image call patches after each layer. False: an older host, which does not."""


def flow_timesteps(model_sampling: Any, sigmas: Tensor) -> Tensor:
    """Timesteps 1000 * sigma, for the sigmas of a flow model in 0..1."""
    return 1000 * sigmas


def first_block(
    family: Family, width: int, door: Door, kind: str = "double_block", start: Start = from_the_front
) -> Any:
    """Single place of a transformer: after its first joint block."""
    tokens = PictureTokens(start)
    cell = FAMILIES[family].cells[SITE]
    place = Place(door=door, block=(kind, 0), width=width, cell=cell, to_map=tokens.to_map, from_map=tokens.from_map)
    return {SITE: place}


def no_published_names(config: Mapping[str, Any]) -> KeyMap:
    """Raise ValueError: weights of controls for this family have the host's names."""
    raise ValueError(
        "weights for this model's family have the host's names and come with the control (`base.` names). Set "
        "weights_name to auto, or to a file of a control for this family."
    )


def transformer(
    family: Family,
    matches: Callable[[Any], bool],
    width: str,
    places: Callable[[Any, int], dict[Site, Place]],
    attention_out: str,
    sides: Mapping[str, str],
    key_map: Callable[[Mapping[str, Any]], KeyMap] = no_published_names,
    subsets: Mapping[str, str] | None = None,
    fused: Mapping[str, Part] | None = None,
) -> Base:
    """Row of a transformer.

    matches: by the host's configuration; width: attribute of the host's network with its number of channels, which a
    network that another pack puts in its place (Nunchaku's) does not have; places: (BaseModel, number of channels) ->
    places; attention_out: the output projections of the picture's attention, `to_out`, the default subset.
    """
    return Base(
        family=family,
        matches=lambda model: matches(model) and hasattr(model.diffusion_model, width),
        places=lambda model: places(model, getattr(model.diffusion_model, width)),
        key_map=key_map,
        encoder_time=flow_timesteps,
        trainable={"none": r"(?!)", "to_out": attention_out, **(subsets or {}), ALL: r""},
        sides=sides,
        fused=fused or {},
    )


def _mmdit_names(config: Mapping[str, Any]) -> KeyMap:
    return mmdit_key_map(
        config["depth"],
        num_blocks=config.get("num_blocks"),
        qk_norm=config.get("qk_norm") is not None,
        dual_attention=config.get("x_block_self_attn_layers", ()),
    )


def _image_model(model: Any) -> Any:
    """The host's name of the architecture, as its detection puts it into the configuration."""
    return model.model_config.unet_config.get("image_model")


SD3 = transformer(
    Family.SD3,
    matches=lambda model: isinstance(model.diffusion_model, MMDiT),
    width="hidden_size",
    places=lambda model, width: first_block(Family.SD3, width, replace_block),
    attention_out=r"^joint_blocks\.\d+\.x_block\.attn2?\.proj\.weight$",
    sides={"joint": "joint_blocks."},
    key_map=_mmdit_names,
)


def _is_flux(model: Any) -> bool:
    """True for Flux.1 of any kind. Others of the host's class have no pooled vector, or gates in their MLP."""
    config = model.model_config.unet_config
    return _image_model(model) == "flux" and config.get("vec_in_dim") is not None and not config.get("yak_mlp")


def attention_columns(shape: Size) -> Slice:
    """Columns that read the attention in a single block's output weight, (width, width + MLP): the first ones."""
    return 1, 0, shape[0]


TWO_STREAMS: dict[str, Any] = {
    "attention_out": r"^double_blocks\.\d+\.img_attn\.proj\.weight$",
    "sides": STREAMS,
    "subsets": {"single_too": r"^(double_blocks\.\d+\.img_attn\.proj|single_blocks\.\d+\.linear2)\.weight$"},
    "fused": {r"^single_blocks\.\d+\.linear2\.weight$": attention_columns},
}
"""Weights of Flux.1 and Chroma."""

FLUX = transformer(
    Family.FLUX,
    matches=_is_flux,
    width="hidden_size",
    places=lambda model, width: first_block(Family.FLUX, width, replace_block),
    **TWO_STREAMS,
)
CHROMA = transformer(
    Family.CHROMA,
    matches=lambda model: _image_model(model) == "chroma",
    width="hidden_size",
    places=lambda model, width: first_block(Family.CHROMA, width, replace_block),
    **TWO_STREAMS,
)
QWEN_IMAGE = transformer(
    Family.QWEN_IMAGE,
    matches=lambda model: _image_model(model) == "qwen_image",
    width="inner_dim",
    places=lambda model, width: first_block(Family.QWEN_IMAGE, width, replace_block),
    attention_out=r"^transformer_blocks\.\d+\.attn\.to_out\.0\.weight$",
    sides={"joint": "transformer_blocks."},
)


def _joint_layers(family: Family, model: Any, width: int) -> dict[Site, Place]:
    """Places of a host class with text and picture in one sequence; its newer versions call patches
    after each layer.
    """
    if HAS_LAYER_PATCHES:
        return first_block(family, width, patch_block)
    start = FromTheEnd(model.diffusion_model.pad_tokens_multiple or 1)
    return first_block(family, width, hook_block, "layers", start)


def _is_lumina(model: Any, of_z_image: bool) -> bool:
    config = model.model_config.unet_config
    return _image_model(model) == "lumina2" and bool(config.get("z_image_modulation")) is of_z_image


def value_rows(shape: Size) -> Slice:
    """Rows that make the values in a fused query-key-value weight, (width + 2 * keys, width): the last ones."""
    rows, width = shape
    return 0, (rows + width) // 2, (rows - width) // 2


ONE_STREAM: dict[str, Any] = {
    "attention_out": r"^layers\.\d+\.attention\.out\.weight$",
    "sides": LAYERS,
    "subsets": {
        "values_too": r"^layers\.\d+\.attention\.(out|qkv)\.weight$",
        "refiners_too": r"^(layers|noise_refiner)\.\d+\.attention\.out\.weight$",
    },
    "fused": {r"^layers\.\d+\.attention\.qkv\.weight$": value_rows},
}
"""Weights of Lumina2 and Z-Image."""

LUMINA2 = transformer(
    Family.LUMINA2,
    matches=functools.partial(_is_lumina, of_z_image=False),
    width="dim",
    places=functools.partial(_joint_layers, Family.LUMINA2),
    **ONE_STREAM,
)
Z_IMAGE = transformer(
    Family.Z_IMAGE,
    matches=functools.partial(_is_lumina, of_z_image=True),
    width="dim",
    places=functools.partial(_joint_layers, Family.Z_IMAGE),
    **ONE_STREAM,
)


WAN_KINDS = ("t2v", "i2v", "vace", "camera", "camera_2.2", "s2v", "humo", "animate")
"""Host's names of the kinds whose clip tokens come after those of an optional reference frame (`ref_conv`) and before
all others. SCAIL, WanDancer and the second Animate put other frames first."""


def _is_wan(model: Any, of_5b: bool) -> bool:
    config = model.model_config.unet_config
    known = _image_model(model) == "wan2.1" and config.get("model_type") in WAN_KINDS
    return known and (config.get("out_dim") == WAN_5B_CHANNELS) is of_5b


def _wan_places(family: Family, model: Any, width: int) -> dict[Site, Place]:
    start = from_the_front if getattr(model.diffusion_model, "ref_conv", None) is None else after_the_reference
    return first_block(family, width, replace_block, start=start)


def _wan(family: Family, of_5b: bool) -> Base:
    return transformer(
        family,
        matches=functools.partial(_is_wan, of_5b=of_5b),
        width="dim",
        places=functools.partial(_wan_places, family),
        attention_out=r"^blocks\.\d+\.self_attn\.o\.weight$",
        sides={"joint": "blocks."},
        subsets={"cross_too": r"^blocks\.\d+\.(self|cross)_attn\.o\.weight$"},
    )


WAN_5B_CHANNELS = 48
"""Channels of a latent of Wan 2.2's 5B autoencoder; latents of all other families have 16."""
WAN = _wan(Family.WAN, of_5b=False)
WAN_5B = _wan(Family.WAN_5B, of_5b=True)

TRANSFORMERS: tuple[Base, ...] = (SD3, FLUX, CHROMA, QWEN_IMAGE, LUMINA2, Z_IMAGE, WAN, WAN_5B)
