"""Encoded samples: encoded once, dropped at their rates, and left out where they cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.specs import Family
from comfyui_controlnext.controlnext_training.data.cache import Cache
from comfyui_controlnext.controlnext_training.data.samples import BrokenSample, DatasetError, Sample
from comfyui_controlnext.controlnext_training.data.tensors import TensorDataset
from comfyui_controlnext.controlnext_training.distributed import ProcessGroup
from comfyui_controlnext.controlnext_training.drawn import DrawnDataset
from comfyui_controlnext.tests.fixtures.sampling_fixtures import CELLS, Studio, picture
from comfyui_controlnext.tests.fixtures.training_fixtures import SIDE, Watcher, base_of, drawn, same, small, train_in
from torch import Tensor

if TYPE_CHECKING:
    from comfyui_controlnext.controlnext_training.base_model.trained_families import TrainedFamily

pytestmark = pytest.mark.comfy

MANY = 2000
SIGMAS = 4
"""Tolerance for the rate of n draws, in standard deviations."""


@dataclass
class Encoders:
    """Encoders that give numbers, counted; the family and its conditioning are the real ones."""

    family: TrainedFamily
    calls: list[str] = field(default_factory=list)

    def identity(self, what: str) -> str:
        return what

    def latent(self, frames: Tensor) -> Tensor:
        self.calls.append("latent")
        return torch.full((len(frames), 4, CELLS, CELLS), float(frames.mean()))

    def encoder(self, name: str) -> Encoders:
        """Encoder of every kind in one object."""
        assert name in self.family.encoders
        return self

    def tokenize(self, caption: str) -> str:
        return caption

    def encode_from_tokens(self, caption: str, return_dict: bool) -> dict[str, Any]:
        self.calls.append(f"text {caption}")
        return {"cond": torch.full((1, 2, 3), float(len(caption))), "pooled_output": None}

    def encode_image(self, frame: Tensor) -> Any:
        self.calls.append("reference")
        self.frame = frame
        return SimpleNamespace(image_embeds=torch.ones(1, 3))

    def encode(self, frame: Tensor) -> Tensor:
        """Noise on the frame that `encode_image` got, as a latent."""
        return torch.full((1, 4, CELLS, CELLS), float((frame - self.frame).std()))


def store_of(data: Any, kept: Any = None, family: Family = Family.SD15, **settings: Any) -> Any:
    from comfyui_controlnext.controlnext_training.base_model.trained_families import FAMILIES
    from comfyui_controlnext.controlnext_training.encoded import MemoryCache, Store

    return Store(Encoders(FAMILIES[family]), data, small(**settings), kept or MemoryCache())  # type: ignore[arg-type]


def clips(count: int = 6) -> TensorDataset:
    return TensorDataset(picture(1, count), picture(2, count), ["a clip"], clip_frames=3)


class Torn(DrawnDataset):
    """Drawn scenes of which some cannot be read."""

    def __init__(self, count: int, torn: Sequence[int]) -> None:
        super().__init__("synthetic", "edges", count, SIDE)
        self.torn = set(torn)

    def load(self, index: int, seed: int = 0, position: int = 0) -> Sample:
        if index in self.torn:
            raise BrokenSample(f"scene {index}", "is cut off")
        return super().load(index, seed, position)


def near(found: int, rate: float, draws: int = MANY) -> bool:
    return abs(found - draws * rate) < SIGMAS * (draws * rate * (1 - rate)) ** 0.5


def test_captions_and_hints_are_dropped_at_their_rates_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(drawn(1), caption_dropout=0.2, hint_dropout=0.3)
    whole = store.data.load(0)
    monkeypatch.setattr(store.data, "job", lambda *place: lambda: whole)
    length = float(len(whole.caption))
    found = [store.sample(0, position) for position in range(MANY)]
    captionless = [float(sample.given["context"].max()) == 0 for sample in found]
    black = [not bool(sample.hint.any()) for sample in found]
    assert all(float(s.given["context"].max()) in (0, length) for s in found)
    assert near(sum(captionless), 0.2) and near(sum(black), 0.3)
    assert near(sum(a and b for a, b in zip(captionless, black, strict=True)), 0.2 * 0.3), "they are independent"
    again = [store.sample(0, position) for position in range(50)]
    assert [not bool(sample.hint.any()) for sample in again] == black[:50], "the position decides"
    for position in range(50):
        kept = store.sample(0, position, dropout=False)
        assert bool(kept.hint.any()) and float(kept.given["context"].max()) == length


@pytest.mark.parametrize(("rate", "dropped"), [(0.0, False), (1.0, True)])
def test_a_rate_of_nothing_and_of_everything_is_exact(rate: float, dropped: bool) -> None:
    store = store_of(drawn(1), caption_dropout=rate, hint_dropout=rate)
    for position in range(20):
        found = store.sample(0, position)
        assert bool(found.hint.any()) != dropped and bool(found.given["context"].any()) != dropped


def test_clips_lose_what_clip_sees_below_twice_the_rate_and_the_latent_from_there_on() -> None:
    """p = 0.1: what CLIP sees in [0, 0.2), the reference latent in [0.1, 0.3). Source: the released SVD trainer."""
    store = store_of(clips(), family=Family.SVD)
    sample = store.data.load(0)
    for drop, context, concat in (
        (0.0, False, True),
        (0.0999, False, True),
        (0.1, False, False),
        (0.1999, False, False),
        (0.2, True, False),
        (0.2999, True, False),
        (0.3001, True, True),
        (0.9999, True, True),
    ):
        given = store.base.family.conditioning.encode(store.base, store.cached, sample, drop, 0.1)
        assert (bool(given["context"].any()), bool(given["concat"].any())) == (context, concat), drop


def test_the_noise_on_a_reference_frame_is_the_frames_own() -> None:
    """A hundred times smaller than the pictures' range, and the same each time: the frame's key decides."""
    one, other = store_of(clips(), family=Family.SVD), store_of(clips(), family=Family.SVD, seed=7)
    sample = one.data.load(0)

    def reference(store: Any) -> Tensor:
        given = store.base.family.conditioning.encode(store.base, store.cached, sample, 1.0, 0.0)
        return given["concat"]

    found = reference(one)
    assert float(found.mean()) == pytest.approx(0.02, rel=0.05)
    assert torch.equal(found, reference(other))


def test_everything_is_encoded_once_and_nothing_between_steps(tmp_path: Path) -> None:
    data = drawn(3)
    store = store_of(data, Cache(tmp_path), caption_dropout=0.5)
    usable, broken = store.prepare(range(3), ProcessGroup(), Watcher())
    calls = list(store.base.calls)
    assert usable == [0, 1, 2] and not broken
    assert sorted(calls) == sorted(["text ", *[f"text {c}" for c in set(data.captions)], "latent", "latent", "latent"])
    first = [store.sample(index, position) for position in range(10) for index in range(3)]
    assert store.base.calls == calls, "not even for samples that lose their caption"
    later = store_of(drawn(3), Cache(tmp_path), caption_dropout=0.5)
    later.prepare(range(3), ProcessGroup(), Watcher())
    assert later.base.calls == [], "another run finds it on disk"
    again = [later.sample(index, position) for position in range(10) for index in range(3)]
    assert all(torch.equal(a.latent, b.latent) and same(a.given, b.given) for a, b in zip(first, again, strict=True))


def test_encoders_of_another_base_find_nothing_of_the_first(tmp_path: Path) -> None:
    store_of(drawn(2), Cache(tmp_path)).prepare(range(2), ProcessGroup(), Watcher())
    other = store_of(drawn(2), Cache(tmp_path))
    other.base.identity = lambda what: f"another {what}"
    other.prepare(range(2), ProcessGroup(), Watcher())
    assert other.base.calls.count("latent") == 2


def test_clips_share_the_frames_they_have_in_common() -> None:
    store = store_of(clips(6), family=Family.SVD)
    store.prepare(range(len(store.data)), ProcessGroup(), Watcher())
    assert store.base.calls.count("latent") <= 6
    sample = store.sample(0, 0)
    assert sample.latent.shape == (3, 4, CELLS, CELLS) and sample.hint.shape == (3, 3, SIDE, SIDE)


def test_a_sample_is_what_the_dataset_gave() -> None:
    store = store_of(drawn(2))
    found, given = store.sample(1, 5), store.data.load(1)
    assert torch.equal(found.hint, given.hints.movedim(-1, 1)) and found.hint.is_contiguous()
    assert found.size == (SIDE, SIDE) and found.caption == given.caption
    assert given.mask is not None and torch.equal(found.mask, given.mask)


def test_broken_samples_are_left_out_and_told(loaded_studio: Studio, tmp_path: Path) -> None:
    watch = Watcher()
    path = train_in(tmp_path, base_of(loaded_studio), small(), watch, data=Torn(4, [1, 3]))
    assert path.is_file()
    assert [line for line in watch.said if line.startswith("left out")] == [
        "left out: scene 1: is cut off",
        "left out: scene 3: is cut off",
    ]


def test_a_set_of_which_nothing_can_be_read_is_refused(loaded_studio: Studio, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="None of the 2 samples can be read. The first: scene 0: is cut off"):
        train_in(tmp_path, base_of(loaded_studio), small(), data=Torn(2, [0, 1]))


def test_a_sample_that_breaks_on_the_way_is_replaced_by_another_of_its_size() -> None:
    from comfyui_controlnext.controlnext_training.encoded import Prefetcher

    data, watch = Torn(4, []), Watcher()
    ahead = Prefetcher(store_of(data), [0, 2, 3], watch.say)
    data.torn = {2}
    first = ahead.get(((0, 0), (2, 1)), [((2, 2),)])
    second = ahead.get(((2, 2),), [])
    assert [sample.caption for sample in (*first, *second)] == [data.captions[i] for i in (0, 3, 3)]
    assert watch.said == ["from now on left out: scene 2: is cut off"], "and it is said once"
    data.torn = {0, 2, 3}
    with pytest.raises(DatasetError, match="None of the samples of 64x64 can be read any more"):
        ahead.get(((0, 0),), [])
    ahead.close()


def test_what_is_read_ahead_is_what_was_asked_for() -> None:
    from comfyui_controlnext.controlnext_training.encoded import Prefetcher

    store = store_of(drawn(4), hint_dropout=0.5)
    ahead = Prefetcher(store, range(4), Watcher().say)
    asked = [((0, 0), (1, 1)), ((2, 2), (3, 3)), ((1, 4), (0, 5))]
    for number, wanted in enumerate(asked):
        coming = [((3, 9),)] if number == 1 else asked[number + 1 :]  # once it was told something else
        found = ahead.get(wanted, coming)
        expected = [store.sample(index, position) for index, position in wanted]
        assert all(torch.equal(a.hint, b.hint) for a, b in zip(found, expected, strict=True))
    ahead.close()


def test_stopping_while_samples_are_encoded_does_not_lose_any() -> None:
    watch = Watcher(stop_at=0)
    store = store_of(drawn(5))
    usable, broken = store.prepare(range(5), ProcessGroup(), watch)
    assert usable == list(range(5)) and not broken and watch.lines == []
