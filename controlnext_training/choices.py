"""Names that a setting may have and their meaning, where no other table knows them."""

from __future__ import annotations

import re

from ..controlnext_core.encodable import cut
from ..controlnext_core.families import FAMILIES, UNET_SIDES, UNET_SUBSETS
from ..controlnext_core.specs import PAPER_FUSION, SPECS
from .settings import ConfigError

XS = "xs"
"""The variant that trains a ControlNet-XS and not a ControlNeXt."""

VARIANTS = (*SPECS, XS)
"""Variants that can be trained."""

AUTO = "auto"

FUSIONS: dict[str, str] = {"released": "released", PAPER_FUSION: PAPER_FUSION, "zero_conv": "none", "add": "none"}
"""Way of joining -> key of `injection.NORMALIZATIONS`. zero_conv adds a convolution that starts at zero."""

LAYOUTS: dict[str, tuple[str, ...]] = {
    **{name: ("single", "lora" if spec.on_transformer else "published") for name, spec in SPECS.items()},
    XS: ("single", "xs_official", "xs_diffusers"),
}
"""Variant -> layouts of its trained file."""

TRANSFORMER_SUBSETS = ("none", "to_out", "single_too", "values_too", "refiners_too", "cross_too", "all")
"""Names of subsets of a transformer. The tensors, by the host's names, are in the family's row (`Base.trainable`)."""

BLOCK_GROUPS = (*UNET_SIDES, "joint", "double", "single", "refiner")
"""Every name that a setting may give to a group of blocks of some base."""


def reference_of(variant: str) -> str:
    """First frame of a clip, of `video_frames.REFERENCES`: a random one as SVD's authors train, or the clip's own."""
    own = variant in SPECS and FAMILIES[SPECS[variant].family].frames is not None
    return "first" if own else "random"


def subsets_of(variant: str) -> tuple[str, ...]:
    """Names of subsets of the base's weights that a variant may train."""
    on_transformer = variant in SPECS and SPECS[variant].on_transformer
    return TRANSFORMER_SUBSETS if on_transformer else tuple(UNET_SUBSETS)


def rank_of(variant: str, rank: int) -> int:
    """The rank that a setting means: itself, or for -1 the variant's own. 0 = whole differences."""
    if rank >= 0:
        return rank
    own = SPECS[variant].differences if variant in SPECS else None
    return own.rank if own else 0


def parse_blocks(text: str) -> dict[str, range | None]:
    """`input.0-5, middle` -> {"input": range(0, 6), "middle": None}; None = every block of that side.

    Raises ConfigError.
    """
    found: dict[str, range | None] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(rf"({'|'.join(BLOCK_GROUPS)})(?:\.(\d{{1,4}})(?:-(\d{{1,4}}))?)?", part)
        if match is None or match[1] in found:
            raise ConfigError(
                f"blocks: {cut(repr(part))} is not understood. Write each of {', '.join(BLOCK_GROUPS)} at most once, "
                "with or without numbers: input.0-5, middle, output.3."
            )
        first = match[2]
        found[match[1]] = None if first is None else range(int(first), int(match[3] or first) + 1)
    return found
