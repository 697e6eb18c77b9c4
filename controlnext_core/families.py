"""Families of base models: facts about each that need no loaded model.

How to reach the blocks of a loaded model, which needs the host, is in the family's row in `comfy_adapter/bases`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .specs import Family, Site


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyFacts:
    """Facts about one family of base models, in its published size."""

    architecture: str
    """Name of the family in `modelspec.architecture`."""
    context_width: int | None = None
    """Width of the text context, where it distinguishes this family from others with the same tensor names."""
    pixels: int = 8
    """Pixels of the picture along one side of a latent cell."""
    cells: Mapping[Site, int] = field(default_factory=dict)
    """Site -> pixels of the picture along one side of a feature cell at the site."""
    frames: int | None = None
    """Frames of a clip in each latent frame after the first, which has one; None: a latent is one picture."""


def unet_cells(levels: int) -> dict[Site, int]:
    """Feature cells of a UNet, which halves its resolution between levels. Source: the published UNets."""
    middle = 8 * 2 ** (levels - 1)
    return {
        Site.AFTER_CONV_IN: 8,
        Site.AFTER_DOWN_0: 16,
        Site.BEFORE_MIDDLE: middle,
        Site.AFTER_MIDDLE: middle,
    }


TOKEN_OF_2X2 = {Site.AFTER_JOINT_0: 16}
"""Feature cells of a transformer whose token is a patch of 2 x 2 latent cells, of 8 pixels each."""

FAMILIES: dict[Family, FamilyFacts] = {
    Family.SD15: FamilyFacts(architecture="stable-diffusion-v1", context_width=768, cells=unet_cells(4)),
    Family.SD21: FamilyFacts(architecture="stable-diffusion-v2-512", context_width=1024, cells=unet_cells(4)),
    Family.SDXL: FamilyFacts(architecture="stable-diffusion-xl-v1-base", context_width=2048, cells=unet_cells(3)),
    Family.SVD: FamilyFacts(architecture="stable-video-diffusion-img2vid-v1", cells=unet_cells(4)),
    Family.SD3: FamilyFacts(architecture="stable-diffusion-v3", cells=TOKEN_OF_2X2),
    Family.FLUX: FamilyFacts(architecture="flux-1", cells=TOKEN_OF_2X2),
    Family.CHROMA: FamilyFacts(architecture="chroma-1", cells=TOKEN_OF_2X2),
    Family.QWEN_IMAGE: FamilyFacts(architecture="qwen-image", cells=TOKEN_OF_2X2),
    Family.LUMINA2: FamilyFacts(architecture="lumina-2", cells=TOKEN_OF_2X2),
    Family.Z_IMAGE: FamilyFacts(architecture="z-image", cells=TOKEN_OF_2X2),
    Family.WAN: FamilyFacts(architecture="wan-2.1", cells=TOKEN_OF_2X2, frames=4),
    Family.WAN_5B: FamilyFacts(architecture="wan-2.2-5b", pixels=16, cells={Site.AFTER_JOINT_0: 32}, frames=4),
}

UNET_SUBSETS: dict[str, str] = {
    "none": r"(?!)",
    "to_out": r"to_out",
    "attn2_to_out": r"attn2.*to_out",
    "up_to_out": r"^output_blocks\..*to_out",
    "all": r"",
}
"""Name of a subset of a UNet's weights -> regular expression searched in the host's names. Source: the released
trainers. to_out: SD1.5, SVD v1; attn2_to_out: SDXL; up_to_out: a half of the blocks."""

UNET_SIDES: dict[str, str] = {"input": "input_blocks.", "middle": "middle_block.", "output": "output_blocks."}
"""Group of a UNet's blocks, as named in settings -> start of the host's names of its weights."""

CONTEXT_FAMILIES: dict[int, Family] = {
    facts.context_width: family for family, facts in FAMILIES.items() if facts.context_width is not None
}
"""Width of the text context -> family."""
