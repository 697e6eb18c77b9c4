"""Palette: colours that captions name, chosen to go together, and mixtures of them. RGB, 0 to 255."""

from __future__ import annotations

Color = tuple[int, int, int]

COLORS: dict[str, Color] = {
    "red": (219, 78, 70),
    "orange": (240, 148, 66),
    "yellow": (249, 204, 84),
    "green": (104, 170, 92),
    "teal": (64, 162, 160),
    "blue": (70, 126, 198),
    "purple": (142, 102, 178),
    "pink": (240, 152, 172),
    "brown": (158, 108, 76),
    "white": (250, 244, 230),
}
"""Name in captions -> fill colour."""
INK: Color = (52, 40, 58)
CREAM: Color = (250, 240, 214)
SNOW: Color = (252, 250, 246)
GLASS: Color = (255, 232, 158)
WOOD: Color = (146, 98, 70)
LEAF: Color = (92, 156, 84)
SKIES: dict[str, tuple[Color, Color]] = {
    "blue": ((136, 196, 232), (212, 236, 242)),
    "pink": ((240, 170, 180), (252, 224, 208)),
    "yellow": ((250, 212, 126), (253, 238, 200)),
    "purple": ((160, 142, 206), (234, 206, 226)),
}
"""Name in captions -> colours at the top and at the horizon."""
WALLS: dict[str, Color] = {
    "pink": (244, 190, 192),
    "blue": (164, 204, 226),
    "yellow": (250, 222, 146),
    "green": (176, 212, 168),
    "purple": (196, 178, 220),
}
"""Name in captions -> colour of a wall."""
MEADOW: tuple[Color, Color] = ((166, 206, 112), (124, 182, 96))
SEA: tuple[Color, Color] = ((86, 168, 204), (52, 124, 176))
DEEP: tuple[Color, Color] = ((120, 204, 214), (44, 120, 172))
SAND: Color = (240, 216, 162)
TABLE: Color = (190, 138, 98)


def mix(first: Color, second: Color, share: float) -> Color:
    """Mixture of `share` of the second colour and the rest of the first."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))  # type: ignore[return-value]


def darker(color: Color, share: float = 0.16) -> Color:
    """Colour in shadow: mixed with `share` of dark violet."""
    return mix(color, (70, 44, 92), share)


def lighter(color: Color, share: float = 0.4) -> Color:
    """Colour in light: mixed with `share` of warm white."""
    return mix(color, (255, 250, 236), share)
