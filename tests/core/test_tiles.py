"""Tiles: cut pictures merge to the original, and neighbours are blended linearly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comfyui_controlnext.controlnext_core.tiles import STEP, line, merge, split
from torch import Tensor

SIZES = [(64, 64), (100, 70), (33, 150), (300, 129), (16, 500)]
"""Height and width of pictures that are smaller and larger than a tile of 64 x 96, also in one direction only."""


def picture(height: int, width: int, count: int = 1) -> Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(height * width))


@pytest.mark.parametrize("overlap", [0, 8, 32])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_that_nobody_changed_make_the_picture(size: tuple[int, int], overlap: int) -> None:
    pictures = picture(*size, count=2)
    tiles, layout = split(pictures, 96, 64, overlap)
    assert tiles.shape[1] <= 64 and tiles.shape[2] <= 96 and not any(side % STEP for side in tiles.shape[1:3])
    for batches in ([tiles], list(tiles.split(3))):
        torch.testing.assert_close(merge(batches, layout), pictures, atol=1e-6, rtol=0)


def test_tiles_are_parts_of_the_picture_row_by_row_and_picture_by_picture() -> None:
    pictures = picture(100, 200, count=2)
    tiles, layout = split(pictures, 96, 64, 8)
    down, across = (0, 36), (0, 52, 104)
    assert (layout.down.starts, layout.across.starts, layout.count) == (down, across, len(tiles))
    parts = [whole[top : top + 64, left : left + 96] for whole in pictures for top in down for left in across]
    assert all(torch.equal(tile, part) for tile, part in zip(tiles, parts, strict=True))


@pytest.mark.parametrize("overlap", [0, 1, 16, 32])
def test_as_few_tiles_as_cover_a_side_with_the_overlap(overlap: int) -> None:
    for length in range(65, 600, 7):
        starts = line(length, 64, overlap).starts
        assert starts[0] == 0 and starts[-1] == length - 64
        shared = [before + 64 - after for before, after in zip(starts, starts[1:], strict=False)]
        assert min(shared) >= overlap and max(shared) - min(shared) <= 1
        one_less = len(starts) - 1
        assert one_less * 64 - (one_less - 1) * overlap < length, "with one less they would not reach"


@pytest.mark.parametrize(("length", "overlap"), [(100, 8), (500, 32), (130, 0), (257, 16)])
def test_neighbours_fade_along_a_straight_line_in_the_middle_of_what_they_share(length: int, overlap: int) -> None:
    """Tiles of one value each: the merged line is their interpolation between the ends of the ramps."""
    tiles, layout = split(torch.zeros(1, 64, length, 1), 64, 64, overlap)
    values = [float(number * number + 1) for number in range(len(tiles))]
    merged = merge([torch.full_like(tile, value)[None] for tile, value in zip(tiles, values, strict=True)], layout)
    starts = layout.across.starts
    seams = [(starts[n] + 64 + starts[n + 1]) / 2 for n in range(len(starts) - 1)]
    knots = [seam + side * max(overlap, 1e-3) / 2 for seam in seams for side in (-1, 1)]
    levels = [values[n + side] for n in range(len(seams)) for side in (0, 1)]
    expected = np.interp(np.arange(length) + 0.5, knots, levels)
    np.testing.assert_allclose(merged[0, 10, :, 0].numpy(), expected, atol=1e-3)


def test_a_small_picture_is_filled_up_to_a_step_with_its_last_row_and_column() -> None:
    whole = picture(20, 30)
    tiles, layout = split(whole, 64, 64, 8)
    assert tiles.shape == (1, 32, 32, 3) and torch.equal(tiles[:, :20, :30], whole)
    assert torch.equal(tiles[0, 31, 31], whole[0, 19, 29]) and torch.equal(tiles[0, 25, 7], whole[0, 19, 7])
    assert merge([tiles], layout).shape == whole.shape


def test_wrong_sizes_and_results_are_refused_in_words() -> None:
    whole = picture(100, 200)
    with pytest.raises(ValueError, match=r"width: 100 pixels are not a multiple of 16\. Set 96\."):
        split(whole, 100, 64, 8)
    with pytest.raises(ValueError, match=r"overlap: 33 pixels are not within 0 and half of a tile of 64\. Set 8\."):
        split(whole, 96, 64, 33)
    tiles, layout = split(whole, 96, 64, 8)
    with pytest.raises(ValueError, match=r"tiles: there are 5, and the layout has 6\."):
        merge([tiles[:5]], layout)
    with pytest.raises(ValueError, match=r"tiles: number 5 is 96 x 56, and it was cut 96 x 64\."):
        merge([tiles[:4], tiles[4:, :56]], layout)
