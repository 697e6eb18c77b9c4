"""Names that a setting may have and their meaning, where no other table knows them."""

from __future__ import annotations

from ..controlnext_core.families import FAMILIES
from ..controlnext_core.specs import PAPER_FUSION, SPECS

XS = "xs"
"""The variant that trains a ControlNet-XS and not a ControlNeXt."""

VARIANTS = (*(name for name, spec in SPECS.items() if FAMILIES[spec.family].frames is None), XS)
"""Variants that can be trained: not those for clips in one latent, whose rows are no frames."""

AUTO = "auto"

FUSIONS: dict[str, str] = {"released": "released", PAPER_FUSION: PAPER_FUSION, "zero_conv": "none", "add": "none"}
"""Way of joining -> key of `injection.NORMALIZATIONS`. zero_conv adds a convolution that starts at zero."""

LAYOUTS: dict[str, tuple[str, ...]] = {
    **{name: ("single", "lora" if spec.on_transformer else "published") for name, spec in SPECS.items()},
    XS: ("single", "xs_official", "xs_diffusers"),
}
"""Variant -> layouts of its trained file."""

SUBSETS: dict[str, str] = {
    "none": r"(?!)",
    # the released trainers' rules, over published names: SD1.5 and SVD v1; SDXL; and one for a half of the blocks
    "to_out": r"to_out",
    "attn2_to_out": r"attn2.*to_out",
    "up_to_out": r"up_blocks.*to_out",
    "all": r"",
}
"""Name of a subset -> regular expression searched in the published names of a UNet's tensors."""

TRANSFORMER_SUBSETS = ("none", "to_out", "refiners_too", "all")
"""Names of subsets of a transformer. The tensors, by the host's names, are in the family's row (`Base.trainable`)."""

SIDES: dict[str, str] = {"input": "input_blocks.", "middle": "middle_block.", "output": "output_blocks."}
"""Side of a UNet in a setting -> start of the host's names. Those of a transformer are in the family's row."""

BLOCK_GROUPS = (*SIDES, "joint", "double", "single", "refiner")
"""Every name that a setting may give to a group of blocks of some base."""


def subsets_of(variant: str) -> tuple[str, ...]:
    """Names of subsets of the base's weights that a variant may train."""
    on_transformer = variant in SPECS and SPECS[variant].on_transformer
    return TRANSFORMER_SUBSETS if on_transformer else tuple(SUBSETS)


def rank_of(variant: str, rank: int) -> int:
    """The rank that a setting means: itself, or for -1 the variant's own. 0 = whole differences."""
    if rank >= 0:
        return rank
    own = SPECS[variant].differences if variant in SPECS else None
    return own.rank if own else 0
