"""Figures of the demo's pictures against the scenes of their hints: edges, strokes, depth, mask and colours.

Depth and mask are read from a picture by a small network (demo_weights/reader.py).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..controlnext_core.fidelity import boundary_f1, edge_f1
from ..controlnext_core.opencv import require_opencv
from ..controlnext_core.picturebook import COLORS, THINGS, Picture
from ..controlnext_training.drawn import SCHEMES
from . import demo_sheet
from .demo_boards import SCENE_SEED, Board, Column, draw_hint

if TYPE_CHECKING:
    from .comfy_client import ComfyClient
    from .demo_weights.reader import Reader

SAME_COLOR, FEWEST = 8, 40
"""Largest difference of a value from a plain colour, and the fewest pixels that are looked at."""
STROKE, DARKER = 9, 0.25
"""Pixels across the disc in which a stroke is darker than what lies around it, and by how much of white."""


@dataclass(frozen=True)
class Figures:
    """Figures of one picture."""

    f1: float
    """F1 of its edges against the drawn outlines, within 2 pixels."""
    strokes: float
    """F1 of its dark strokes against the drawn outlines, within 1 pixel."""
    depth: float
    """Rank correlation of its depth with the drawn one."""
    mask: float
    """Intersection over union of its mask with the drawn one."""
    colors: tuple[int, int]
    """Number of things in the colour that the caption names, and of those that were looked at."""
    picture: np.ndarray
    """Picture (H, W, 3) of bytes."""


def figures_of(reader: Reader, picture: np.ndarray, scene: Picture) -> Figures:
    """Measure a picture (H, W, 3) of bytes."""
    from .demo_weights.reader import agreement

    outlines = scene.edges.astype(np.float32) / 255
    f1 = edge_f1(picture.astype(np.float32) / 255, outlines)
    strokes = boundary_f1(strokes_of(picture), outlines, 1.0)
    return Figures(f1, strokes, *agreement(reader, picture, scene), right_colors(picture, scene), picture)


def strokes_of(picture: np.ndarray) -> np.ndarray:
    """Dark strokes (H, W) of a picture (H, W, 3) of bytes, True or False.

    They are narrow places where the brightest channel is lower than its morphological closing (black top-hat). Edge
    detectors find both sides of a stroke, which no outline matches within 1 pixel. Source: Serra, Image Analysis and
    Mathematical Morphology, 1982.
    """
    cv2 = require_opencv()

    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (STROKE, STROKE))
    return cv2.morphologyEx(picture.max(axis=2), cv2.MORPH_BLACKHAT, disc) >= 255 * DARKER


def right_colors(found: np.ndarray, scene: Picture) -> tuple[int, int]:
    """Number of things whose colour, of all named ones, is nearest to the caption's, and of those that were looked at.

    The median of a picture is compared where the scene has the plain colour of the thing.
    """
    right = of = 0
    for name in re.findall(rf"\b({'|'.join(COLORS)}) (?:{'|'.join(THINGS)})\b", scene.caption):
        plain = np.abs(scene.image.astype(float) - COLORS[name]).max(2) < SAME_COLOR
        if plain.sum() >= FEWEST:
            median = np.median(found[plain], axis=0)
            of += 1
            right += min(COLORS, key=lambda other: np.linalg.norm(median - COLORS[other])) == name
    return right, of


def measured(
    client: ComfyClient, board: Board, numbers: Sequence[int], columns: tuple[Column, ...]
) -> dict[Column, list[Figures]]:
    """Draw the scenes of these numbers with every column on a running server, and measure the pictures."""
    from PIL import Image

    from .demo_weights.reader import trained_reader

    reader = trained_reader()
    found: dict[Column, list[Figures]] = {column: [] for column in columns}
    for row, number in enumerate(numbers):  # a workflow each, far from its time limit
        scene = SCHEMES[board.scheme](SCENE_SEED, number, board.side)
        cells = demo_sheet.draw_cells(client, board, {row: draw_hint(board, number)}, columns)
        for place, column in enumerate(columns):
            picture = np.asarray(Image.open(io.BytesIO(cells[row, place])).convert("RGB"))
            found[column].append(figures_of(reader, picture, scene))
    return found


def encoded_and_decoded(client: ComfyClient, checkpoint: str, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Pictures (H, W, 3) of bytes, encoded and decoded by the autoencoder of a checkpoint on a running server."""
    from PIL import Image

    graph = demo_sheet.GraphBuilder()
    base = graph.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    names = []
    for number, picture in enumerate(pictures):
        name = f"encoded_{number}.png"
        client.upload_image(demo_sheet.png(picture), name)
        latent = graph.add("VAEEncode", pixels=[graph.add("LoadImage", image=name), 0], vae=[base, 2])
        pixels = graph.add("VAEDecode", samples=[latent, 0], vae=[base, 2])
        names.append(graph.add("SaveImage", images=[pixels, 0], filename_prefix="sheet/encoded"))
    outputs = client.run(graph.nodes).outputs
    found = [client.image(outputs[name]["images"][0]) for name in names]
    return [np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content in found]


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def share_of_colors(found: Iterable[Figures]) -> float:
    """Share of the things in the colours that their captions name."""
    counts = [figures.colors for figures in found]
    return sum(right for right, _ in counts) / max(1, sum(of for _, of in counts))
