"""The samples of a run: which train, which are validated on, all of them encoded before the first step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .base_model.encode import BaseWithEncoders
from .config import TrainConfig
from .data.samples import ControlDataset
from .distributed import ProcessGroup
from .encoded import Store, TensorCache
from .journal import Observer
from .readers import Readers
from .split import SavedData, split

SIDES = re.compile(r"\b(left|right)(wards?|most)?\b", re.IGNORECASE)
"""Words that a mirrored picture contradicts."""


@dataclass(frozen=True)
class RunSamples:
    """Indices that can be read, each with the store that encodes it."""

    store: Store
    training: list[int]
    validation_store: Store
    validation: list[int]
    tensors: dict[str, Tensor]
    """Identities of all samples and of those held out, for saved states."""
    left_out: int
    """Number of samples that cannot be read."""


def encode_samples(
    base: BaseWithEncoders,
    data: ControlDataset,
    held_out: ControlDataset | None,
    config: TrainConfig,
    cache: TensorCache,
    group: ProcessGroup,
    observer: Observer,
    saved: SavedData | None = None,
    readers: Readers | None = None,
) -> RunSamples:
    """Encode every sample that the cache lacks, and say which cannot be read.

    held_out: for validation; None to take some of `data`; saved: samples of the state to resume; readers: read files
    ahead, None to read each where it is needed.

    Raises DatasetError where no sample can be read.
    """
    store = validation_store = Store(base, data, config, cache, readers)
    if line := _of_sides([caption for index, caption in enumerate(data.captions) if data.share(index).flip]):
        observer.say(line)
    count = min(len(data), config.max_samples or len(data))
    readable, broken = store.prepare(range(count), group, observer)
    parts = split(data, count, readable, config, held_out is not None, saved)
    validation = parts.validation
    for line in parts.said:
        observer.say(line)
    if held_out is not None and config.validate_every:
        validation_store = Store(base, held_out, config, cache, readers)
        first = range(min(len(held_out), config.validation_samples))
        validation, unreadable = validation_store.prepare(first, group, observer)
        broken += unreadable
    for name, why in broken:
        observer.say(f"left out: {name}: {why}")
    return RunSamples(store, parts.training, validation_store, validation, parts.tensors, len(broken))


def _of_sides(captions: Sequence[str]) -> str:
    """Warning on captions that mirrored pictures contradict; '' where there are none."""
    found = [caption for caption in captions if SIDES.search(caption)]
    return f"flip: {len(found)} captions name a side, which is wrong when mirrored: {found[0]}" if found else ""
