"""Things that anybody recognises. Each draws itself standing on (0, 0), about 1 high, in a colour.

A thing gets a Pen, which moves, scales and mirrors it; x is to the right, y down, so that most of it has negative y.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .canvas import FINE, LINE, Canvas, Numbers, Points, box, ellipse, lobes, polygon, ribbon, smooth
from .colors import CREAM, GLASS, INK, LEAF, SNOW, WOOD, Color, darker, lighter, mix


@dataclass(frozen=True)
class Pen:
    """Pen that draws in a thing's coordinates."""

    canvas: Canvas
    x: float
    y: float
    size: float
    mirrored: bool = False

    def shape(self, points: Points, color: Color, line: float = LINE, shaded: bool = True) -> None:
        self.canvas.shape(self._placed(points), color, line * self._weight, darker(color) if shaded else None)

    def line(self, points: Points, width: float = FINE, color: Color = INK, is_edge: bool = True) -> None:
        self.canvas.line(self._placed(points), width * self._weight, color, is_edge)

    def at(self, x: float, y: float, size: float) -> Pen:
        """Pen for a part, in this pen's coordinates."""
        return replace(self, x=self.x + x * self.size * self._sign, y=self.y + y * self.size, size=size * self.size)

    def note(self, joints: Points) -> None:
        """Record a person's body points (18, 2) for the pose hint."""
        self.canvas.people.append(self._placed(joints))

    def _placed(self, points: Points) -> Points:
        return np.asarray(points) * (self.size * self._sign, self.size) + (self.x, self.y)

    @property
    def _weight(self) -> float:
        """Width of lines: small things have finer ones."""
        return min(max(self.size / 0.45, 0.65), 1.0)

    @property
    def _sign(self) -> float:
        return -1.0 if self.mirrored else 1.0


def house(pen: Pen, color: Color, numbers: Numbers) -> None:
    roof = mix(color, (84, 58, 84), 0.55)
    wide = numbers.between(0.36, 0.44)
    pen.shape(box(wide * 0.35, -0.98, wide * 0.35 + 0.13, -0.66), lighter(roof, 0.15))
    pen.shape(box(-wide, -0.58, wide, 0), color)
    over = wide + 0.09
    if numbers.next() < 0.5:
        pen.shape(polygon((-over, -0.54), (0, -1.0), (over, -0.54)), roof)
    else:
        pen.shape(polygon((-over, -0.54), (-over * 0.6, -0.9), (over * 0.6, -0.9), (over, -0.54)), roof)
    door = numbers.pick((-0.5, 0.5)) * wide
    arch = ellipse(door, -0.26, 0.095, 0.095, 0.5, 1.0)
    pen.shape(np.concatenate([arch, polygon((door + 0.095, 0), (door - 0.095, 0))]), WOOD, shaded=False)
    pane = -door * 0.95
    pen.shape(box(pane - 0.1, -0.42, pane + 0.1, -0.2), GLASS, shaded=False)
    pen.line(polygon((pane, -0.42), (pane, -0.2)))
    pen.line(polygon((pane - 0.1, -0.31), (pane + 0.1, -0.31)))


def tree(pen: Pen, color: Color, numbers: Numbers) -> None:
    trunk = polygon((-0.085, 0), (-0.055, -0.5), (0.055, -0.5), (0.085, 0))
    pen.shape(trunk, WOOD)
    if numbers.next() < 0.65:
        width, turn = numbers.between(0.32, 0.4), numbers.next()
        pen.shape(lobes(0, -0.65, width, 0.36, 7, 0.16, turn), color)
        return
    for low, half in ((-0.2, 0.36), (-0.45, 0.29), (-0.69, 0.2)):
        pen.shape(polygon((-half, low), (0, low - 0.36), (half, low)), color)


def sun(pen: Pen, color: Color, numbers: Numbers) -> None:
    rays, turn = 10, numbers.next()
    for angle in 2 * np.pi * (np.arange(rays) + turn) / rays:
        along, across = np.asarray([np.cos(angle), np.sin(angle)]), np.asarray([-np.sin(angle), np.cos(angle)])
        tip, foot = along * 0.54, along * 0.27
        pen.shape(np.stack([foot + across * 0.11, tip, foot - across * 0.11]) + (0, -0.5), color, FINE, False)
    pen.shape(ellipse(0, -0.5, 0.29, 0.29), lighter(color, 0.3))


def boat(pen: Pen, color: Color, numbers: Numbers) -> None:
    pen.shape(box(-0.04, -0.98, 0.04, -0.2), WOOD, shaded=False)
    sail = numbers.pick((CREAM, SNOW))
    belly = smooth(polygon((0.06, -0.95), (0.2, -0.72), (0.42, -0.48), (0.45, -0.31)), False)
    pen.shape(np.concatenate([belly, polygon((0.06, -0.31))]), sail)
    pen.shape(polygon((-0.06, -0.86), (-0.06, -0.31), (-0.4, -0.31)), lighter(color, 0.25))
    hull = polygon((-0.5, -0.23), (0.52, -0.23), (0.47, -0.1), (0.34, 0.03), (-0.32, 0.03), (-0.44, -0.1))
    pen.shape(hull, color)
    pen.line(polygon((-0.46, -0.14), (0.49, -0.14)), FINE, lighter(color, 0.6), False)


def fish(pen: Pen, color: Color, numbers: Numbers) -> None:
    tail = smooth(polygon((-0.3, -0.5), (-0.66, -0.78), (-0.58, -0.5), (-0.66, -0.22)), True, 2)
    fin = darker(color, 0.12)
    pen.shape(tail, fin)
    pen.shape(smooth(polygon((-0.2, -0.7), (-0.12, -0.98), (0.26, -0.86), (0.2, -0.68)), True, 2), fin)
    body = smooth(
        polygon((-0.42, -0.5), (-0.2, -0.76), (0.2, -0.84), (0.62, -0.5), (0.2, -0.16), (-0.2, -0.24)), True, 3
    )
    pen.shape(body, color)
    if numbers.next() < 0.6:
        for x, half in ((-0.1, 0.2), (0.06, 0.245)):
            pen.line(smooth(polygon((x, -0.5 - half), (x + 0.06, -0.5), (x, -0.5 + half)), False), 0.03, CREAM, False)
    pen.line(smooth(polygon((0.2, -0.72), (0.13, -0.5), (0.2, -0.28)), False))
    pen.shape(smooth(polygon((0.02, -0.46), (-0.16, -0.38), (-0.1, -0.26), (0.1, -0.36)), True, 2), fin, FINE, False)
    pen.shape(ellipse(0.34, -0.57, 0.075, 0.075), SNOW, FINE, False)
    pen.shape(ellipse(0.36, -0.57, 0.034, 0.034), INK, 0, False)


def flower(pen: Pen, color: Color, numbers: Numbers) -> None:
    pen.shape(ribbon(smooth(polygon((0, 0), (0.03, -0.3), (0, -0.6)), False), 0.042), LEAF, shaded=False)
    for side in (-1, 1):
        leaf = polygon((0.01, -0.1), (side * 0.12, -0.3), (side * 0.34, -0.36), (side * 0.26, -0.14))
        pen.shape(smooth(leaf, True, 2), LEAF, shaded=False)
    center = CREAM if color[2] < 110 and color[0] > 230 else (249, 204, 84)
    petals, turn = 6, numbers.next()
    for angle in 2 * np.pi * (np.arange(petals) + turn) / petals:
        pen.shape(ellipse(0.2 * np.cos(angle), -0.7 + 0.2 * np.sin(angle), 0.125, 0.125), color, shaded=False)
    pen.shape(ellipse(0, -0.7, 0.125, 0.125), center)


def potted_flower(pen: Pen, color: Color, numbers: Numbers) -> None:
    flower(pen.at(0, -0.26, 0.76), color, numbers)
    pot = (206, 122, 84)
    pen.shape(polygon((-0.19, -0.3), (0.19, -0.3), (0.14, 0), (-0.14, 0)), pot)
    pen.shape(box(-0.23, -0.38, 0.23, -0.27), lighter(pot, 0.15))


def cat(pen: Pen, color: Color, numbers: Numbers) -> None:
    belly = lighter(color, 0.5)
    tail = smooth(polygon((0.2, -0.05), (0.5, -0.03), (0.56, -0.3), (0.42, -0.48)), False)
    pen.shape(ribbon(tail, 0.062), color, shaded=False)
    body = polygon((-0.3, 0), (-0.3, -0.24), (-0.17, -0.58), (0.17, -0.58), (0.3, -0.24), (0.3, 0))
    pen.shape(smooth(body, True, 2), color)
    pen.shape(smooth(polygon((-0.13, -0.03), (-0.15, -0.3), (0, -0.46), (0.15, -0.3), (0.13, -0.03))), belly, 0, False)
    for side in (-1, 1):
        pen.shape(polygon((side * 0.27, -0.68), (side * 0.25, -1.0), (side * 0.05, -0.86)), color, shaded=False)
        pen.shape(ellipse(side * 0.11, -0.03, 0.1, 0.055), lighter(color, 0.25), FINE, False)
    head = polygon(
        (-0.3, -0.62), (-0.26, -0.86), (0, -0.92), (0.26, -0.86), (0.3, -0.62), (0.12, -0.46), (-0.12, -0.46)
    )
    pen.shape(smooth(head, True, 2), color)
    for side in (-1, 1):
        pen.shape(ellipse(side * 0.12, -0.69, 0.045, 0.055), INK, 0, False)
        pen.line(polygon((side * 0.14, -0.58), (side * 0.34, -0.61)), 0.005)
    pen.shape(polygon((-0.035, -0.61), (0.035, -0.61), (0, -0.57)), (226, 120, 128), 0, False)


def balloon(pen: Pen, color: Color, numbers: Numbers) -> None:
    for side in (-1, 1):
        pen.line(polygon((side * 0.15, -0.36), (side * 0.08, -0.16)), 0.006)
    half = 0.36
    silhouette = np.concatenate([ellipse(0, -0.64, half, half, 0.44, 1.06), polygon((0.13, -0.33), (-0.13, -0.33))])
    pen.shape(silhouette, color)
    stripe = numbers.pick((CREAM, lighter(color, 0.55)))
    for x in (-0.5, 0.5):
        bow = np.asarray([0.16, 0.52]) * np.sign(x) * half
        left, right = (_meridian(edge) for edge in sorted(bow))
        pen.shape(np.concatenate([left, right[::-1]]), stripe, 0, False)
    for share in (-0.52, -0.16, 0.16, 0.52):
        pen.line(_meridian(share * half), 0.006)
    pen.line(np.concatenate([silhouette, silhouette[:1]]), LINE)
    pen.shape(box(-0.1, -0.17, 0.1, 0), (188, 132, 84))


def _meridian(x: float) -> Points:
    """Line from the top of a balloon to its mouth; x: its horizontal position at the widest point."""
    turns = np.linspace(-0.25, 0.19, 17) * 2 * np.pi
    return np.stack([x * np.cos(turns), -0.64 + 0.36 * np.sin(turns)], axis=1)


def mushroom(pen: Pen, color: Color, numbers: Numbers) -> None:
    stem = polygon((-0.17, 0), (-0.13, -0.25), (-0.16, -0.5), (0.16, -0.5), (0.13, -0.25), (0.17, 0))
    pen.shape(np.concatenate([stem[:1], smooth(stem, False, 2), stem[-1:]]), CREAM)
    cap = np.concatenate([ellipse(0, -0.46, 0.5, 0.5, 0.5, 1.0), ellipse(0, -0.46, 0.5, 0.09, 0.0, 0.5)])
    pen.shape(cap, color)
    spot = SNOW if sum(color) < 640 else (236, 190, 120)
    for x, y, size in ((-0.06, -0.74, 0.1), (-0.31, -0.6, 0.07), (0.24, -0.66, 0.08), (0.06, -0.53, 0.055)):
        pen.shape(ellipse(x, y, size, size * 0.85), spot, FINE, False)


def mountain(pen: Pen, color: Color, numbers: Numbers) -> None:
    peak = numbers.between(-0.12, 0.12)
    small = polygon((0.1, 0), (0.5, -0.6), (0.92, 0))
    pen.shape(small, lighter(color, 0.15))
    pen.shape(polygon((-0.8, 0), (peak, -1), (0.66, 0)), color)
    left, right = -0.8 - peak, 0.66 - peak
    cap = [(peak, -1.0), (peak + right * 0.32, -0.68), (peak + right * 0.14, -0.74), (peak + 0.01, -0.62)]
    cap += [(peak + left * 0.14, -0.73), (peak + left * 0.3, -0.7)]
    pen.shape(polygon(*cap), SNOW)


def cup(pen: Pen, color: Color, numbers: Numbers) -> None:
    pen.shape(ribbon(ellipse(0.34, -0.37, 0.2, 0.2, -0.25, 0.25), 0.05), color, shaded=False)
    pen.shape(
        smooth(polygon((-0.38, -0.68), (0.38, -0.68), (0.36, -0.2), (0.24, 0), (-0.24, 0), (-0.36, -0.2)), True, 2),
        color,
    )
    band = lighter(color, 0.55)
    pen.shape(polygon((-0.37, -0.42), (0.37, -0.42), (0.36, -0.28), (-0.36, -0.28)), band, 0, False)
    pen.shape(ellipse(0, -0.67, 0.375, 0.08), lighter(color, 0.3), LINE, False)
    pen.shape(ellipse(0, -0.655, 0.29, 0.05), (120, 78, 60), 0, False)
    for x in (-0.13, 0.13):
        steam = polygon((x, -0.8), (x + 0.06, -0.86), (x - 0.06, -0.94), (x, -1.0))
        pen.line(smooth(steam, False), 0.009, SNOW, False)


def lighthouse(pen: Pen, color: Color, numbers: Numbers) -> None:
    rock = polygon((-0.44, 0.02), (-0.36, -0.12), (-0.12, -0.19), (0.2, -0.17), (0.4, -0.1), (0.46, 0.02))
    pen.shape(smooth(rock, True, 1), (150, 136, 140))
    tower = lambda y: 0.18 - 0.075 * (-y - 0.14) / 0.58  # noqa: E731
    levels = np.linspace(-0.14, -0.72, 6)
    for place, (low, high) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        part = polygon((-tower(low), low), (tower(low), low), (tower(high), high), (-tower(high), high))
        pen.shape(part, color if place % 2 == 0 else SNOW, FINE)
    pen.shape(box(-0.08, -0.86, 0.08, -0.75), GLASS, LINE, False)
    pen.shape(box(-0.15, -0.76, 0.15, -0.71), darker(color, 0.3), LINE, False)
    pen.shape(polygon((-0.13, -0.86), (0, -1.0), (0.13, -0.86)), color)


Thing = Callable[[Pen, Color, Numbers], None]
WARM = ("red", "orange", "yellow", "pink", "purple", "blue", "white")


@dataclass(frozen=True)
class Kind:
    """Kind of thing: its drawing function, its colours, and half its width when it is 1 high."""

    draw: Thing
    colors: tuple[str, ...]
    half: float


THINGS: dict[str, Kind] = {
    "house": Kind(house, ("red", "yellow", "blue", "pink", "white", "orange", "teal", "purple"), 0.5),
    "tree": Kind(tree, ("green", "orange", "teal", "pink", "red", "yellow"), 0.4),
    "sun": Kind(sun, ("yellow", "orange", "red"), 0.5),
    "boat": Kind(boat, ("red", "blue", "yellow", "green", "brown", "teal", "pink", "orange"), 0.5),
    "fish": Kind(fish, ("orange", "red", "yellow", "purple", "pink", "green", "blue"), 0.65),
    "flower": Kind(flower, WARM, 0.34),
    "cat": Kind(cat, ("orange", "white", "brown", "purple"), 0.45),
    "balloon": Kind(balloon, ("red", "orange", "yellow", "green", "blue", "purple", "pink", "teal"), 0.36),
    "mushroom": Kind(mushroom, ("red", "orange", "brown", "purple", "yellow", "pink"), 0.5),
    "mountain": Kind(mountain, ("blue", "purple", "brown", "teal", "pink"), 0.85),
    "cup": Kind(cup, ("red", "blue", "yellow", "green", "teal", "purple", "pink", "white"), 0.5),
    "lighthouse": Kind(lighthouse, ("red", "blue", "teal", "orange"), 0.42),
}
"""Name in captions -> kind."""
