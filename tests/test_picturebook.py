"""Pictures that the project draws: seeded, with captions and hints that agree with them."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from comfyui_controlnext.controlnext_core.picturebook import COLORS, HINTS, THINGS, canvas, draw, things

COUNT, SIDE = 40, 128


@pytest.fixture(scope="module")
def pictures() -> list[Any]:
    return [draw(3, index, SIDE) for index in range(COUNT)]


def test_a_picture_depends_on_seed_and_index_alone(pictures: list[Any]) -> None:
    again = draw(3, 7, SIDE)
    for name in ("image", *HINTS):
        assert np.array_equal(getattr(again, name), getattr(pictures[7], name))
    assert again.caption == pictures[7].caption
    assert len({picture.image.tobytes() for picture in pictures}) == COUNT
    assert not np.array_equal(draw(4, 7, SIDE).image, again.image)


def test_captions_name_every_kind_of_thing(pictures: list[Any]) -> None:
    named = " ".join(draw(3, index, 16).caption for index in range(300))
    assert len(THINGS) >= 10
    assert [kind for kind in THINGS if kind not in named] == []
    assert all(color in COLORS for kind in THINGS.values() for color in kind.colors)


@pytest.mark.parametrize("kind", THINGS)
def test_a_thing_has_its_colour_inside_its_mask(kind: str) -> None:
    for color in THINGS[kind].colors:
        board = canvas.Canvas(96, 96)
        board.near, board.is_thing = 200, True
        THINGS[kind].draw(things.Pen(board, 0.5, 0.9, 0.8), COLORS[color], canvas.Numbers("a thing"))
        inside = board.mask > 250
        assert inside.mean() > 0.06
        off = np.abs(board.image[inside].astype(int) - COLORS[color]).max(1)
        assert (off < 45).mean() > 0.1, color  # lighthouses are half white, and all have outlines
        beside = cv2.dilate(board.mask, np.ones((5, 5), np.uint8)) == 0  # outlines reach over a mask's rim
        assert (board.image[beside] > 0).mean() < 0.04  # a cup's steam
        assert (board.depth[inside] > 190).all()


def test_outlines_of_the_hint_lie_on_dark_lines(pictures: list[Any]) -> None:
    for picture in pictures:
        assert 0.01 < (picture.edges > 127).mean() < 0.25
        dark = (picture.image.max(2) < 120).astype(np.uint8)
        on_line = cv2.dilate(dark, np.ones((3, 3), np.uint8))[picture.edges > 127]
        assert on_line.mean() > 0.95


def test_things_are_nearer_than_what_is_behind_them(pictures: list[Any]) -> None:
    for picture in pictures:
        inside = picture.mask > 250
        assert 0.03 < inside.mean() < 0.7
        assert picture.depth[inside].mean() > picture.depth[picture.mask == 0].mean()


def test_a_hint_has_three_channels_and_an_unknown_one_is_refused(pictures: list[Any]) -> None:
    assert pictures[0].hint("depth").shape == (SIDE, SIDE, 3)
    with pytest.raises(ValueError, match="edges, mask, depth"):
        pictures[0].hint("pose")


def test_a_wide_picture_is_filled() -> None:
    picture = draw(3, 1, (64, 160))
    assert picture.image.shape == (64, 160, 3)
    assert (picture.image.max(2) > 0).all()


def test_a_curve_of_cut_corners_stays_inside_its_points() -> None:
    square = canvas.box(0, 0, 1, 1)
    curve = canvas.smooth(square)
    assert len(curve) == 32 and curve.min() >= 0 and curve.max() <= 1
    straight = canvas.smooth(canvas.polygon((0, 0), (1, 1), (2, 2)), closed=False)
    assert np.allclose(straight[:, 0], straight[:, 1]) and np.allclose(straight[[0, -1]], [[0, 0], [2, 2]])
