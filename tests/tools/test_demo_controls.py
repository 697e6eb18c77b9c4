"""The shipped weights through the real host and its server: pictures follow what was drawn, and not by chance.

The graph is the demo's own (stock loader, text encoder, sampler and decoder), on scenes that no training saw. F1 of
edges is that of the demo: 1 where the picture's edges are the drawn outlines, to two pixels; that of strokes is to one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
from comfyui_controlnext.controlnext_core.fidelity import boundary_f1, edge_f1
from comfyui_controlnext.controlnext_training.drawn import SCHEMES
from comfyui_controlnext.tools.demo_boards import BOOK, CHILDREN, PRINT, SCENE_SEED, UNET_BOOK, Board, Column
from comfyui_controlnext.tools.demo_figures import (
    encoded_and_decoded,
    figures_of,
    mean,
    measured,
    share_of_colors,
    strokes_of,
)
from comfyui_controlnext.tools.demo_weights import shipped
from comfyui_controlnext.tools.demo_weights.picture_style import STYLES
from comfyui_controlnext.tools.demo_weights.reader import agreement, trained_reader

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer

pytestmark = pytest.mark.comfy

NONE, NEXT, XS = Column("none"), Column("next", edges=1.0), Column("xs", xs=1.0)
HALF = Column("half", edges=0.5)
DEPTH, MASK, POSE = Column("depth", depth=1.0), Column("mask", mask=1.2), Column("pose", pose=1.0)
BOTH = Column("both", edges=0.6, depth=0.6)
STYLE, DUSK = Column("style", lora=1.0), Column("dusk", edges=1.0, lora=1.0)
FIRST = 100  # scene
MANY = [pytest.param(number, id=f"{number} hints", marks=pytest.mark.long) for number in (16, 64)]
COUNTS = [pytest.param(5, id="5 hints"), *MANY]


@dataclass(frozen=True)
class Drawn:
    """Means over the hints, by column."""

    f1: dict[Column, float]
    strokes: dict[Column, float]
    depth: dict[Column, float]
    mask: dict[Column, float]
    styled: dict[Column, float]
    """Share of the pictures whose colours are nearer to the scene in a style than to the scene itself."""
    colors: dict[Column, float]
    """Share of the things in the colours that their captions name."""


@pytest.fixture(scope="module")
def models(server: ComfyServer) -> None:
    shipped.install(server.base)


def drawn(server: ComfyServer, count: int, *columns: Column, board: Board = BOOK, style: str = "dusk") -> Drawn:
    numbers = range(FIRST, FIRST + count)
    scenes = [SCHEMES[board.scheme](SCENE_SEED, number, board.side).image for number in numbers]
    found = Drawn({}, {}, {}, {}, {}, {})
    for column, of_column in measured(server, board, numbers, columns).items():
        found.f1[column] = mean(figures.f1 for figures in of_column)
        found.strokes[column] = mean(figures.strokes for figures in of_column)
        found.depth[column] = mean(figures.depth for figures in of_column)
        found.mask[column] = mean(figures.mask for figures in of_column)
        found.styled[column] = mean(
            has_style(figures.picture, scene, style) for figures, scene in zip(of_column, scenes, strict=True)
        )
        found.colors[column] = share_of_colors(of_column)
    return found


def has_style(found: np.ndarray, scene: np.ndarray, style: str) -> float:
    """1 where a picture's mean colours in 8 rows are nearer to those of the scene in this style, 0 elsewhere."""
    painted = STYLES[style].paint(scene)
    of_found, of_scene, of_painted = (picture.reshape(8, -1, 3).mean(1) for picture in (found, scene, painted))
    return float(np.linalg.norm(of_found - of_painted) < np.linalg.norm(of_found - of_scene))


def round_trip(server: ComfyServer, count: int) -> tuple[float, float]:
    """Mean F1 of edges and of strokes of true pictures, encoded and decoded by the base of SD3's shape."""
    scenes = [SCHEMES[BOOK.scheme](SCENE_SEED, number, BOOK.side) for number in range(FIRST, FIRST + count)]
    pictures, reader = encoded_and_decoded(server, BOOK.checkpoint, [scene.image for scene in scenes]), trained_reader()
    found = [figures_of(reader, picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    return mean(figures.f1 for figures in found), mean(figures.strokes for figures in found)


@pytest.mark.parametrize("count", COUNTS)
def test_illustrations_of_the_unet_follow_their_outlines(server: ComfyServer, models: None, count: int) -> None:
    found = drawn(server, count, XS, board=UNET_BOOK)
    assert found.f1[XS] >= 0.88 and found.strokes[XS] >= 0.85, found
    assert found.mask[XS] >= 0.85 and found.depth[XS] >= 0.9, found
    assert found.colors[XS] >= 0.85, found


@pytest.mark.parametrize("count", MANY)
def test_illustrations_of_the_unet_without_control_are_others(server: ComfyServer, models: None, count: int) -> None:
    found = drawn(server, count, NONE, board=UNET_BOOK)
    assert found.f1[NONE] < 0.58 and found.strokes[NONE] < 0.33, found
    assert found.mask[NONE] < 0.75 and found.depth[NONE] < 0.9, found


@pytest.mark.parametrize("count", COUNTS)
def test_children_stand_as_their_poses_say(server: ComfyServer, models: None, count: int) -> None:
    found = drawn(server, count, NONE, POSE, board=CHILDREN).f1
    assert found[POSE] > found[NONE] + 0.05, found


@pytest.mark.parametrize("count", COUNTS)
def test_illustrations_follow_what_each_control_is_given(server: ComfyServer, models: None, count: int) -> None:
    drawings = drawn(server, count, NONE, HALF, NEXT, DEPTH, MASK, BOTH)
    assert drawings.colors[NEXT] >= 0.9, drawings
    assert drawings.strokes[NEXT] >= 0.8 > drawings.strokes[NONE] + 0.4, drawings
    found = drawings.f1
    assert found[NEXT] > found[HALF] > found[NONE], found
    assert found[NEXT] > found[NONE] + 0.2, found
    assert found[DEPTH] > found[NONE] + 0.1, found
    assert found[MASK] > found[NONE] + 0.05, found
    assert found[BOTH] > found[DEPTH], found
    assert drawings.depth[DEPTH] >= 0.9 > drawings.depth[NONE], drawings
    assert drawings.mask[MASK] >= 0.9 > drawings.mask[NONE] + 0.15, drawings
    assert drawings.mask[NEXT] >= 0.85, drawings
    assert drawings.depth[BOTH] >= 0.9 * drawings.depth[DEPTH], drawings
    assert found[BOTH] >= 0.9 * found[NEXT], found
    edges, strokes = round_trip(server, count)
    assert found[NEXT] >= 0.85 * edges and drawings.strokes[NEXT] >= 0.85 * strokes, (drawings, edges, strokes)


def test_the_reader_finds_depth_and_mask_of_true_pictures_and_not_of_others() -> None:
    reader = trained_reader()
    scenes = [SCHEMES["picturebook"](SCENE_SEED, FIRST + number, BOOK.side) for number in range(8)]
    true = [agreement(reader, scene.image, scene) for scene in scenes]
    other = [agreement(reader, scenes[number - 1].image, scene) for number, scene in enumerate(scenes)]
    assert min(depth for depth, _ in true) >= 0.87 and min(mask for _, mask in true) >= 0.88, true
    assert mean(depth for depth, _ in other) < 0.85 and mean(mask for _, mask in other) < 0.5, other


def test_strokes_of_true_pictures_are_the_drawn_outlines_to_a_pixel_and_those_of_others_are_not() -> None:
    scenes = [SCHEMES["picturebook"](SCENE_SEED, FIRST + number, BOOK.side) for number in range(8)]
    outlines = [scene.edges.astype(np.float32) / 255 for scene in scenes]
    strokes = [strokes_of(scene.image) for scene in scenes]
    assert all(found.dtype == bool and found.shape == (BOOK.side, BOOK.side) for found in strokes)
    true = [boundary_f1(*pair, 1.0) for pair in zip(strokes, outlines, strict=True)]
    other = [boundary_f1(strokes[number - 1], wanted, 1.0) for number, wanted in enumerate(outlines)]
    sides = [edge_f1(scene.image / 255, wanted, 1.0) for scene, wanted in zip(scenes, outlines, strict=True)]
    assert mean(true) >= 0.92 and min(true) >= 0.85, true
    assert mean(other) <= 0.25, other
    assert mean(sides) <= 0.45, sides  # both sides of every stroke


def test_control_goes_on_under_a_lora_that_it_never_met(server: ComfyServer, models: None) -> None:
    found = drawn(server, 3, NEXT, STYLE, DUSK)
    assert found.f1[DUSK] > found.f1[STYLE] + 0.2, found
    assert found.f1[DUSK] >= 0.75 * found.f1[NEXT], found
    assert found.styled == {NEXT: 0, STYLE: 1, DUSK: 1}, found


def test_control_goes_on_on_a_fine_tune_that_it_never_met(server: ComfyServer, models: None) -> None:
    found = drawn(server, 3, NONE, NEXT, board=PRINT, style="print")
    assert found.f1[NEXT] > found.f1[NONE] + 0.2, found
    assert found.strokes[NEXT] >= 0.6 > found.strokes[NONE] + 0.2, found
    assert found.styled == {NONE: 1, NEXT: 1}, found
