"""Memory of controls: measured constants, and the formulas that use them."""

from __future__ import annotations

from ..models.controlnet_xs import DOWN, RES, BlockConfig, ControlNetXSConfig
from .families import FAMILIES
from .feature_cache import MIB
from .specs import Spec

NUMBERS_PER_PIXEL: dict[str, int] = {
    "gen1a": 435,
    "gen1a_norm": 435,
    "gen1b": 77,
    "gen1b_scale": 77,
    "gen2": 116,
    "gen2_unpadded": 113,
    "gen2_deep": 116,
}
"""Build -> peak number of values (of the compute dtype) alive per hint pixel in an encoder's pass, for hints from
`LARGE_HINT` on. Source: benchmarks/bench_video_memory.py, at 512 x 512; a convolution's scratch space is not included.
The merged convolutions (models/halving.py), 2.3 million values, are: larger hints need up to 7 less per pixel."""
LARGE_HINT = 512 * 512
"""Number of pixels from which on a hint is large; for smaller ones convolutions may not be merged."""
_SMALL_HINTS: dict[str, int] = {"gen1a": 547, "gen1a_norm": 547, "gen1b": 74, "gen1b_scale": 74}
"""Peak numbers of values per hint pixel without merged convolutions. All of the second generation need 139."""


def numbers_per_pixel(build: str, pixels: int) -> int:
    """Peak number of values (of the compute dtype) alive per hint pixel in an encoder's pass; pixels: of the hint."""
    return NUMBERS_PER_PIXEL[build] if pixels >= LARGE_HINT else _SMALL_HINTS.get(build, 139)


ROWS_AT_ONCE = 8
"""Largest number of hints in one pass of an encoder; more are no faster."""
WORKING_BYTES = 512 * MIB
"""Limit in bytes for the memory of a pass, unless a single hint needs more."""


def rows_at_once(row_bytes: int) -> int:
    """Number of hints in an encoder's pass, where one needs `row_bytes` of working memory."""
    return max(1, min(ROWS_AT_ONCE, WORKING_BYTES // row_bytes))


def feature_bytes(spec: Spec, out_channels: int, height: int, width: int, itemsize: int) -> int:
    """Bytes of the features of one hint of height x width pixels for one timestep: C * H * W of the site."""
    side = FAMILIES[spec.family].cells[spec.fusion.site]
    return out_channels * -(-height // side) * -(-width // side) * itemsize


WIDE_TENSORS, WIDE_FP32_TENSORS = 1, 3
"""Numbers of tensors with the base's channels alive while `project` widens the map of a transformer's control: the
output of the last convolution, in the compute dtype, and its standardisation in fp32. Source:
benchmarks/bench_clip_memory.py"""


def wide_bytes(spec: Spec, out_channels: int, height: int, width: int, itemsize: int) -> int:
    """Peak bytes while the map of a hint of height x width pixels is projected to a transformer's channels."""
    return feature_bytes(spec, out_channels, height, width, WIDE_TENSORS * itemsize + WIDE_FP32_TENSORS * 4)


# ControlNet-XS. Source of the counts: benchmarks/bench_xs_memory.py

XS_HINT_TENSORS = 3
"""Number of feature maps of the hint encoder's first width that are alive at once, beside the hint."""
XS_NORM_TENSORS, XS_FP32_NORM_TENSORS = 3, 5
"""Numbers of tensors alive in a norm and the SiLU after it, in a residual block; the second where features in half
precision have their norms in fp32."""
XS_TRANSFORMER_TENSORS = 21
"""Number of tensors of a transformer's width alive in its feed-forward, beside the block's input."""
XS_CORRECTION_TENSORS = 3
"""Number of tensors of the base's channels alive while a correction is scaled, masked and added."""
XS_ROWS_PER_HINT = 2
"""Rows of a forward per hint: both halves of the guidance. The number of latents that share a hint is unknown here."""


def xs_numbers_per_pixel(config: ControlNetXSConfig) -> int:
    """Peak number of values (of the compute dtype) alive per hint pixel in a pass of the hint encoder."""
    return config.hint[0] + XS_HINT_TENSORS * max(config.hint[1:3])


def xs_numbers_per_cell(config: ControlNetXSConfig, fp32_norms: bool) -> float:
    """Peak number of values alive per latent cell and row in a forward beside the base; the base's are not counted.

    fp32_norms: True means that norms are in fp32 and features in half precision; False: one dtype for both.
    """
    size, most = 1.0, 0.0  # size: cells of the current block per latent cell
    kept: list[float] = []
    sizes: list[float] = []
    for block in config.encoder:
        most = max(most, sum(kept) + size * _inside(block, fp32_norms))
        size = size / 4 if block.kind == DOWN else size
        kept.append(size * block.out_ch)
        sizes.append(size)
        most = max(most, sum(kept) + size * XS_CORRECTION_TENSORS * block.base_ch)
    for block in config.middle:
        most = max(most, sum(kept) + size * _inside(block, fp32_norms))
    for base_ch in config.decoder:
        most = max(most, sum(kept) + sizes.pop() * XS_CORRECTION_TENSORS * base_ch)
        kept.pop()
    return most


def _inside(block: BlockConfig, fp32_norms: bool) -> float:
    """Channels alive in a block, with those of its input."""
    if block.kind != RES:
        return block.in_ch + block.out_ch
    norm = XS_FP32_NORM_TENSORS if fp32_norms else XS_NORM_TENSORS
    most = max(norm * block.in_ch, block.in_ch + (norm + 1) * block.out_ch)  # shortcut alive in the second norm
    if block.transformer is None:
        return most
    return max(most, block.in_ch + XS_TRANSFORMER_TENSORS * block.transformer.inner)
