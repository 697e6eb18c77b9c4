"""The shipped weights through the real host and its server: pictures follow what was drawn, and not by chance.

The graph is the demo's own (stock loader, text encoder, sampler and decoder), on scenes that no training saw. F1 of
edges is that of the demo: 1 where the picture's outlines are the drawn ones, to two pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from comfyui_controlnext.tools import demo_sheet
from comfyui_controlnext.tools.demo_boards import BOOK, CHILDREN, SHAPES, Board, Column, Hint, draw_hint
from comfyui_controlnext.tools.demo_weights import shipped

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer

pytestmark = pytest.mark.comfy

NONE, NEXT, XS = Column("none"), Column("next", edges=1.0), Column("xs", xs=1.0)
HALF = Column("half", edges=0.5)
DEPTH, POSE = Column("depth", depth=1.0), Column("pose", pose=1.0)
OUTLINED, MASKED = Column("outlined", edges=1.0, split=True), Column("masked", mask=1.0, split=True)
BOTH = Column("both", edges=1.0, mask=1.0, split=True)
NIGHT = Column("night", edges=1.0, lora=1.0)
FIRST = 100  # scene
COUNTS = [pytest.param(5, id="5 hints"), pytest.param(16, id="16 hints", marks=pytest.mark.long)]


@dataclass(frozen=True)
class Drawn:
    """Mean F1 over the hints, by column."""

    f1: dict[Column, float]


def two_or_more(count: int) -> dict[int, Hint]:
    """First `count` hints whose scene has shapes for both controls."""
    hints: dict[int, Hint] = {}
    index = FIRST
    while len(hints) < count:
        hint = draw_hint(SHAPES, index)
        if hint.some_edges.any() and hint.other_mask.any():
            hints[len(hints)] = hint
        index += 1
    return hints


@pytest.fixture(scope="module")
def models(server: ComfyServer) -> None:
    shipped.install(server.base)


def drawn(server: ComfyServer, count: int, *columns: Column, board: Board = SHAPES) -> Drawn:
    hints = two_or_more(count) if board is SHAPES else {row: draw_hint(board, FIRST + row) for row in range(count)}
    f1 = demo_sheet.scores(hints, demo_sheet.draw_cells(server, board, hints, columns))
    return Drawn({column: sum(f1[row, k] for row in hints) / count for k, column in enumerate(columns)})


@pytest.mark.parametrize("count", COUNTS)
def test_pictures_follow_what_each_control_is_given(server: ComfyServer, models: None, count: int) -> None:
    found = drawn(server, count, NONE, NEXT, XS, DEPTH).f1
    assert found[NEXT] > found[NONE] + 0.3, found
    assert found[XS] > found[NONE] + 0.3, found
    assert found[DEPTH] > found[NONE] + 0.2, found


@pytest.mark.parametrize("count", COUNTS)
def test_children_stand_as_their_poses_say(server: ComfyServer, models: None, count: int) -> None:
    found = drawn(server, count, NONE, POSE, board=CHILDREN).f1
    assert found[POSE] > found[NONE] + 0.05, found


@pytest.mark.parametrize("count", COUNTS)
def test_illustrations_follow_their_outlines_the_more_the_higher_the_strength(
    server: ComfyServer, models: None, count: int
) -> None:
    found = drawn(server, count, NONE, HALF, NEXT, board=BOOK).f1
    assert found[NEXT] > found[HALF] > found[NONE], found
    assert found[NEXT] > found[NONE] + 0.2, found


@pytest.mark.parametrize("count", COUNTS)
def test_two_controls_together_follow_both(server: ComfyServer, models: None, count: int) -> None:
    """Outlines of one shape and the mask of the others together match more of the scene than each by itself."""
    found = drawn(server, count, OUTLINED, MASKED, BOTH).f1
    assert found[BOTH] > max(found[OUTLINED], found[MASKED]) + 0.1, found


def test_control_goes_on_under_a_lora_that_it_never_met(server: ComfyServer, models: None) -> None:
    found = drawn(server, 3, NONE, NIGHT).f1
    assert found[NIGHT] > found[NONE] + 0.2, found
