"""Datasets of images from the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_training.data import DatasetError, TensorDataset, order
from comfyui_controlnext.tests.fixtures.data_fixtures import coordinates, marks
from torch import Tensor


def batch(count: int = 3, height: int = 64, width: int = 64, first: int = 0) -> Tensor:
    pictures = [torch.from_numpy(coordinates(height, width, first + number)).float() / 255 for number in range(count)]
    return torch.stack(pictures)


def test_images_hints_and_captions_go_together() -> None:
    dataset = TensorDataset(batch(), batch(first=100), ["a", "b", "c"], batch()[..., 0])
    assert len(dataset) == 3 and dataset.sizes == [(64, 64)] * 3
    samples = [dataset.load(index) for index in range(3)]
    assert [(*marks(s.frames), *marks(s.hints), s.caption) for s in samples] == [
        (i, 100 + i, "abc"[i]) for i in range(3)
    ]
    assert samples[1].mask is not None and torch.equal(samples[1].mask, batch()[1:2, ..., 0])
    assert torch.equal(samples[2].frames, batch()[2:])
    assert {order(dataset.sizes, 1, 0).batch(step)[0] for step in range(3)} == {0, 1, 2}


def test_sides_are_cropped_to_what_latents_have_at_the_centre() -> None:
    images = batch(2, 67, 85)
    dataset = TensorDataset(images, batch(2, 134, 170))
    sample = dataset.load(0)
    assert dataset.sizes[0] == (64, 80) and sample.crop == (1, 2) and sample.original_size == (67, 85)
    assert torch.equal(sample.frames, images[:1, 1:65, 2:82])
    assert (sample.frames - sample.hints)[..., :2].abs().max() < 2 / 255


def test_one_hint_and_one_caption_serve_all_images() -> None:
    dataset = TensorDataset(batch(), batch(1, first=50), ["same"])
    assert [marks(dataset.load(index).hints) for index in range(3)] == [[50]] * 3
    assert dataset.captions == ["same"] * 3 and TensorDataset(batch(), batch()).captions == [""] * 3


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_one_three_and_four_channels_become_rgb(channels: int) -> None:
    hints = torch.rand(3, 64, 64, channels, generator=torch.Generator().manual_seed(0))
    found = TensorDataset(batch(), hints).load(0).hints[0]
    assert torch.equal(found, hints[0].expand(-1, -1, 3) if channels == 1 else hints[0, ..., :3])


def test_values_a_little_outside_of_the_range_are_clipped_and_inputs_stay_as_they_were() -> None:
    images = batch() * 1.5 - 0.3
    before = images.clone()
    sample = TensorDataset(images, images).load(0)
    assert sample.frames.min() == sample.hints.min() == 0 and sample.frames.max() == sample.hints.max() == 1
    sample.frames.zero_()
    assert torch.equal(images, before)


def test_keys_and_fingerprint_follow_the_content() -> None:
    one, same = TensorDataset(batch(), batch()), TensorDataset(batch(), batch())
    assert one.fingerprint == same.fingerprint and one.frame_keys(1) == same.load(1).frame_keys
    others = [
        TensorDataset(batch(first=1), batch()),
        TensorDataset(batch(), batch(first=1)),
        TensorDataset(batch(), batch(), masks=batch()[..., 0]),
    ]
    assert len({one.frame_keys(0), *(other.frame_keys(0) for other in others)}) == 4
    assert one.fingerprint != TensorDataset(batch(), batch(), ["x"]).fingerprint


def test_consecutive_images_make_clips() -> None:
    dataset = TensorDataset(batch(9), batch(9, first=100), clip_frames=2, clip_stride=3, reference="first")
    assert [marks(dataset.load(index).frames) for index in range(2)] == [[0, 3], [4, 7]]
    drawn = TensorDataset(batch(9), batch(9, first=100), clip_frames=2, clip_stride=3)
    sample = drawn.load(1, seed=1, position=5)
    reference, second = marks(sample.frames)
    assert second == 7 and marks(sample.hints) == [100 + reference, 107]
    assert len({marks(drawn.load(1, 1, position).frames)[0] for position in range(40)}) == 9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((batch()[0], batch()), "images: has the shape"),
        ((batch()[:0], batch()), "images: has the shape"),
        ((batch(), batch(2)), "hints: are 2 for 3 images"),
        ((batch(), batch()[..., :2]), "hints: has 2 channels"),
        ((batch(), batch(), ["a", "b"]), "captions: are 2 for 3"),
        ((batch(), batch(), [], batch()), "masks: has the shape"),
        ((batch(), batch() * float("nan")), "hints: holds values that are not numbers"),
        ((batch() * 255, batch()), r"images: holds values from 0 to \d+, not in 0\.\.1"),
        ((batch(), batch() - 1), "hints: holds values from -1 to -0"),
        ((batch(3, 7, 64), batch()), "images: are 64x7"),
    ],
)
def test_what_does_not_fit_is_refused_naming_the_input(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        TensorDataset(*arguments)


def test_too_few_images_for_a_clip_are_refused() -> None:
    with pytest.raises(DatasetError, match="images: 3 are too few, a clip takes 4"):
        TensorDataset(batch(), batch(), clip_frames=2, clip_stride=3)
