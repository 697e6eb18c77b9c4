"""Pictures drawn by the project itself: flat illustrations with dark outlines, captions and exact hints.

`draw(seed, index, size)` gives picture `index` of an unlimited series, for training runs, the demo and sample hints;
`draw_children` one with children, whose pose is a hint as well.
"""

from .colors import COLORS
from .scenes import HINTS, PLANES, Picture, draw, draw_children
from .things import THINGS

__all__ = ["COLORS", "HINTS", "PLANES", "THINGS", "Picture", "draw", "draw_children"]
