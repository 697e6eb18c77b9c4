"""Small buckets: no batch consists of repetitions of a few pictures where a neighbour has room."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from comfyui_controlnext.controlnext_training.data import FileDataset, open_dataset, order
from comfyui_controlnext.controlnext_training.data.joined import join_small_buckets
from comfyui_controlnext.tests.fixtures.data_fixtures import write
from comfyui_controlnext.tests.fixtures.training_fixtures import drawn


@pytest.fixture
def data(tmp_path: Path) -> FileDataset:
    """Dataset of ten squares, three slightly wide pictures, and one very wide one."""
    sizes = [(64, 64)] * 10 + [(64, 96)] * 3 + [(32, 120)]
    for number, size in enumerate(sizes):
        write(tmp_path / f"{number:02}.png", np.full((*size, 3), 9 * number, np.uint8))
    return open_dataset(tmp_path, hint="gray", resolution=64, bucket_step=8)


def test_a_bucket_that_fills_a_batch_stays_and_others_join_the_nearest(data: FileDataset) -> None:
    said: list[str] = []
    square, wide, widest = sorted(set(data.sizes), key=lambda size: size[1])
    assert join_small_buckets(data, 1, said.append) is data and said == []
    joined = join_small_buckets(data, 3, said.append)
    assert Counter(joined.sizes) == {square: 10, wide: 4}, "the widest one joined the wide ones"
    assert said == [
        f"buckets: 1 samples of {widest[1]}x{widest[0]} are fewer than a batch of 3 and are cut to {wide[1]}x{wide[0]}."
    ]
    sample = joined.load(13)
    assert sample.frames.shape[1:3] == wide and joined.frame_keys(13) != data.frame_keys(13)
    assert joined.frame_keys(0) == data.frame_keys(0), "what stays is found in the cache"


def test_no_picture_is_repeated_where_all_of_them_fill_a_batch(data: FileDataset) -> None:
    joined = join_small_buckets(data, 14, lambda line: None)
    assert len(set(joined.sizes)) == 1
    assert sorted(order(joined.sizes, 14, 0).batch(0)) == list(range(14)), "each once an epoch"
    assert (
        Counter(order(data.sizes, 14, 0).batch(step)[0] for step in range(3))
        and max(Counter(i for step in range(3) for i in order(data.sizes, 14, 0).batch(step)).values()) == 14
    ), "without it the lone one came fourteen times"


def test_a_batch_larger_than_the_data_is_said(data: FileDataset) -> None:
    for given in (data, drawn(14)):
        said: list[str] = []
        join_small_buckets(given, 256, said.append)
        assert said[0] == "batch: a step takes 256 samples and there are 14, so some come several times in one step."
