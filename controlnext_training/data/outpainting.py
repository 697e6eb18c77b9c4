"""Hints for outpainting: the clip with gray around a rectangle, as the host's Pad Image for Outpainting makes it.

Gray marks what is to be painted; the rectangle is the same in all frames of a clip, and a function of these alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...controlnext_core.fidelity import OUTPAINT_GRAY
from ..seeding import uniform
from .degraded import COMPUTED
from .samples import PAIRED, digest

OUTPAINT = "outpaint"
"""Name of this kind of hint in a setting."""
HINT_KINDS = (PAIRED, *COMPUTED, OUTPAINT)
"""Every source of a hint."""
LEAST_KEPT, MOST_KEPT = 0.4, 0.85
"""Shares of a side that the rectangle keeps."""
SIDES = ("width", "height", "both")


def kept_rectangle(height: int, width: int, name: str) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the part that the sample `name` keeps: narrower, lower or both, at any place."""
    which = SIDES[int(uniform(0, f"outpainting sides {name}", 0) * len(SIDES))]
    top, bottom = _kept(height, f"height {name}") if which != "width" else (0, height)
    left, right = _kept(width, f"width {name}") if which != "height" else (0, width)
    return top, bottom, left, right


def _kept(side: int, name: str) -> tuple[int, int]:
    share = LEAST_KEPT + (MOST_KEPT - LEAST_KEPT) * uniform(0, f"outpainting {name}", 0)
    length = max(1, round(share * side))
    start = round((side - length) * uniform(0, f"outpainting place of {name}", 0))
    return start, start + length


def outpainting_hints(frames: Tensor, keys: Sequence[str]) -> Tensor:
    """frames (F, H, W, 3) in [0, 1] with gray outside the rectangle of the sample with these keys; a new tensor."""
    top, bottom, left, right = kept_rectangle(int(frames.shape[1]), int(frames.shape[2]), digest(*keys))
    hints = frames.new_full(frames.shape, OUTPAINT_GRAY)
    hints[:, top:bottom, left:right] = frames[:, top:bottom, left:right]
    return hints
