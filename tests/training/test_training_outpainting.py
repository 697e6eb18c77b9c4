"""Hints for outpainting: gray around a rectangle that all frames of a clip share, as in the host's node."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfyui_controlnext.controlnext_training.data import FileDataset, open_dataset
from comfyui_controlnext.controlnext_training.data.outpainting import kept_rectangle, outpainting_hints
from comfyui_controlnext.controlnext_training.data.samples import digest
from comfyui_controlnext.controlnext_training.drawn import open_drawn
from comfyui_controlnext.tests.fixtures.data_fixtures import coordinates, write
from torch import Tensor

SIDE = 64
GRAY = 0.5


def shown(hints: Tensor, frames: Tensor) -> list[tuple[int, int, int, int]]:
    """Edges (top, bottom, left, right) of each frame's part that is not gray, asserted to equal the frame there."""
    found = []
    for hint, frame in zip(hints, frames, strict=True):
        kept = (hint != GRAY).any(dim=-1)
        rows, columns = kept.any(dim=1).nonzero(), kept.any(dim=0).nonzero()
        top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
        assert torch.equal(hint[top:bottom, left:right], frame[top:bottom, left:right])
        assert int(kept.sum()) == (bottom - top) * (right - left), "gray is all around, and nothing else is"
        found.append((top, bottom, left, right))
    return found


@pytest.fixture
def dataset(tmp_path: Path) -> FileDataset:
    for number in range(15):
        write(tmp_path / "a" / f"frame {number}.png", coordinates(SIDE, SIDE, number))
    return open_dataset(
        tmp_path,
        hint="outpaint",
        resolution=SIDE,
        bucket_step=8,
        clip_frames=5,
        clip_stride=1,
        reference="first",
    )


def test_all_frames_of_a_clip_are_shown_in_one_rectangle(dataset: FileDataset) -> None:
    rectangles = set()
    for index in range(len(dataset)):
        sample = dataset.load(index, 3, 1)
        (rectangle,) = set(shown(sample.hints, sample.frames))
        rectangles.add(rectangle)
        assert torch.equal(dataset.load(index, 4, 7).hints, sample.hints), "hints are kept for all positions"
    assert len(rectangles) == len(dataset) == 3


def test_rectangles_leave_out_from_15_to_60_percent_of_a_side() -> None:
    found = [kept_rectangle(100, 200, str(number)) for number in range(300)]
    heights, widths = {b - t for t, b, _, _ in found}, {r - left for _, _, left, r in found}
    assert {*heights} - {100} and min(heights) >= 40 and max(heights - {100}) <= 85
    assert min(widths) >= 80 and max(widths - {200}) <= 170
    cut = [(b - t < 100, r - left < 200) for t, b, left, r in found]
    assert {*cut} == {(True, False), (False, True), (True, True)}
    assert all(0 <= t < b <= 100 and 0 <= left < r <= 200 for t, b, left, r in found)


def test_drawn_scenes_have_such_hints_too() -> None:
    sample = open_drawn("synthetic:edges:2", SIDE, "outpaint").load(1, 0, 5)
    shown(sample.hints, sample.frames)


@pytest.mark.comfy
def test_the_hints_are_those_of_the_hosts_node() -> None:
    import nodes as host_nodes

    frames = torch.rand(3, 40, 48, 3, generator=torch.Generator().manual_seed(1))
    top, bottom, left, right = kept_rectangle(40, 48, digest("a", "b"))
    cut = frames[:, top:bottom, left:right]
    padded, _ = host_nodes.ImagePadForOutpaint().expand_image(cut, left, top, 48 - right, 40 - bottom, 0)
    assert torch.equal(outpainting_hints(frames, ("a", "b")), padded)
