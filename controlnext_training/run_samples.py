"""Samples of a run, for training and for validation, all encoded before the first step."""

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
"""Words that are wrong in the caption of a mirrored picture."""


@dataclass(frozen=True)
class RunSamples:
    """Indices of readable samples, each with the store that encodes them."""

    store: Store
    training: list[int]
    validation_store: Store
    validation: list[int]
    tensors: dict[str, Tensor]
    """Identities of all samples and of the held-out ones, for saved states."""
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
    """Encode every sample that the cache lacks, and report unreadable ones.

    held_out: for validation; None to hold out some of `data`; saved: samples of the state to resume; readers: prefetch
    files, None: each file is read when it is needed. Raises DatasetError where no sample can be read.
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
    """Warning about captions that are wrong for mirrored pictures; '' without any."""
    found = [caption for caption in captions if SIDES.search(caption)]
    return f"flip: {len(found)} captions name a side, which is wrong when mirrored: {found[0]}" if found else ""
