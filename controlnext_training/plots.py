"""Pictures of a run: the loss curve, and grids of validation pictures.

PIL draws both; the curve uses matplotlib where that is installed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .figure import as_picture, curve_figure

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

BACKGROUND, INK, FAINT = (255, 255, 255), (40, 40, 40), (225, 225, 225)
RAW, SMOOTH, VALIDATION = (176, 205, 236), (31, 94, 170), (214, 92, 20)
BARE = (110, 130, 60)
NAMED_FROM = 300  # smallest height in pixels at which there is room for a title and names of axes
FINER = 3  # lines are drawn this many times larger and shrunk: PIL's own are jagged
SMOOTHING = 0.03  # share of the points over which the smoothed line averages
MAX_POINTS = 4000  # more cannot be seen, and a long run draws its curve often

Point = tuple[float, float]
Line = tuple[str, list[Point], tuple[int, int, int]]
"""Line of a chart: name, points and colour."""


class Names(NamedTuple):
    """Title of a curve, and names of its axes with their units."""

    title: str
    x: str
    y: str


NAMES = Names("Training loss", "step of the optimizer", "weighted mean squared error (no unit)")
MEAN, SMOOTHED = "mean of the steps since the last line", "smoothed mean"
BRIEF = ("mean", "smoothed", "validation", "without control")
WITH, WITHOUT = "validation with the control", "validation without it"


@dataclass(frozen=True, slots=True)
class Cell:
    """Cell of a grid: one picture with its texts."""

    picture: Tensor
    """Picture (H, W, 3) in [0, 1]."""
    caption: str = ""
    metric: str = ""
    """Metric as text, printed under the caption."""


def loss_curve(
    steps: Sequence[float],
    losses: Sequence[float],
    validation: Sequence[tuple[float, float]] = (),
    size: tuple[int, int] = (960, 540),
    without: Sequence[tuple[float, float]] = (),
) -> Image:
    """Draw the losses, their smoothed line and the validation losses (step, loss) over the steps.

    size: (width, height); validation, without: losses with the control and without it, over the same samples and noise.
    NaN and infinite losses are left out; outliers beyond the frame are clipped, so that the rest stays visible.
    """
    every = max(1, math.ceil(len(steps) / MAX_POINTS))
    raw = _finite(list(zip(steps, losses, strict=True)))
    smooth, checked = _smoothed(raw)[::every], _finite(validation)
    raw = raw[::every]
    bare = _finite(without)
    small = size[1] < NAMED_FROM
    mean, smoothed, validated, without_it = BRIEF if small else (MEAN, SMOOTHED, WITH, WITHOUT)
    lines: tuple[Line, ...] = (
        (mean, raw, RAW),
        (smoothed, smooth, SMOOTH),
        (validated, checked, VALIDATION),
        (without_it, bare, BARE),
    )
    ends = _range([y for _, points, _ in lines[1:] for _, y in points], [y for _, y in raw])
    thick, dotted = (smoothed,), (validated, without_it)
    if not small and any(points for _, points, _ in lines):
        try:
            return as_picture(curve_figure(lines, ends, size, thick, dotted, NAMES))
        except ImportError:
            return _chart(lines, ends, size, thick, dotted, NAMES)
    return _chart(lines, ends, size, thick, dotted, None if small else NAMES)


def _chart(
    lines: Sequence[Line],
    ends: Point,
    size: tuple[int, int],
    thick: Sequence[str],
    dotted: Sequence[str],
    names: Names | None = None,
) -> Image:
    """Draw a chart. ends: lowest and highest value of the frame; thick, dotted: names of such lines; names:

    None without.
    """
    from PIL import Image, ImageDraw

    font, (low, high) = font_of(max(10, size[1] // 30)), ends
    first, last = _ends([x for _, points, _ in lines for x, _ in points])
    y_ticks, x_ticks = _ticks(low, high, 5), [x for x in _ticks(first, last, 8) if x == round(x)]
    left = 14 + round(max(font.getlength(_number(y)) for y in y_ticks))
    right = size[0] - 6 - round(max(12.0, font.getlength(_number(x_ticks[-1] if x_ticks else 0.0)) / 2))
    legend = _legend(lines, font, left, right)
    rows = 1 + max((row for _, row, _, _ in legend), default=0)
    title = 1.5 if names else 0.0  # lines of text
    top, bottom = round(font.size * (0.6 + title + 1.6 * rows)), size[1] - round(font.size * (2.2 + 0.8 * title))
    box = (left, top, right, bottom)

    def place(point: Point) -> Point:
        x = box[0] + (point[0] - first) / (last - first) * (box[2] - box[0])
        y = box[3] - (min(max(point[1], low), high) - low) / (high - low) * (box[3] - box[1])
        return FINER * x, FINER * y

    image = Image.new("RGB", (FINER * size[0], FINER * size[1]), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for tick in y_ticks:
        top = FINER * round(place((first, tick))[1] / FINER)
        draw.rectangle((FINER * box[0], top, FINER * box[2], top + FINER - 1), FAINT)
    for name, points, color in lines:
        _line(draw, [place(p) for p in points], color, FINER * (2 if name in thick else 1))
    for name, points, color in lines:
        for x, y in map(place, points) if name in dotted else ():
            draw.ellipse((x - 4 * FINER, y - 4 * FINER, x + 4 * FINER, y + 4 * FINER), color)
    image = image.resize(size, Image.Resampling.BOX)

    draw = ImageDraw.Draw(image)
    draw.line([(box[0], box[1]), (box[0], box[3]), (box[2], box[3])], INK)
    for tick in y_ticks:
        draw.text((box[0] - 5, place((first, tick))[1] / FINER), _number(tick), INK, font, anchor="rm")
    for tick in x_ticks:
        draw.text((place((tick, low))[0] / FINER, box[3] + 4), _number(tick), INK, font, anchor="ma")
    if names:
        draw.text((left, font.size * 0.4), f"{names.title}: {names.y}", INK, font, anchor="la")
        draw.text(((box[0] + box[2]) / 2, size[1] - 3), names.x, INK, font, anchor="md")
    for x, row, text, key in legend:
        middle = font.size * (1.05 + title + 1.6 * row)
        if key is not None:
            draw.rectangle((x, middle - font.size * 0.15, x + font.size, middle + font.size * 0.15), key)
        draw.text((x + font.size * 1.4 if key else x, middle), text, INK, font, anchor="lm")
    return image


def picture_grid(rows: Sequence[Sequence[Cell]], side: int = 256) -> Image:
    """Grid of pictures in rows, each fitted into a square of `side` pixels, with its caption and
    its metric underneath.
    """
    from PIL import Image, ImageDraw

    if not rows or not any(rows):
        raise ValueError("rows: a grid needs at least one picture.")
    font = font_of(max(10, side // 18))
    gap, line = max(4, side // 32), round(font.size * 1.35)
    texts = [[_texts(cell, font, side) for cell in row] for row in rows]
    heights = [side + gap + line * max((len(lines) for lines in row), default=0) for row in texts]
    grid = Image.new("RGB", (gap + (side + gap) * max(map(len, rows)), gap + sum(heights)), BACKGROUND)
    draw = ImageDraw.Draw(grid)
    top = gap
    for row, lines_of_row, height in zip(rows, texts, heights, strict=True):
        for column, (cell, lines) in enumerate(zip(row, lines_of_row, strict=True)):
            left = gap + column * (side + gap)
            picture = _fitted(cell.picture, side)
            grid.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
            for i, (text, color) in enumerate(lines):
                draw.text((left, top + side + 1 + i * line), text, color, font)
        top += height
    return grid


def _texts(cell: Cell, font: FreeTypeFont, width: int) -> list[tuple[str, tuple[int, int, int]]]:
    """Lines of text under a picture."""
    caption = [(text, INK) for text in wrapped(cell.caption, font, width, 3)]
    return caption + [(text, SMOOTH) for text in wrapped(cell.metric, font, width, 2)]


def _fitted(picture: Tensor, side: int) -> Image:
    """Picture of PIL from (H, W, 3), with a longer side of `side` pixels."""
    from PIL import Image

    values = torch.nan_to_num(picture.detach().float().cpu(), nan=0.0).clamp(0, 1)
    image = Image.fromarray((values * 255).round().to(torch.uint8).numpy())
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


def wrapped(text: str, font: FreeTypeFont, width: int, most: int) -> list[str]:
    """Wrap the text to at most `most` lines of `width` pixels, with an ellipsis where it is cut."""
    lines: list[str] = []
    words = text.split()
    while words:
        count = len(words)
        last = len(lines) == most - 1
        while count > 1 and font.getlength(" ".join(words[:count])) > width:
            count -= 1
        line, words = " ".join(words[:count]), words[count:]
        if (last and words) or font.getlength(line) > width:
            while line and font.getlength(line + "...") > width:
                line = line[:-1]
            line = line.rstrip() + "..."
        lines.append(line)
        if last:
            break
    return lines


def font_of(size: int) -> FreeTypeFont:
    from PIL import ImageFont

    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "with a size PIL gives its own outline font"
    return font


def _line(draw: Any, points: list[Point], color: tuple[int, int, int], width: int) -> None:
    """Draw a line through the points; a dot for a single point."""
    if len(points) == 1:
        ((x, y),) = points
        draw.ellipse((x - 2 * width, y - 2 * width, x + 2 * width, y + 2 * width), color)
    elif points:
        draw.line(points, color, width, joint="curve")


def _legend(
    lines: Sequence[Line], font: FreeTypeFont, left: float, right: float
) -> list[tuple[float, int, str, tuple[int, int, int] | None]]:
    """Entries (left, row, text, colour) with the lines' names and last values, in rows that end at `right`."""
    found: list[tuple[float, int, str, tuple[int, int, int] | None]] = []
    x, row = left, 0
    for name, points, color in lines:
        if points:
            text = f"{name} {points[-1][1]:.4g}"
            width = font.getlength(text) + font.size * 1.4
            if x > left and x + width > right:
                x, row = left, row + 1
            found.append((x, row, text, color))
            x += width + font.size * 1.5
    return found or [(left, 0, "no losses yet", None)]


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _smoothed(points: list[Point]) -> list[Point]:
    """Exponential average of the values so far, with bias correction at the start."""
    keep = 1 - 1 / max(1.0, SMOOTHING * len(points))
    total = weight = 0.0
    averaged = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        averaged.append((x, total / weight))
    return averaged


def _range(wanted: list[float], raw: list[float]) -> Point:
    """Lowest and highest value of the frame: all of `wanted`, and the raw values without outliers."""
    ordered = sorted(raw)
    cut = len(ordered) // 50
    values = wanted + ordered[cut : len(ordered) - cut]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    below = max(low - room, 0.0) if low >= 0 else low - room
    return below, high + room


def _ends(values: list[float]) -> Point:
    """First and last step of the frame, never equal."""
    first, last = (min(values), max(values)) if values else (0.0, 1.0)
    return (first, last) if last > first else (first - 0.5, first + 0.5)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Ticks: about `count` round numbers from low to high, 1, 2 or 5 times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= count)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    """Shortest text for a tick: 0.05, 250, 12k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.6g}"
