"""Names that a setting may have and their meaning, where no other table knows them."""

from __future__ import annotations

from ..controlnext_core.specs import PAPER_FUSION, SPECS

XS = "xs"
"""The variant that trains a ControlNet-XS and not a ControlNeXt."""

VARIANTS = (*(name for name, spec in SPECS.items() if not spec.on_transformer), XS)

AUTO = "auto"

FUSIONS: dict[str, str] = {"released": "released", PAPER_FUSION: PAPER_FUSION, "zero_conv": "none", "add": "none"}
"""Way of joining -> key of `injection.NORMALIZATIONS`. zero_conv adds a convolution that starts at zero."""

LAYOUTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(VARIANTS, ("single", "published")),
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
"""Name of a subset -> regular expression searched in the published names of the UNet's tensors."""
