"""Synthetic pictures: coloured shapes with a caption and exact hints, for trying a training run.

A scene is a function of (seed, index, size) and the same on every system: its numbers come from a hash, and the
drawing uses only operations that IEEE 754 rounds in one way. Positions are in pixels, x to the right, y down.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..controlnext_core.picturebook import Picture

# H W height and width of the picture
Array = np.ndarray[Any, np.dtype[Any]]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 45, 45),
    "orange": (240, 140, 40),
    "yellow": (242, 214, 60),
    "green": (60, 160, 75),
    "blue": (50, 95, 210),
    "purple": (135, 70, 175),
    "pink": (242, 150, 190),
    "brown": (130, 85, 50),
    "gray": (130, 130, 130),
    "white": (240, 240, 240),
    "black": (30, 30, 30),
}
KINDS = ("circle", "square", "triangle")
RADII = (0.12, 0.3)  # of the shorter side
LARGEST_COUNT = 3
OVERLAP = 0.85  # least distance of centres, as a share of the sum of two radii, so that every shape can be recognised
TEXTURE = 10.0  # largest deviation of a background from its colour, in steps of 255
SHADING = 0.18  # share of its brightness that a shape loses towards its rim


@dataclass(frozen=True, slots=True)
class _Shape:
    kind: str
    color: str
    center: tuple[float, float]
    radius: float
    turn: tuple[float, float]
    """Cosine and sine of the rotation."""


class _Numbers:
    """Random numbers in [0, 1) that depend only on a text and their index."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0

    def many(self, count: int) -> list[float]:
        return [self.next() for _ in range(count)]

    def next(self) -> float:
        digest = hashlib.blake2b(f"{self.text}/{self.place}".encode(), digest_size=8).digest()
        self.place += 1
        return (int.from_bytes(digest, "little") >> 11) / 2.0**53

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.next()

    def pick(self, names: list[str]) -> str:
        """Take one out of `names`."""
        return names.pop(int(self.next() * len(names)))


def draw(seed: int, index: int, size: int | tuple[int, int]) -> Picture:
    """Draw the scene of an index; size: the side of a square, or (H, W), in pixels."""
    height, width = (size, size) if isinstance(size, int) else size
    numbers = _Numbers(f"shapes/{seed}/{index}")
    colors = list(COLORS)
    background = numbers.pick(colors)
    shapes = _place(numbers, colors, height, width)

    y, x = (np.mgrid[0:height, 0:width] + 0.5).astype(np.float64)
    image = np.asarray(COLORS[background], np.float64) + _texture(numbers, height, width)[..., None]
    edges, mask = np.zeros((height, width)), np.zeros((height, width))
    depth = 0.05 + 0.3 * y / height
    line = max(1.5, min(height, width) / 200)
    for order, shape in enumerate(shapes):
        outside, inner = _distance(shape, x, y)
        cover = np.clip(0.5 - outside, 0.0, 1.0)
        bulge = 1 - np.square(1 - np.clip(-outside / inner, 0.0, 1.0))
        color = np.asarray(COLORS[shape.color], np.float64) * (1 - SHADING + SHADING * bulge)[..., None]
        image = image + (color - image) * cover[..., None]
        near = 0.45 + 0.4 * order / LARGEST_COUNT + 0.25 * bulge
        depth = depth + (near - depth) * cover
        edges = np.maximum(edges * (1 - cover), np.clip(line / 2 + 0.5 - np.abs(outside), 0.0, 1.0))
        mask = np.maximum(mask, cover)
    caption = f"{_and([f'{_article(s.color)} {s.kind}' for s in shapes])} on {_article(background)} background"
    return Picture(_bytes(image), _bytes(255 * edges), _bytes(255 * mask), _bytes(255 * depth), caption)


def write_folder(
    folder: str | Path, count: int, size: int | tuple[int, int], seed: int = 0, hint: str = "edges"
) -> Path:
    """Write scenes 0 to count - 1 as a folder to train from: images/00000.png with 00000.txt, hints/00000.png.

    Returns the folder. Raises ValueError for a hint that a picture does not have.
    """
    from PIL import Image

    folder = Path(folder)
    for index in range(count):
        scene = draw(seed, index, size)
        for name, picture in (("images", scene.image), ("hints", scene.hint(hint))):
            path = folder / name / f"{index:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
        (folder / "images" / f"{index:05d}.txt").write_text(scene.caption + "\n", "utf-8")
    return folder


def _place(numbers: _Numbers, colors: list[str], height: int, width: int) -> list[_Shape]:
    """Place one to LARGEST_COUNT shapes of different colours, farthest first; one without room is left out."""
    side = min(height, width)
    shapes: list[_Shape] = []
    for _ in range(1 + int(numbers.next() * LARGEST_COUNT)):
        kind, color = KINDS[int(numbers.next() * len(KINDS))], numbers.pick(colors)
        half = numbers.between(-1, 1)  # the tangent of half the angle: a rotation without sine and cosine
        turn = ((1 - half * half) / (1 + half * half), 2 * half / (1 + half * half))
        for _attempt in range(20):
            radius = side * numbers.between(*RADII)
            center = (numbers.between(radius, width - radius), numbers.between(radius, height - radius))
            if all(_apart(center, other.center) > OVERLAP * (radius + other.radius) for other in shapes):
                shapes.append(_Shape(kind, color, center, radius, turn))
                break
    return shapes


def _apart(a: tuple[float, float], b: tuple[float, float]) -> float:
    return float(np.sqrt((a[0] - b[0]) * (a[0] - b[0]) + (a[1] - b[1]) * (a[1] - b[1])))


def _distance(shape: _Shape, x: Array, y: Array) -> tuple[Array, float]:
    """Distance of every pixel from the outline (H, W), negative inside, and the radius of the largest circle inside.

    Corners are on the circle of `radius`, and beyond them the distance is that from the nearest side's line.
    """
    u, v = x - shape.center[0], y - shape.center[1]
    c, s = shape.turn
    u, v = c * u + s * v, c * v - s * u
    if shape.kind == "circle":
        inner = shape.radius * 0.9  # looks as large as the other shapes
        return np.sqrt(u * u + v * v) - inner, inner
    if shape.kind == "square":
        inner = shape.radius * float(np.sqrt(0.5))
        return np.maximum(np.abs(u), np.abs(v)) - inner, inner
    inner = shape.radius * 0.5
    return np.maximum(v, float(np.sqrt(0.75)) * np.abs(u) - 0.5 * v) - inner, inner


def _texture(numbers: _Numbers, height: int, width: int) -> Array:
    """Texture (H, W) in [-TEXTURE, TEXTURE]: none, a gradient, or soft spots."""
    kind = int(numbers.next() * 3)
    if kind == 0:
        return np.zeros((height, width))
    cells = 2 if kind == 1 else 5
    corners = 2 * np.asarray(numbers.many(cells * cells)).reshape(cells, cells) - 1
    rows, columns = _between(height, cells), _between(width, cells)
    total = np.zeros((height, width))
    for row in range(cells):
        for column in range(cells):  # one by one: the order in which a library sums differs between machines
            total = total + corners[row, column] * (rows[:, row, None] * columns[None, :, column])
    return TEXTURE * total


def _between(length: int, cells: int) -> Array:
    """Linear interpolation weights (length, cells) of `cells` evenly spaced points at each pixel."""
    place = (np.arange(length) + 0.5) / length * (cells - 1)
    return np.clip(1 - np.abs(place[:, None] - np.arange(cells)), 0.0, 1.0)


def _bytes(values: Array) -> Array:
    return np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _and(parts: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
