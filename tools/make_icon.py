"""Write the pack's icon and banner, drawn by the project itself: `python tools/make_icon.py`

They show a scene of the picture book: left of a slanted line the outlines given to a control, right of it the picture
that follows them. Sizes are those of the registry: a square icon of at most 400 pixels, a banner of 21:9.
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.controlnext_core.picturebook import draw  # noqa: E402

FOLDER = Path(__file__).resolve().parents[1] / "docs"
PAPER, INK, LINE = (30, 32, 48), (236, 239, 255), (255, 255, 255)
"""Colours of the background of the outlines, of the outlines, and of the slanted line."""
SLANT, THICK = 0.32, 0.012
"""Slope of the line and its thickness, in units of the picture's height."""
COLORS = 128


@dataclass(frozen=True)
class Sheet:
    """Layout of one file. series, scene: of the picture book; middle: position of the line, in units of the width."""

    name: str
    height: int
    width: int
    series: int
    scene: int
    middle: float


SHEETS = (Sheet("icon.png", 256, 256, 2, 1, 0.5), Sheet("banner.png", 540, 1260, 1, 6, 0.29))


def drawn(sheet: Sheet) -> Any:
    """Draw a sheet, (H, W, 3) uint8: outlines left of the line, the picture right of it."""
    picture = draw(sheet.series, sheet.scene, (sheet.height, sheet.width))
    edges = picture.edges[..., None].astype(np.float32) / 255
    outlines = (np.array(PAPER) * (1 - edges) + np.array(INK) * edges).astype(np.uint8)
    y, x = np.mgrid[: sheet.height, : sheet.width]
    side = x - sheet.middle * sheet.width + SLANT * (y - sheet.height / 2)
    found = np.where((side < 0)[..., None], outlines, picture.image)
    found[np.abs(side) < THICK * sheet.height] = LINE
    return found


def write(folder: Path = FOLDER) -> list[Path]:
    """Write both files as PNGs with a small palette; returns their paths."""
    from PIL import Image

    paths = []
    for sheet in SHEETS:
        paths.append(folder / sheet.name)
        Image.fromarray(drawn(sheet)).quantize(COLORS, dither=Image.Dither.NONE).save(paths[-1], optimize=True)
    return paths


if __name__ == "__main__":
    for path in write(*map(Path, sys.argv[1:2])):
        print(f"{path}: {path.stat().st_size:,} bytes")
