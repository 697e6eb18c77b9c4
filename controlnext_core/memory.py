"""What encoders and their features take in memory: measured numbers, and the laws that follow from them."""

from __future__ import annotations

from .feature_cache import MIB
from .specs import Site, Spec

NUMBERS_PER_PIXEL: dict[str, int] = {
    "gen1a": 515,
    "gen1a_norm": 515,
    "gen1b": 74,
    "gen1b_scale": 74,
    "gen2": 131,
    "gen2_unpadded": 131,
}
"""Build -> numbers of the compute dtype alive per hint pixel where an encoder's pass needs most.
Source: benchmarks/bench_video_memory.py; a convolution's own scratch space is not in it."""

PIXELS_PER_CELL: dict[Site, int] = {
    Site.AFTER_CONV_IN: 8,
    Site.AFTER_DOWN_0: 16,
    Site.BEFORE_MIDDLE: 64,
    Site.AFTER_MIDDLE: 32,
}
"""Hint pixels along one side of a cell at the site, in the published UNets (SDXL's middle: 32, SD1.5's: 64)."""

ROWS_AT_ONCE = 8
"""Hints that an encoder takes in one pass at most; more are no faster."""
WORKING_BYTES = 512 * MIB
"""What a pass may need, unless a single hint needs more."""


def rows_at_once(row_bytes: int) -> int:
    """Hints of an encoder's pass where one needs `row_bytes` of working memory."""
    return max(1, min(ROWS_AT_ONCE, WORKING_BYTES // row_bytes))


def feature_bytes(spec: Spec, out_channels: int, height: int, width: int, itemsize: int) -> int:
    """What the features of one hint of height x width pixels take for one timestep: C * H * W of the site."""
    side = PIXELS_PER_CELL[spec.fusion.site]
    return out_channels * -(-height // side) * -(-width // side) * itemsize
