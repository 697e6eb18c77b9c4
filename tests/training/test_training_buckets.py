"""Aspect buckets, and the crop shared by picture, hint and mask."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from comfyui_controlnext.controlnext_training.data import DatasetError
from comfyui_controlnext.controlnext_training.data.buckets import MAX_ASPECT, bucket_sizes, choose, fit
from comfyui_controlnext.controlnext_training.data.pictures import cut, resize
from comfyui_controlnext.tests.fixtures.data_fixtures import coordinates
from hypothesis import given, settings

SIDES = st.integers(min_value=1, max_value=3000)


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (768, 64), (1024, 64), (1024, 32), (64, 8), (576, 64)])
def test_no_bucket_is_larger_than_the_resolutions_area(resolution: int, step: int) -> None:
    sizes = bucket_sizes(resolution, step)
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes) > 4
    for height, width in sizes:
        assert height % step == width % step == 0
        assert height * width <= resolution**2
        assert max(height, width) <= MAX_ASPECT * min(height, width)
        assert (width, height) in sizes


def test_sdxls_buckets_are_the_known_ones() -> None:
    known = {(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (640, 1536), (512, 2048)}
    assert known <= set(bucket_sizes(1024))


def test_without_buckets_there_is_the_square_alone() -> None:
    assert bucket_sizes(520, 64, buckets=False) == ((520, 520),)


@pytest.mark.parametrize(("resolution", "step"), [(500, 64), (0, 64), (512, 12), (512, 0), (512, 1024), (-8, 8)])
def test_sizes_that_latents_cannot_have_are_refused(resolution: int, step: int) -> None:
    with pytest.raises(DatasetError, match=r"(resolution|bucket_step): "):
        bucket_sizes(resolution, step)


@pytest.mark.parametrize(
    ("original", "bucket"),
    [
        ((512, 512), (512, 512)),
        ((3000, 3000), (512, 512)),
        ((1080, 1920), (384, 640)),
        ((1920, 1080), (640, 384)),
        ((10, 1000), (256, 1024)),
        ((1000, 10), (1024, 256)),
    ],
)
def test_a_picture_goes_to_the_bucket_of_its_aspect(original: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert choose(original, bucket_sizes(512)) == bucket


@given(height=SIDES, width=SIDES, which=st.integers(0, 20))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_cut_covers_its_bucket_and_keeps_the_aspect(height: int, width: int, which: int) -> None:
    sizes = bucket_sizes(512)
    size = sizes[which % len(sizes)]
    found = fit((height, width), size)
    (to_height, to_width), (top, left) = found.resized, found.crop
    assert to_height >= size[0] and to_width >= size[1] and (to_height == size[0] or to_width == size[1])
    assert (top, left) == ((to_height - size[0]) // 2, (to_width - size[1]) // 2)
    scale = to_height / height if to_width == size[1] else to_width / width
    other = to_width / width if to_width == size[1] else to_height / height
    assert abs(scale - other) * (height if to_width == size[1] else width) <= 0.5 + 1e-9


@pytest.mark.parametrize("original", [(200, 300), (300, 200), (64, 64), (40, 90), (1000, 333), (50, 30)])
@pytest.mark.parametrize("factor", [1.0, 0.5, 2.0, 1.37])
def test_picture_and_hint_of_any_size_show_the_same_place_in_each_pixel(
    original: tuple[int, int], factor: float
) -> None:
    """Pixels encode their coordinates, so that equal values in both crops mean equal places."""
    hint_size = round(original[0] * factor), round(original[1] * factor)
    where = fit(original, choose(original, bucket_sizes(64, 8)))
    frame = cut(coordinates(*original).astype(np.float32) / 255, where, smooth=True)
    hint = cut(coordinates(*hint_size).astype(np.float32) / 255, where, smooth=False)
    assert frame.shape == hint.shape == (*where.size, 3)
    (top, left), (height, width) = where.crop, where.size
    right = (np.arange(width) + left + 0.5) / where.resized[1]
    down = (np.arange(height) + top + 0.5) / where.resized[0]
    for values, sides, scale in ((frame, original, 0.25), (hint, hint_size, 0.51)):
        # a nearest pixel is up to half of its own width away; cubic and area means are exact but near the border
        assert np.abs(values[..., 0] - right).max() < scale / min(sides[1], where.resized[1]) + 3 / 255
        assert np.abs(values[..., 1] - down[:, None]).max() < scale / min(sides[0], where.resized[0]) + 3 / 255


def test_a_cut_takes_the_centre_and_leaves_pixels_alone_where_nothing_is_scaled() -> None:
    values = coordinates(64, 96).astype(np.float32) / 255
    where = fit((64, 96), (64, 64))
    assert where.crop == (0, 16) and where.resized == (64, 96)
    for smooth in (True, False):
        assert np.array_equal(cut(values, where, smooth), values[:, 16:80])


def test_hints_are_averaged_when_they_shrink_and_stay_as_they_are_when_they_grow() -> None:
    stripes = np.zeros((8, 8, 3), np.float32)
    stripes[:, ::2] = 1
    assert np.array_equal(resize(stripes, (8, 4), False), np.full((8, 4, 3), 0.5, np.float32))
    assert np.array_equal(resize(stripes, (16, 16), False), stripes.repeat(2, 0).repeat(2, 1))
    assert np.array_equal(resize(stripes, (16, 4), False), np.full((16, 4, 3), 0.5, np.float32))
    assert set(np.unique(resize(stripes, (13, 13), False))) == {0.0, 1.0}
    nearest = np.floor((np.arange(7) + 0.5) * 5 / 7) / 4
    ramp = np.linspace(0, 1, 5, dtype=np.float32)
    assert np.array_equal(resize(np.tile(ramp, (5, 1)), (5, 7), False)[0], nearest.astype(np.float32))
    assert len(np.unique(resize(stripes, (16, 16), True))) > 2
    assert 0 <= resize(stripes, (19, 19), True).min() and resize(stripes, (19, 19), True).max() <= 1


def test_masks_of_two_axes_are_cut_like_pictures() -> None:
    values = coordinates(50, 80).astype(np.float32)[..., 0] / 255
    where = fit((50, 80), (40, 40))
    whole = cut(np.repeat(values[..., None], 3, 2), where, smooth=False)
    assert np.array_equal(cut(values, where, smooth=False), whole[..., 0])
