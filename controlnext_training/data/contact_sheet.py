"""Contact sheet of a dataset: pictures with their hints beside them, names and captions underneath."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..plots import BACKGROUND, INK, SMOOTH, font_of, wrapped
from .dataset import FileDataset
from .samples import BrokenSample, ControlDataset

if TYPE_CHECKING:
    from PIL.Image import Image

GAP = 12
TEXT = 14
"""Height of letters and gap between pairs, in pixels."""
LINES = 2
"""Largest number of lines of a caption; longer ones are cut."""


@dataclass(frozen=True)
class Pair:
    """Picture with its hint, its name and its caption."""

    picture: Image
    hint: Image
    name: str
    caption: str

    @property
    def aspect(self) -> float:
        """Aspect ratio, width / height, of the picture and its hint side by side."""
        return 2 * self.picture.width / self.picture.height


def contact_sheet(dataset: ControlDataset, count: int = 12, width: int = 1200, height: int = 220) -> Image:
    """Draw `count` samples, evenly spread over the set, in rows that are filled from edge to edge.

    width: of the sheet in pixels; height: approximate height of a picture, adjusted so that each row is full. A sample
    that can no longer be read is left out.
    """
    from PIL import Image, ImageDraw

    count = min(count, len(dataset))
    pairs = [pair for number in range(count) if (pair := _pair(dataset, number * len(dataset) // count))]
    rows = _rows(pairs, width - 2 * GAP, height)
    font, line = font_of(TEXT), round(1.35 * TEXT)
    words = (1 + LINES) * line + GAP
    sheet = Image.new("RGB", (width, GAP + sum(high + words for _, high in rows) or GAP), BACKGROUND)
    draw, top = ImageDraw.Draw(sheet), GAP
    for row, high in rows:
        left = GAP
        for pair in row:
            wide = round(high * pair.aspect / 2)
            for half, picture in enumerate((pair.picture, pair.hint)):
                sheet.paste(picture.resize((wide, high), Image.Resampling.LANCZOS), (left + half * wide, top))
            texts = [*wrapped(pair.name, font, 2 * wide, 1), *wrapped(pair.caption, font, 2 * wide, LINES)]
            for number, text in enumerate(texts):
                color = SMOOTH if number == 0 else INK
                draw.text((left, top + high + 3 + number * line), text, color, font)
            left += 2 * wide + GAP
        top += high + words
    return sheet


def _rows(pairs: Sequence[Pair], width: int, height: int) -> list[tuple[list[Pair], int]]:
    """(pairs, height) of each row: pairs are added until the row is full at `height`, which then shrinks to fit."""
    rows: list[tuple[list[Pair], int]] = []
    row: list[Pair] = []
    for pair in pairs:
        row = [*row, pair]
        fits = _height(row, width)
        if fits <= height:
            rows.append((row, fits))
            row = []
    return [*rows, (row, min(height, _height(row, width)))] if row else rows


def _height(row: Sequence[Pair], width: int) -> int:
    """Height at which the pairs of a row and the gaps between them have the width of the sheet."""
    return max(1, int((width - GAP * (len(row) - 1)) / sum(pair.aspect for pair in row)))


def _pair(dataset: ControlDataset, index: int) -> Pair | None:
    try:
        sample = dataset.load(index)
    except BrokenSample:
        return None
    picture, hint = (_as_picture(frames[len(frames) // 2]) for frames in (sample.frames, sample.hints))
    return Pair(picture, hint, _name(dataset, index), sample.caption)


def _name(dataset: ControlDataset, index: int) -> str:
    """Name of the sample's file with its folder, or its index."""
    if isinstance(dataset, FileDataset):
        return "/".join(PurePath(dataset.items[index].clip.images.label).parts[-2:])
    return f"sample {index}"


def _as_picture(frame: torch.Tensor) -> Any:
    """Picture of PIL from (H, W, 3) in [0, 1]."""
    from PIL import Image

    return Image.fromarray(np.rint(frame.numpy() * 255).astype(np.uint8))
