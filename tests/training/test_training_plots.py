"""Curves and grids, read back from their pixels."""

from __future__ import annotations

import math
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_controlnext.controlnext_training.plots import (
    BACKGROUND,
    BARE,
    INK,
    RAW,
    SMOOTH,
    VALIDATION,
    Cell,
    loss_curve,
    picture_grid,
)
from torch import Tensor


@pytest.fixture(autouse=True)
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the pack draw the curve, as without matplotlib; see test_training_figure."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def pixels(image: Any) -> Tensor:
    """Pixels (H, W, 3) as integers."""
    return torch.tensor(np.asarray(image), dtype=torch.int32)


def places(image: Any, color: tuple[int, int, int]) -> Tensor:
    """Rows and columns (n, 2) of the pixels of exactly this colour."""
    return (pixels(image) == torch.tensor(color)).all(dim=-1).nonzero()


def frame(image: Any) -> tuple[int, int, int, int]:
    """Frame of the plot (left, top, right, bottom): its axes are the longest runs of ink."""
    ink = (pixels(image) == torch.tensor(INK)).all(dim=-1)
    column, row = int(ink.sum(dim=0).argmax()), int(ink.sum(dim=1).argmax())
    rows, columns = ink[:, column].nonzero().flatten(), ink[row].nonzero().flatten()
    return column, int(rows[0]), int(columns[-1]), row


@pytest.mark.parametrize("size", [(720, 400), (300, 200), (1280, 720)], ids=str)
def test_points_stand_where_their_step_and_loss_say(size: tuple[int, int]) -> None:
    """Points of two losses, 0 and 1, which span the frame with a margin of 5 %; at a quarter of the way, and at half
    the height.
    """
    image = loss_curve([0, 1000], [0.0, 1.0], [(250, 0.5)], size)
    assert image.size == size
    left, top, right, bottom = frame(image)
    assert left < size[0] * 0.2 and right > size[0] * 0.9 and top < size[1] * 0.2 and bottom > size[1] * 0.85
    dot = places(image, VALIDATION).float()
    dot = dot[dot[:, 0] > top + 3]  # without the legend's
    row, column = dot.mean(dim=0).tolist()
    assert column == pytest.approx(left + 0.25 * (right - left), abs=1.5)
    assert row == pytest.approx(bottom - 0.5 / 1.05 * (bottom - top), abs=1.5)


def test_the_smoothed_line_is_the_mean_of_noise_around_a_level() -> None:
    numbers = random.Random(0)
    losses = [0.2 + numbers.uniform(-0.1, 0.1) for _ in range(2000)]
    image = loss_curve(range(2000), losses)
    left, top, right, bottom = frame(image)
    line = places(image, SMOOTH)
    line = line[(line[:, 0] > top + 3) & (line[:, 1] > left + (right - left) // 4)].float()
    raw = places(image, RAW)
    raw = raw[(raw[:, 0] > top) & (raw[:, 0] < bottom)].float()
    middle = (raw[:, 0].min() + raw[:, 0].max()) / 2
    height = raw[:, 0].max() - raw[:, 0].min()
    assert float((line[:, 0] - middle).abs().max()) < 0.15 * float(height)
    assert len(set(line[:, 1].tolist())) > 0.95 * 0.75 * (right - left), "it goes through all steps"


def test_an_outlier_does_not_flatten_the_rest() -> None:
    """The frame ends at what the smoothed line reaches, a thirtieth part of the outlier's height."""
    losses = [0.5 - 0.4 * i / 999 for i in range(1000)]
    losses[500] = 30.0
    image = loss_curve(range(1000), losses)
    left, top, right, bottom = frame(image)
    line = places(image, SMOOTH)
    line = line[line[:, 0] > top + 3]
    assert int(line[:, 0].min()) - top < 0.1 * (bottom - top), "the jump of the smoothed line fills the frame"
    start = line[line[:, 1] < left + (right - left) // 4][:, 0].float().mean()
    assert float(bottom - start) > 0.2 * (bottom - top), "the values before it can still be told from zero"


@pytest.mark.parametrize(
    ("steps", "losses", "validation"),
    [
        ([], [], []),
        ([250], [0.13], []),
        ([], [], [(10, 0.5)]),
        ([1, 2, 3], [0.5, 0.5, 0.5], []),
        ([0, 1], [0.0, 0.0], [(0, 0.0)]),
        ([5, 5], [0.1, 0.2], []),
        ([1, 2, 3], [math.nan, math.inf, -math.inf], [(2, math.nan)]),
        ([1, 2], [-3.0, -2.0], []),
        ([1, 2, 3], [1e-9, 3e-9, 2e-9], []),
        ([1, 2, 3], [1e12, 3e12, 2e-9], []),
        ([10**7, 10**7 + 1], [0.1, 0.1 + 1e-12], []),
    ],
    ids=["empty", "one", "validation only", "flat", "zero", "one step", "nan", "negative", "tiny", "huge", "close"],
)
@pytest.mark.parametrize("size", [(720, 400), (160, 100)], ids=str)
def test_no_curve_is_too_odd_to_be_drawn(
    steps: list[float], losses: list[float], validation: list[tuple[float, float]], size: tuple[int, int]
) -> None:
    image = loss_curve(steps, losses, validation, size)
    assert image.size == size and image.mode == "RGB"
    drawn = len(places(image, SMOOTH)) + len(places(image, VALIDATION))
    assert (drawn > 0) == any(map(math.isfinite, [*losses, *(y for _, y in validation)]))


def test_losses_that_are_no_numbers_are_left_out() -> None:
    with_nan = loss_curve([1, 2, 3, 4], [0.5, math.nan, 0.3, math.inf], [(1, 0.4), (3, math.nan)])
    without = loss_curve([1, 3], [0.5, 0.3], [(1, 0.4)])
    assert with_nan.tobytes() == without.tobytes()


def test_a_flat_curve_is_a_level_line_in_the_middle() -> None:
    image = loss_curve([0, 100], [0.5, 0.5])
    left, top, right, bottom = frame(image)
    line = places(image, SMOOTH)
    line = line[line[:, 0] > top + 3]
    assert int(line[:, 0].max() - line[:, 0].min()) <= 2
    assert float(line[:, 0].float().mean()) == pytest.approx((top + bottom) / 2, abs=2)
    assert int(line[:, 1].max() - line[:, 1].min()) > 0.98 * (right - left)


def test_a_long_run_is_drawn_quickly_and_ends_at_its_last_step() -> None:
    import time

    start = time.process_time()
    image = loss_curve(range(200_000), [1 / (1 + i / 1000) for i in range(200_000)])
    assert time.process_time() - start < 3
    left, top, right, _ = frame(image)
    line = places(image, SMOOTH)
    assert int(line[line[:, 0] > top + 3][:, 1].max()) >= right - 2


def flat(color: tuple[float, float, float], height: int = 8, width: int = 8) -> Tensor:
    return torch.tensor(color).expand(height, width, 3)


def test_a_grid_shows_each_picture_in_its_cell() -> None:
    colors = [[(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)], [(0.0, 0.0, 1.0)]]
    grid = picture_grid([[Cell(flat(c)) for c in row] for row in colors], side=64)
    found = pixels(grid)
    gap = 4
    assert grid.size == (3 * gap + 2 * 64, 3 * gap + 2 * 64)
    for r, row in enumerate(colors):
        for c, color in enumerate(row):
            top, left = gap + r * (64 + gap), gap + c * (64 + gap)
            expected = torch.tensor([int(255 * value) for value in color])
            assert (found[top : top + 64, left : left + 64] == expected).all()
    assert (found[gap + 64 + gap :, 2 * gap + 64 :] == torch.tensor(BACKGROUND)).all(), "the missing cell is empty"


@pytest.mark.parametrize(("height", "width"), [(32, 128), (128, 32), (7, 5), (300, 400), (1, 64)])
def test_pictures_keep_their_shape(height: int, width: int) -> None:
    grid = picture_grid([[Cell(flat((0.0, 0.0, 0.0), height, width))]], side=64)
    black = places(grid, (0, 0, 0))
    rows, columns = (int(black[:, i].max() - black[:, i].min()) + 1 for i in (0, 1))
    scale = 64 / max(height, width)
    assert (rows, columns) == (max(1, round(height * scale)), max(1, round(width * scale)))


def text_rows(grid: Any, color: tuple[int, int, int]) -> int:
    """Rows of text of one colour: runs of rows whose pixels are nearer to it than to white."""
    near = (pixels(grid) - torch.tensor(color)).abs().sum(dim=-1) < 90
    has = near.any(dim=1).int()
    return int(((has[1:] - has[:-1]) == 1).sum())


def test_captions_and_metrics_are_printed_beneath() -> None:
    cell = Cell(flat((1.0, 1.0, 1.0)), "no gaps no gaps no gaps no gaps no gaps", "xxxx 0.9")
    grid = picture_grid([[cell, Cell(flat((1.0, 1.0, 1.0)), "x")]], side=128)
    assert grid.size[1] > 128 + 3 * 12
    found = pixels(grid)
    under = found[4 + 128 :, :]
    assert (found[: 4 + 128] == 255).all(), "nothing is written into the pictures"
    assert (under[:, 4 + 128 + 1 : 8 + 128 - 1] == 255).all(), "no text reaches the neighbour"
    assert text_rows(grid, INK) >= 2 and text_rows(grid, SMOOTH) >= 1


def test_a_long_caption_is_cut_and_a_word_too_wide_as_well() -> None:
    from comfyui_controlnext.controlnext_training.plots import font_of, wrapped

    font = font_of(12)
    words = "a red circle, a blue square and a yellow triangle on a green background".split()
    lines = wrapped(" ".join(words), font, 140, 2)
    assert len(lines) == 2 and lines[1].endswith("...")
    assert all(font.getlength(line) <= 140 for line in lines)
    assert " ".join(lines).removesuffix("...").split() == words[: len(" ".join(lines).removesuffix("...").split())]
    (wide,) = wrapped("w" * 100, font, 60, 1)
    assert wide.endswith("...") and font.getlength(wide) <= 60
    assert wrapped("", font, 60, 2) == [] and wrapped(" one \n two ", font, 200, 2) == ["one two"]


def test_values_out_of_range_and_halves_are_drawn() -> None:
    picture = torch.tensor([[[-1.0, 2.0, math.nan]]], dtype=torch.bfloat16, requires_grad=True)
    grid = picture_grid([[Cell(picture)]], side=16)
    assert pixels(grid)[8, 8].tolist() == [0, 255, 0]


@pytest.mark.parametrize("rows", [[], [[]]])
def test_a_grid_without_pictures_is_refused(rows: list[list[Cell]]) -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        picture_grid(rows)


def test_losses_without_control_stand_beside_those_with_it_and_the_axes_have_names() -> None:
    image = loss_curve([0, 1000], [0.0, 1.0], [(250, 0.5)], without=[(250, 0.75)])
    left, top, right, bottom = frame(image)
    dot = places(image, BARE).float()
    row, column = dot[dot[:, 0] > top + 3].mean(dim=0).tolist()
    assert column == pytest.approx(left + 0.25 * (right - left), abs=1.5)
    assert row == pytest.approx(bottom - 0.75 / 1.05 * (bottom - top), abs=1.5)
    dark = pixels(image).sum(dim=-1) < 3 * 128
    title, name_of_axis = dark[: top - 35].sum(), dark[bottom + 20 :].sum()
    assert title > 100 and name_of_axis > 50, "words above the legend, and below the ticks"
