"""Canvas with colours, outlines, mask and depth of one picture; later things stand in front of earlier ones."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..opencv import require_opencv
from .colors import INK, Color

Array = np.ndarray[Any, np.dtype[Any]]
Points = Array
"""Points (N, 2), x to the right and y down, in units of the picture's shorter side."""

SHIFT = 5  # bits after the point of cv2's coordinates
LINE, FINE = 0.0125, 0.008  # widths of outlines and of lines inside a thing, in units of the shorter side
HINT_LINE = 0.0075


class Numbers:
    """Random numbers that depend only on a text, the same on every system."""

    def __init__(self, text: str) -> None:
        self._random = random.Random(text).random  # noqa: S311 - pictures, not secrets

    def next(self) -> float:
        """Next random number in [0, 1)."""
        return self._random()

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.next()

    def pick(self, choices: Iterable[Any]) -> Any:
        """Pick one of the choices at random."""
        choices = list(choices)
        return choices[int(self.next() * len(choices))]


class Canvas:
    """Planes of one picture (colours, edges, mask, depth); drawing is antialiased."""

    def __init__(self, height: int, width: int) -> None:
        self.side = min(height, width)
        self.height, self.width = height / self.side, width / self.side
        self.image = np.zeros((height, width, 3), np.uint8)
        self.edges = np.zeros((height, width), np.uint8)
        self.mask = np.zeros((height, width), np.uint8)
        self.depth = np.zeros((height, width), np.uint8)
        self.people: list[Points] = []
        """Body points (18, 2) of each person, in units of the shorter side."""
        self.near = 0
        """Depth of the things drawn next; bright is near."""
        self.is_thing = False
        """True: things drawn next belong to the mask. False: they do not."""

    def vertical(self, top: float, bottom: float, colors: tuple[Color, Color], depths: tuple[int, int]) -> None:
        """Fill the rows between `top` and `bottom` with a gradient of colour and depth."""
        first, last = round(top * self.side), min(round(bottom * self.side), len(self.image))
        if first >= last:
            return
        share = np.linspace(0, 1, last - first)[:, None]
        ends = np.asarray(colors, np.float64)
        self.image[first:last] = (ends[0] + (ends[1] - ends[0]) * share).round()[:, None]
        self.depth[first:last] = (depths[0] + (depths[1] - depths[0]) * share).round()
        self.edges[first:last] = 0
        self.mask[first:last] = 0

    def shape(self, points: Points, color: Color, line: float = LINE, shade: Color | None = None) -> None:
        """Draw a filled polygon with its outline. line: width, 0 for none. shade: colour of the side away from the
        light.
        """
        cv2 = require_opencv()

        fixed = self._fixed(points)
        cv2.fillPoly(self.image, [fixed], color, cv2.LINE_AA, SHIFT)
        if shade is not None:
            self._shadow(points, shade)
        cv2.fillPoly(self.depth, [fixed], self.near, cv2.LINE_AA, SHIFT)
        cv2.fillPoly(self.mask, [fixed], 255 * self.is_thing, cv2.LINE_AA, SHIFT)
        cv2.fillPoly(self.edges, [fixed], 0, cv2.LINE_AA, SHIFT)
        if line:
            self._stroke(fixed, True, INK, line)

    def line(self, points: Points, width: float = FINE, color: Color = INK, is_edge: bool = True) -> None:
        """Draw an open line. is_edge: True adds it to the outlines; False leaves it out."""
        self._stroke(self._fixed(points), False, color, width, is_edge)

    def _stroke(self, fixed: Array, closed: bool, color: Color, width: float, is_edge: bool = True) -> None:
        cv2 = require_opencv()

        thick = max(round(width * self.side), 1)
        cv2.polylines(self.image, [fixed], closed, color, thick, cv2.LINE_AA, SHIFT)
        if is_edge:
            hint = max(round(min(width, HINT_LINE) * self.side), 1)
            cv2.polylines(self.edges, [fixed], closed, 255, hint, cv2.LINE_AA, SHIFT)

    def _shadow(self, points: Points, color: Color) -> None:
        """Paint the part of the polygon that is not covered when it is moved towards the light, up and to the left."""
        cv2 = require_opencv()

        low, high = points.min(0), points.max(0)
        corner = np.maximum(np.floor(low * self.side).astype(int) - 1, 0)
        end = np.minimum(np.ceil(high * self.side).astype(int) + 2, self.image.shape[1::-1])
        if (end <= corner).any():
            return
        moved = np.asarray([-0.16, -0.05]) * (high - low)
        size = (end - corner)[::-1]
        cover, light = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        for plane, shift in ((cover, 0.0), (light, moved)):
            fixed = self._fixed(points + shift - corner / self.side)
            cv2.fillPoly(plane, [fixed], 255, cv2.LINE_AA, SHIFT)
        share = cv2.subtract(cover, light)[..., None].astype(np.float32) / 255
        part = self.image[corner[1] : end[1], corner[0] : end[0]]
        part[...] = (part + (np.asarray(color, np.float32) - part) * share).round()

    def _fixed(self, points: Points) -> Array:
        return np.round((np.asarray(points) * self.side - 0.5) * (1 << SHIFT)).astype(np.int32)[:, None]


def polygon(*points: Sequence[float]) -> Points:
    return np.asarray(points, np.float64)


def smooth(points: Points, closed: bool = True, rounds: int = 3) -> Points:
    """Curve that follows the points, by cutting corners `rounds` times (Chaikin 1974)."""
    for _ in range(rounds):
        following = np.roll(points, -1, axis=0) if closed else points[1:]
        current = points if closed else points[:-1]
        cut = np.stack([0.75 * current + 0.25 * following, 0.25 * current + 0.75 * following], axis=1).reshape(-1, 2)
        points = cut if closed else np.concatenate([points[:1], cut, points[-1:]])
    return points


def ellipse(x: float, y: float, width: float, height: float, start: float = 0.0, stop: float = 1.0) -> Points:
    """Points of an ellipse of half-axes `width` and `height`; start, stop: turns, 0 is to the right, 0.25 is down."""
    angle = 2 * math.pi * np.linspace(start, stop, 33 if stop - start > 0.6 else 17)
    return np.stack([x + width * np.cos(angle), y + height * np.sin(angle)], axis=1)


def box(left: float, top: float, right: float, bottom: float) -> Points:
    return polygon((left, top), (right, top), (right, bottom), (left, bottom))


def lobes(x: float, y: float, width: float, height: float, count: int, depth: float, turn: float = 0.0) -> Points:
    """Outline of a cloud or of a crown of leaves: an ellipse with `count` bulges."""
    angle = 2 * math.pi * np.linspace(0, 1, 12 * count, endpoint=False)
    reach = 1 - depth + depth * np.abs(np.sin((angle + turn) * count / 2)) ** 0.7
    return np.stack([x + width * reach * np.cos(angle), y + height * reach * np.sin(angle)], axis=1)


def ribbon(points: Points, half: float) -> Points:
    """Outline of an open line that is 2 * half wide, with a round end."""
    along = np.gradient(points, axis=0)
    along = along / np.linalg.norm(along, axis=1, keepdims=True)
    across = along[:, ::-1] * (half, -half)
    angle = np.linspace(0, math.pi, 9)[1:-1, None]
    end = points[-1] + across[-1] * np.cos(angle) + along[-1] * half * np.sin(angle)
    return np.concatenate([points + across, end, (points - across)[::-1]])
