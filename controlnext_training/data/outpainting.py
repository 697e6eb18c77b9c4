"""Hints for outpainting: the clip with gray around a rectangle, as the host's Pad Image for Outpainting makes it.

Gray marks the area to paint. The rectangle is the same in all frames of a clip, and depends only on them.
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
"""Names of all sources of a hint."""
LEAST_KEPT, MOST_KEPT = 0.4, 0.85
"""Range of the share of a side that the rectangle covers."""
SIDES = ("width", "height", "both")


def kept_rectangle(height: int, width: int, name: str) -> tuple[int, int, int, int]:
    """Rectangle (top, bottom, left, right) that is shown of the sample `name`: narrower, lower or both, at any
    position.
    """
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
    """Frames (F, H, W, 3) in [0, 1] with gray outside the rectangle of the sample with these keys; a new tensor."""
    top, bottom, left, right = kept_rectangle(int(frames.shape[1]), int(frames.shape[2]), digest(*keys))
    hints = frames.new_full(frames.shape, OUTPAINT_GRAY)
    hints[:, top:bottom, left:right] = frames[:, top:bottom, left:right]
    return hints
