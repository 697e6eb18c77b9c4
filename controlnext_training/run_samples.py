"""The samples of a run: which train, which are validated on, all of them encoded before the first step."""

from __future__ import annotations

from dataclasses import dataclass

from .base_model.encode import BaseWithEncoders
from .config import TrainConfig
from .data.samples import ControlDataset
from .distributed import ProcessGroup
from .encoded import Store, TensorCache
from .journal import Observer


@dataclass(frozen=True)
class RunSamples:
    """Indices that can be read, each with the store that encodes it."""

    store: Store
    training: list[int]
    validation_store: Store
    validation: list[int]
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
) -> RunSamples:
    """Encode every sample that the cache lacks, and say which cannot be read.

    held_out: for validation; None to take some of `data`. Raises DatasetError where no sample can be read.
    """
    store = validation_store = Store(base, data, config, cache)
    count = min(len(data), config.max_samples or len(data))
    readable, broken = store.prepare(range(count), group, observer)
    training, validation = split(readable, config, held_out is not None)
    if held_out is not None and config.validate_every:
        validation_store = Store(base, held_out, config, cache)
        first = range(min(len(held_out), config.validation_samples))
        validation, unreadable = validation_store.prepare(first, group, observer)
        broken += unreadable
    for name, why in broken:
        observer.say(f"left out: {name}: {why}")
    return RunSamples(store, training, validation_store, validation, len(broken))


def split(indices: list[int], config: TrainConfig, held_out: bool) -> tuple[list[int], list[int]]:
    """(training, validation) samples. Of fewer than ten none is held out: validation then uses training samples."""
    if held_out or not config.validate_every:
        return indices, []
    spare = min(config.validation_samples, len(indices) // 10)
    return indices[spare:], indices[: spare or config.validation_samples]
