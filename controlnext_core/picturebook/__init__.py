"""Pictures that the project draws itself: flat illustrations with dark outlines, captions and exact hints.

`draw(seed, index, size)` gives picture `index` of an unlimited series, for training runs, the demo and sample hints.
"""

from .colors import COLORS
from .scenes import HINTS, Picture, draw
from .things import THINGS

__all__ = ["COLORS", "HINTS", "THINGS", "Picture", "draw"]
