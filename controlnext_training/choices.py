"""Allowed names of settings and their meaning, where no other table holds them."""

from __future__ import annotations

import re

from ..controlnext_core.encodable import cut
from ..controlnext_core.families import FAMILIES, UNET_SIDES, UNET_SUBSETS
from ..controlnext_core.specs import PAPER_FUSION, SPECS
from .settings import ConfigError

XS = "xs"
"""Variant that trains a ControlNet-XS instead of a ControlNeXt."""

VARIANTS = (*SPECS, XS)
"""Names of the variants that can be trained."""

AUTO = "auto"

FUSIONS: dict[str, str] = {"released": "released", PAPER_FUSION: PAPER_FUSION, "zero_conv": "none", "add": "none"}
"""Name of a fusion -> key of `injection.NORMALIZATIONS`. zero_conv adds a convolution that starts at zero."""

LAYOUTS: dict[str, tuple[str, ...]] = {
    **{name: ("single", "lora" if spec.on_transformer else "published") for name, spec in SPECS.items()},
    XS: ("single", "xs_official", "xs_diffusers"),
}
"""Variant -> layouts of its trained file."""

TRANSFORMER_SUBSETS = ("none", "to_out", "single_too", "values_too", "refiners_too", "cross_too", "all")
"""Names of a transformer's subsets. The tensors, by host names, are in the family's row (`Base.trainable`)."""

BLOCK_GROUPS = (*UNET_SIDES, "joint", "double", "single", "refiner")
"""Names of all groups of blocks, over all bases."""


def reference_of(variant: str) -> str:
    """First frame of a clip, one of `video_frames.REFERENCES`: a random one, as SVD's authors train, or the clip's
    first.
    """
    own = variant in SPECS and FAMILIES[SPECS[variant].family].frames is not None
    return "first" if own else "random"


def subsets_of(variant: str) -> tuple[str, ...]:
    """Names of subsets of the base's weights that a variant may train."""
    on_transformer = variant in SPECS and SPECS[variant].on_transformer
    return TRANSFORMER_SUBSETS if on_transformer else tuple(UNET_SUBSETS)


def rank_of(variant: str, rank: int) -> int:
    """Rank of the differences: the given one, or for -1 the variant's default. 0: full differences."""
    if rank >= 0:
        return rank
    own = SPECS[variant].differences if variant in SPECS else None
    return own.rank if own else 0


def parse_blocks(text: str) -> dict[str, range | None]:
    """Parse a text such as `input.0-5, middle` to {"input": range(0, 6), "middle": None}; None: every block of that
    group.

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
