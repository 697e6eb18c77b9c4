"""The shipped weights through the real host and its server: pictures follow what was drawn, and not by chance.

The graph is the demo's own (stock loader, text encoder, sampler and decoder), on scenes that no training saw. F1 of
edges is that of the demo: 1 where the picture's outlines are the drawn ones, to two pixels.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
from comfyui_controlnext.controlnext_core.picturebook import COLORS, THINGS, Picture
from comfyui_controlnext.controlnext_training.drawn import SCHEMES
from comfyui_controlnext.tools import demo_sheet
from comfyui_controlnext.tools.demo_boards import BOOK, CHILDREN, SCENE_SEED, SHAPES, Board, Column, draw_hint
from comfyui_controlnext.tools.demo_weights import shipped
from comfyui_controlnext.tools.demo_weights.picture_style import at_dusk
from PIL import Image

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer

pytestmark = pytest.mark.comfy

NONE, NEXT, XS = Column("none"), Column("next", edges=1.0), Column("xs", xs=1.0)
HALF = Column("half", edges=0.5)
DEPTH, MASK, POSE = Column("depth", depth=1.0), Column("mask", mask=1.0), Column("pose", pose=1.0)
BOTH = Column("both", edges=0.6, depth=0.6)
STYLE, DUSK = Column("style", lora=1.0), Column("dusk", edges=1.0, lora=1.0)
FIRST = 100  # scene
COUNTS = [pytest.param(5, id="5 hints"), pytest.param(16, id="16 hints", marks=pytest.mark.long)]


@dataclass(frozen=True)
class Drawn:
    """Means over the hints, by column."""

    f1: dict[Column, float]
    dusk: dict[Column, float]
    """Share of the pictures whose colours are nearer to the scene at dusk than to the scene itself."""
    colors: dict[Column, float]
    """Share of the things in the colours that their captions name."""


@pytest.fixture(scope="module")
def models(server: ComfyServer) -> None:
    shipped.install(server.base)


def drawn(server: ComfyServer, count: int, *columns: Column, board: Board = BOOK) -> Drawn:
    hints = {row: draw_hint(board, FIRST + row) for row in range(count)}
    cells = {}
    for row, hint in hints.items():  # a workflow each, far from its time limit
        cells |= demo_sheet.draw_cells(server, board, {row: hint}, columns)
    f1 = demo_sheet.scores(hints, cells)
    scenes = {row: SCHEMES[board.scheme](SCENE_SEED, FIRST + row, board.side) for row in hints}
    pictures = {
        place: np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.float64)
        for place, content in cells.items()
    }
    found = Drawn({}, {}, {})
    for place, column in enumerate(columns):
        found.f1[column] = sum(f1[row, place] for row in hints) / count
        found.dusk[column] = sum(is_dusk(pictures[row, place], scenes[row].image) for row in hints) / count
        things = [right_colors(pictures[row, place], scenes[row]) for row in hints]
        found.colors[column] = sum(right for right, _ in things) / max(1, sum(of for _, of in things))
    return found


def is_dusk(found: np.ndarray, scene: np.ndarray) -> float:
    """1 where a picture's mean colours in 8 rows are nearer to those of the scene at dusk, 0 elsewhere."""
    of_found, of_scene, of_dusk = (picture.reshape(8, -1, 3).mean(1) for picture in (found, scene, at_dusk(scene)))
    return float(np.linalg.norm(of_found - of_dusk) < np.linalg.norm(of_found - of_scene))


def right_colors(found: np.ndarray, scene: Picture) -> tuple[int, int]:
    """Number of things whose colour, of all named ones, is nearest to the caption's, and of those that were looked at.

    The median of a picture is compared where the scene has the plain colour of the thing.
    """
    right = of = 0
    for name in re.findall(rf"\b({'|'.join(COLORS)}) (?:{'|'.join(THINGS)})\b", scene.caption):
        plain = np.abs(scene.image.astype(float) - COLORS[name]).max(2) < 8
        if plain.sum() >= 40:
            median = np.median(found[plain], axis=0)
            of += 1
            right += min(COLORS, key=lambda other: np.linalg.norm(median - COLORS[other])) == name
    return right, of


@pytest.mark.parametrize("count", COUNTS)
def test_plain_shapes_follow_their_outlines(server: ComfyServer, models: None, count: int) -> None:
    found = drawn(server, count, NONE, NEXT, XS, board=SHAPES).f1
    assert found[NEXT] > found[NONE] + 0.3, found
    assert found[XS] > found[NONE] + 0.3, found


@pytest.mark.parametrize("count", COUNTS)
def test_children_stand_as_their_poses_say(server: ComfyServer, models: None, count: int) -> None:
    found = drawn(server, count, NONE, POSE, board=CHILDREN).f1
    assert found[POSE] > found[NONE] + 0.05, found


@pytest.mark.parametrize("count", COUNTS)
def test_illustrations_follow_what_each_control_is_given(server: ComfyServer, models: None, count: int) -> None:
    drawings = drawn(server, count, NONE, HALF, NEXT, DEPTH, MASK, BOTH)
    assert drawings.colors[NEXT] >= 0.8, drawings
    found = drawings.f1
    assert found[NEXT] > found[HALF] > found[NONE], found
    assert found[NEXT] > found[NONE] + 0.2, found
    assert found[DEPTH] > found[NONE] + 0.1, found
    assert found[MASK] > found[NONE] + 0.05, found
    assert found[BOTH] > found[DEPTH], found


def test_control_goes_on_under_a_lora_that_it_never_met(server: ComfyServer, models: None) -> None:
    found = drawn(server, 3, NONE, STYLE, DUSK)
    assert found.f1[DUSK] > found.f1[STYLE] + 0.2, found
    assert found.dusk == {NONE: 0, STYLE: 1, DUSK: 1}, found
