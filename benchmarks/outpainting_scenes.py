"""Moving scenes for outpainting: a camera that pans over a landscape with things in it, drawn as short clips.

A clip is a pure function of (seed, number, side, frames). The pan brings into view what lies beside the frame: a part
of what a hint hides in one frame, another frame of the same hint shows. Bars and waves repeat, so that a fill with the
border cannot continue them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..controlnext_core.opencv import require_opencv
from ..controlnext_core.picturebook.canvas import Numbers

Color = tuple[float, float, float]
SHIFT = 4
"""Bits after the point in coordinates given to OpenCV."""
INK: Color = (40, 36, 58)
LINE = 1.8
"""Width of outlines in pixels of a side of 96."""
SIDE_OF_UNITS = 96
"""Lengths below are in pixels of a picture with this side."""


class Setting(NamedTuple):
    """Colours of one kind of landscape, and the pattern of its ground."""

    sky: tuple[Color, Color]
    hills: Color
    ground: Color
    pattern: Color
    waves: bool
    things: tuple[str, ...]


LAND, WATER = ("house", "tree", "balloon"), ("boat", "balloon")
SETTINGS: dict[str, Setting] = {
    "sea": Setting(((120, 190, 235), (214, 236, 245)), (120, 150, 190), (46, 120, 178), (120, 190, 222), True, WATER),
    "meadow": Setting(
        ((140, 205, 240), (232, 244, 250)), (110, 165, 110), (128, 186, 84), (252, 246, 232), False, LAND
    ),
    "desert": Setting(((250, 200, 130), (255, 232, 190)), (206, 130, 84), (234, 184, 110), (150, 92, 60), False, LAND),
    "evening": Setting(((88, 70, 140), (244, 150, 130)), (70, 60, 110), (92, 84, 140), (250, 206, 150), True, WATER),
}
THINGS: dict[str, Callable[[Any, float, float, float, Color], None]] = {}
PAINTS: dict[str, Color] = {
    "red": (222, 70, 64),
    "yellow": (250, 204, 66),
    "white": (246, 244, 238),
    "teal": (38, 150, 148),
}


def _fixed(value: float) -> int:
    return round(value * (1 << SHIFT))


class _Frame:
    """One frame; scale: pixels of the picture in a unit."""

    def __init__(self, side: int) -> None:
        self.image = np.zeros((side, side, 3), np.uint8)
        self.scale = side / SIDE_OF_UNITS
        self.cv2 = require_opencv()

    def polygon(self, points: list[tuple[float, float]], color: Color, outline: bool = True) -> None:
        array = np.array([[_fixed(x * self.scale), _fixed(y * self.scale)] for x, y in points], np.int32)
        self.cv2.fillPoly(self.image, [array], color, self.cv2.LINE_AA, SHIFT)
        if outline:
            self.cv2.polylines(self.image, [array], True, INK, self._line, self.cv2.LINE_AA, SHIFT)

    def disc(self, x: float, y: float, radius: float, color: Color, outline: bool = True) -> None:
        at = (_fixed(x * self.scale), _fixed(y * self.scale))
        self.cv2.circle(self.image, at, _fixed(radius * self.scale), color, -1, self.cv2.LINE_AA, SHIFT)
        if outline:
            self.cv2.circle(self.image, at, _fixed(radius * self.scale), INK, self._line, self.cv2.LINE_AA, SHIFT)

    @property
    def _line(self) -> int:
        return max(1, round(LINE * self.scale))


def _thing(draw: Callable[[_Frame, float, float, float, Color], None]) -> Callable[..., None]:
    """Register a thing under its name; x, y: the middle of its foot, in units; size: its height."""
    THINGS[draw.__name__.strip("_")] = draw
    return draw


@_thing
def _house(frame: _Frame, x: float, y: float, size: float, color: Color) -> None:
    wide, wall = 0.45 * size, 0.55 * size
    frame.polygon([(x - wide, y), (x - wide, y - wall), (x + wide, y - wall), (x + wide, y)], color)
    frame.polygon([(x - 1.25 * wide, y - wall), (x, y - size), (x + 1.25 * wide, y - wall)], (150, 70, 60))
    frame.polygon(
        [
            (x - 0.12 * size, y),
            (x - 0.12 * size, y - 0.32 * size),
            (x + 0.12 * size, y - 0.32 * size),
            (x + 0.12 * size, y),
        ],
        (96, 64, 52),
    )


@_thing
def _tree(frame: _Frame, x: float, y: float, size: float, color: Color) -> None:
    frame.polygon(
        [(x - 0.08 * size, y), (x - 0.08 * size, y - size / 2), (x + 0.08 * size, y - size / 2), (x + 0.08 * size, y)],
        (120, 82, 56),
    )
    frame.disc(x, y - 0.66 * size, 0.34 * size, (60, 140, 78))
    for dx, dy in ((-0.12, -0.72), (0.14, -0.62), (0.0, -0.52)):
        frame.disc(x + dx * size, y + dy * size, 0.05 * size, color, False)


@_thing
def _boat(frame: _Frame, x: float, y: float, size: float, color: Color) -> None:
    frame.polygon(
        [
            (x - 0.5 * size, y - 0.28 * size),
            (x + 0.5 * size, y - 0.28 * size),
            (x + 0.32 * size, y),
            (x - 0.32 * size, y),
        ],
        (140, 84, 56),
    )
    frame.polygon([(x, y - 0.32 * size), (x, y - size), (x + 0.42 * size, y - 0.34 * size)], color)


@_thing
def _balloon(frame: _Frame, x: float, y: float, size: float, color: Color) -> None:
    up = y - 0.9 * size  # it flies
    frame.polygon(
        [
            (x - 0.08 * size, up + 0.62 * size),
            (x + 0.08 * size, up + 0.62 * size),
            (x + 0.08 * size, up + 0.5 * size),
            (x - 0.08 * size, up + 0.5 * size),
        ],
        (140, 84, 56),
    )
    frame.disc(x, up, 0.45 * size, color)
    frame.polygon(
        [
            (x - 0.15 * size, up - 0.42 * size),
            (x + 0.15 * size, up - 0.42 * size),
            (x + 0.15 * size, up + 0.42 * size),
            (x - 0.15 * size, up + 0.42 * size),
        ],
        (250, 244, 230),
        False,
    )


class Scene(NamedTuple):
    """One clip and its caption."""

    frames: np.ndarray
    """(F, side, side, 3) bytes, RGB."""
    caption: str


def draw(seed: int, number: int, side: int, frames: int) -> Scene:
    """Clip `number` of `seed`. side: pixels; frames: any number."""
    numbers = Numbers(f"outpainting {seed} {number}")
    name = numbers.pick(SETTINGS)
    world = _World(SETTINGS[name], numbers)
    things = ", ".join(f"{paint} {kind}" for kind, paint, *_ in world.things)
    pictures = [world.frame(side, index) for index in range(frames)]
    return Scene(np.stack(pictures), f"{name}, {things}")


class _World:
    """Everything that a camera sees, in units; the camera moves `pan` units a frame to the right."""

    def __init__(self, setting: Setting, numbers: Numbers) -> None:
        self.setting = setting
        self.pan = numbers.between(1.0, 2.5) * numbers.pick((-1, 1))
        self.horizon = numbers.between(40, 62)
        self.sun = (numbers.between(8, 88), numbers.between(10, 26), numbers.between(6, 11))
        self.hill = (numbers.between(30, 60), numbers.between(0, 6.28), numbers.between(4, 12))
        self.period, self.phase = numbers.between(18, 30), numbers.between(0, 30)
        self.things: list[tuple[str, str, float, float, float]] = []
        for place in range(2):
            kind, paint = numbers.pick(setting.things), numbers.pick(PAINTS)
            x = 14 + 46 * place + numbers.between(-12, 12)
            self.things.append((kind, paint, x, self.horizon + numbers.between(4, 14), numbers.between(32, 52)))

    def frame(self, side: int, index: int) -> np.ndarray:
        """(side, side, 3) bytes of frame `index`."""
        frame, moved = _Frame(side), self.pan * index
        self._sky(frame)
        x, y, radius = self.sun
        frame.disc(x - 0.1 * moved, y, radius, (255, 226, 120))
        self._hills(frame, 0.5 * moved)
        self._ground(frame, moved)
        for kind, paint, at, foot, size in self.things:
            THINGS[kind](frame, at - moved, foot, size, PAINTS[paint])
        return frame.image

    def _sky(self, frame: _Frame) -> None:
        top, bottom = (np.array(color, np.float32) for color in self.setting.sky)
        rows = np.linspace(0, 1, len(frame.image), dtype=np.float32)[:, None, None] * SIDE_OF_UNITS / self.horizon
        frame.image[:] = (top + (bottom - top) * rows.clip(0, 1)).round().astype(np.uint8)

    def _hills(self, frame: _Frame, moved: float) -> None:
        length, phase, height = self.hill
        along = np.arange(-4, SIDE_OF_UNITS + 5, 2.0)
        tops = self.horizon - height * (1 + np.sin((along + moved) * 6.283 / length + phase)) / 1.5
        outline = [(-4.0, 99.0), *zip(along.tolist(), tops.tolist(), strict=True), (100.0, 99.0)]
        frame.polygon(outline, self.setting.hills)

    def _ground(self, frame: _Frame, moved: float) -> None:
        """Ground with a fence of bars, or with rows of waves."""
        setting, base = self.setting, self.horizon
        frame.polygon([(-4, base), (100, base), (100, 110), (-4, 110)], setting.ground)
        first = -((moved + self.phase) % self.period) - self.period
        for bar in np.arange(first, SIDE_OF_UNITS + self.period, self.period).tolist():
            if setting.waves:
                for row, down in enumerate((14, 30, 46)):
                    x = bar + (row % 2) * self.period / 2
                    y, half = base + down, 0.3 * self.period
                    frame.polygon([(x - half, y), (x, y - 6), (x + half, y), (x, y - 1.5)], setting.pattern, False)
            else:
                x, top, low = bar, base + 17, base + 33
                frame.polygon([(x - 4, low), (x - 4, top), (x, top - 5), (x + 4, top), (x + 4, low)], setting.pattern)
        if not setting.waves:
            for y in (base + 21, base + 28):
                frame.polygon([(-4, y), (100, y), (100, y + 3.5), (-4, y + 3.5)], setting.pattern, False)
