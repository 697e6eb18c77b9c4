"""UNets: SD1.5, SD2.1, SDXL and SVD, which differ only in their text context and temporal layers.

Features are maps already, one sample per batch item: an image, or a frame, as the released SVD controls have it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel
from torch import Tensor

from ...families import CONTEXT_FAMILIES, UNET_SIDES, UNET_SUBSETS, unet_cells
from ...key_maps import unet_key_map
from ...specs import Family, Site
from .base import AddControls, Base, Block, Door, Place, put_first
from .forward_options import TransformerOptions

AFTER_SKIP, BEFORE_OUTPUT = "input_block_patch_after_skip", "output_block_patch"


class UNetPatches:
    """Patches of this pack at one block; the host calls them at every block of that side."""

    def __init__(self, block: Block, add: AddControls) -> None:
        self.block, self.add = block, add

    def after_skip(self, h: Tensor, transformer_options: TransformerOptions) -> Tensor:
        """Patch `input_block_patch_after_skip`: the skip is stored already, so only the next block gets the control."""
        return self.add(h, transformer_options) if tuple(transformer_options["block"]) == self.block else h

    def before_output(self, h: Tensor, skip: Tensor, transformer_options: TransformerOptions) -> tuple[Tensor, Tensor]:
        """Patch `output_block_patch`: adds to h before it is concatenated with the skip."""
        here = tuple(transformer_options["block"]) == self.block
        return (self.add(h, transformer_options) if here else h), skip


def after_input_block(options: TransformerOptions, block: Block, add: AddControls) -> None:
    """Door after a block of the encoder; its skip stays without the control."""
    put_first(options, AFTER_SKIP, UNetPatches(block, add).after_skip)


def before_output_block(options: TransformerOptions, block: Block, add: AddControls) -> None:
    """Door before a decoder block; before the first, only other controls' residuals come between it and the middle
    block.
    """
    put_first(options, BEFORE_OUTPUT, UNetPatches(block, add).before_output)


def _places(model: Any) -> dict[Site, Place]:
    unet = model.diffusion_model
    last = len(unet.input_blocks) - 1
    first_down = next(
        (i for i, block in enumerate(unet.input_blocks) if any(isinstance(part, Downsample) for part in block)), last
    )
    first, middle = unet.model_channels, unet.model_channels * unet.channel_mult[-1]
    found: dict[Site, tuple[Door, Block, int]] = {
        Site.AFTER_CONV_IN: (after_input_block, ("input", 0), first),
        Site.AFTER_DOWN_0: (after_input_block, ("input", first_down), first * unet.channel_mult[0]),
        Site.BEFORE_MIDDLE: (after_input_block, ("input", last), middle),
        Site.AFTER_MIDDLE: (before_output_block, ("output", 0), middle),
    }
    cells = unet_cells(len(unet.channel_mult))
    return {
        site: Place(door=door, block=block, width=width, cell=cells[site])
        for site, (door, block, width) in found.items()
    }


def _is_family(family: Family, model: Any) -> bool:
    """True: the UNet's shape is that of the family: temporal layers, then the width of the text context.

    False: it is not.
    """
    config: Mapping[str, Any] = model.model_config.unet_config
    if not isinstance(model.diffusion_model, UNetModel):
        return False
    if config.get("use_temporal_resblock"):
        return family is Family.SVD
    return CONTEXT_FAMILIES.get(config.get("context_dim", 0), Family.OTHER) is family


def _timesteps(model_sampling: Any, sigmas: Tensor) -> Tensor:
    """Timesteps of the control's encoder: the same numbers as the UNet's."""
    return model_sampling.timestep(sigmas)


def _unet(family: Family) -> Base:
    return Base(
        family=family,
        matches=functools.partial(_is_family, family),
        places=_places,
        key_map=unet_key_map,
        encoder_time=_timesteps,
        trainable=UNET_SUBSETS,
        sides=UNET_SIDES,
    )


UNETS = tuple(map(_unet, (Family.SD15, Family.SD21, Family.SDXL, Family.SVD, Family.OTHER)))
"""Rows of the UNets. OTHER is a UNet whose text context has another width; a ControlNet-XS may be made for one."""
