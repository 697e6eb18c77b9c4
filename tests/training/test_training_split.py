"""Changes of the data between parts of a run: held-out samples stay held out, and changes are reported."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_training import state
from comfyui_controlnext.controlnext_training.drawn import DrawnDataset
from comfyui_controlnext.controlnext_training.split import SavedData, Split, identity, split
from comfyui_controlnext.tests.fixtures.sampling_fixtures import Studio
from comfyui_controlnext.tests.fixtures.training_fixtures import SIDE, Watcher, base_of, same, small, train_in

CONFIG = small(validate_every=1, validation_samples=3)


class Some(DrawnDataset):
    """Dataset of scenes by their numbers, with one caption, which is encoded once."""

    def __init__(self, numbers: Sequence[int]) -> None:
        super().__init__("synthetic", "edges", len(numbers), SIDE)
        self.numbers = list(numbers)
        self.fingerprint = repr(self.numbers)

    def frame_keys(self, index: int, seed: int = 0, position: int = 0, variant: int = 0) -> tuple[str, ...]:
        return super().frame_keys(self.numbers[index])

    def _scene(self, index: int) -> Any:
        return dataclasses.replace(super()._scene(self.numbers[index]), caption="a scene")


def parted(numbers: Sequence[int], saved: SavedData | None = None, config: Any = CONFIG) -> Split:
    return split(Some(numbers), len(numbers), range(len(numbers)), config, False, saved)


def held(numbers: Sequence[int], found: Split) -> set[int]:
    """Scenes that are held out."""
    return set(numbers) - {numbers[index] for index in found.training}


def saved_of(numbers: Sequence[int], config: Any = CONFIG) -> SavedData:
    return SavedData(parted(numbers, config=config).tensors, repr(list(numbers)))


def test_the_draw_is_by_content_and_seed() -> None:
    one, turned = list(range(40)), list(reversed(range(40)))
    assert held(one, parted(one)) == held(turned, parted(turned)), "the order of files does not matter"
    assert len({frozenset(held(one, parted(one, config=small(validate_every=1, seed=s)))) for s in range(8)}) > 4
    gone = [n for n in one if n not in sorted(set(one) - held(one, parted(one)))[:5]]
    assert held(gone, parted(gone)) == held(one, parted(one)), "files that train come and go"


@pytest.mark.parametrize("samples", [1, 3, 10])
def test_no_held_out_sample_trains_later(samples: int) -> None:
    """Files come, files go, and the number of validation pictures changes."""
    before = list(range(40))
    out = held(before, parted(before))
    saved, config = saved_of(before), small(validate_every=1, validation_samples=samples)
    for now in (before, list(range(1000)), [*sorted(out), *range(100, 120)]):
        found = parted(now, saved, config)
        assert held(now, found) == out & set(now)
        assert {now[i] for i in found.validation} <= out and len(found.validation) == min(samples, len(out & set(now)))
    off = parted(before, saved, small(validate_every=0))
    assert held(before, off) == out and off.validation == []


def test_what_has_changed_is_said() -> None:
    before = list(range(40))
    saved = saved_of(before)
    assert parted(before, saved).said == []
    assert parted(before[:-2], saved).said[0].startswith("data: 0 samples are new or replaced and 2 are gone")
    replaced = [*before[:-1], 99]
    assert (
        parted(replaced, saved).said[0].startswith("data: 1 samples are new or replaced (the first: sample 39) and 1")
    )
    assert "captions or the order" in parted(before[::-1], saved).said[0]


def test_a_state_of_an_earlier_version_keeps_the_first_and_says_so() -> None:
    found = parted(list(range(40)), SavedData({}, ""))
    assert found.validation == [0, 1, 2] and found.training == list(range(3, 40))
    assert "earlier version" in found.said[0]
    again = parted(list(range(40)), SavedData(found.tensors, repr(list(range(40)))))
    assert again.validation == [0, 1, 2] and again.said == [], "from then on by content"


def test_identities_tell_samples_apart() -> None:
    data = Some(range(50))
    assert len({identity(data, index) for index in range(50)}) == 50
    assert all(-(2**63) <= identity(data, index) < 2**63 for index in range(50))


def forget_the_data(folder: Path) -> None:
    """Convert a state into one of an earlier version."""
    facts = json.loads((folder / "state.json").read_text("utf-8"))
    for key in ("data", "small_buckets"):
        facts.pop(key)
    facts["parts"].pop("data")
    (folder / "state.json").write_text(json.dumps(facts), "utf-8")
    (folder / "data.safetensors").unlink()


@pytest.mark.comfy
def test_a_run_says_what_changed_and_an_old_state_goes_on(loaded_studio: Studio, tmp_path: Path) -> None:
    base, numbers = base_of(loaded_studio), list(range(20))
    for steps in (1, 2):
        config = small(steps=steps, validate_every=2, validation_samples=1)
        watch = Watcher()
        train_in(tmp_path, base, config, watch, data=Some(numbers))
        assert not watch.logged("data: ")
    last = state.latest(tmp_path / "runs" / "control")
    assert last is not None and last.facts["data"] == repr(numbers)
    assert torch.equal(last.tensors("data")["samples"], parted(numbers).tensors["samples"])
    shutil.copytree(tmp_path / "runs", tmp_path / "old" / "runs")
    forget_the_data(tmp_path / "old" / "runs" / "control" / last.folder.name)
    watch, config = Watcher(), small(steps=3, validate_every=2, validation_samples=1)
    train_in(tmp_path, base, config, watch, data=Some([*numbers[:-1], 77]))
    assert watch.logged("data: 1 samples are new or replaced (the first: sample 19) and 1 are gone")
    watch = Watcher()
    train_in(tmp_path / "old", base, config, watch, data=Some(numbers))
    assert watch.logged("the saved state is of an earlier version")
    told = state.latest(tmp_path / "old" / "runs" / "control")
    assert told is not None and told.facts["small_buckets"] is None, "its rule stays"
    assert not same(told.tensors("data"), last.tensors("data")), "another split"
    assert told.tensors("data")["held"].tolist() == [identity(Some(numbers), 0)], "the first, as that version had it"
