"""Split of a run's samples into training and validation by content, and comparison with that of a saved state."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import TrainConfig
from .data.samples import ControlDataset

NAMED = 3
"""Number of new samples that a message names."""


@dataclass(frozen=True)
class SavedData:
    """Samples of a saved state."""

    tensors: Mapping[str, Tensor]
    """Identities of all samples (`samples`) and of the held-out ones (`held`); {} in states of earlier versions."""
    fingerprint: str


@dataclass(frozen=True)
class Split:
    """Indices of the training and of the validation samples."""

    training: list[int]
    validation: list[int]
    tensors: dict[str, Tensor]
    """Identities to save, in the form of SavedData."""
    said: list[str] = field(default_factory=list)
    """Messages about differences from the saved state."""


def identity(data: ControlDataset, index: int) -> int:
    """Identity of a sample's content in 64 bits: its pictures, hints, masks and crop, without its caption."""
    keys = " ".join(data.frame_keys(index, 0, 0))
    return int.from_bytes(hashlib.blake2b(keys.encode(), digest_size=8).digest(), "little", signed=True)


def split(
    data: ControlDataset,
    count: int,
    readable: Sequence[int],
    config: TrainConfig,
    held_out: bool,
    saved: SavedData | None = None,
) -> Split:
    """Draw the samples to hold out, or find those that a saved state holds out.

    count: samples that the run may use, of which `readable` can be read; held_out: True means that validation has
    separate data; False holds out some of these. With fewer than ten samples none is held out: validation then uses
    training samples. The draw orders samples by a hash of seed and content. Samples that a state holds out are never
    trained on.
    """
    identities = [identity(data, index) for index in range(count)]
    said = [] if saved is None else _changes(data, identities, saved)
    held: set[int] = set()
    if held_out or not config.validate_every:
        training, validation = list(readable), []
        if saved is not None and "held" in saved.tensors:  # they stay held out when validation is enabled again
            held = set(saved.tensors["held"].tolist())
            training = [index for index in readable if identities[index] not in held]
    else:
        validation = _held(identities, readable, config, saved)
        held = {identities[index] for index in validation}
        training = [index for index in readable if identities[index] not in held]
        validation = (validation or list(readable))[: config.validation_samples]
    tensors = {"samples": torch.tensor(identities), "held": torch.tensor(sorted(held), dtype=torch.int64)}
    return Split(training or list(readable), validation, tensors, said)


def _held(identities: list[int], readable: Sequence[int], config: TrainConfig, saved: SavedData | None) -> list[int]:
    spare = min(config.validation_samples, len(readable) // 10)
    if saved is not None and not saved.tensors:
        return list(readable[:spare])
    kept = set() if saved is None else set(saved.tensors["held"].tolist())
    if kept:
        return [index for index in readable if identities[index] in kept]
    return sorted(readable, key=lambda index: _rank(config.seed, identities[index]))[:spare]


def _rank(seed: int, identity: int) -> bytes:
    return hashlib.blake2b(f"{seed}/validation split/{identity}".encode(), digest_size=8).digest()


def _changes(data: ControlDataset, identities: list[int], saved: SavedData) -> list[str]:
    """Messages about differences of the data from those of the saved state."""
    if not saved.tensors:
        return [
            "data: the saved state is of an earlier version and does not say which samples it trained on. Validation "
            "keeps the first of the data, as it had them."
        ]
    before = set(saved.tensors["samples"].tolist())
    new = [index for index, own in enumerate(identities) if own not in before]
    gone = len(before - set(identities))
    if not new and not gone:
        if saved.fingerprint == data.fingerprint:
            return []
        return ["data: captions or the order of files differ from those that the saved state trained on."]
    names = ", ".join(_name(data, index) for index in new[:NAMED])
    more = f" (the first: {names})" if new else ""
    return [
        f"data: {len(new)} samples are new or replaced{more} and {gone} are gone since the state was saved; the order "
        "of samples is another from here on. Samples that were held out stay so."
    ]


def _name(data: ControlDataset, index: int) -> str:
    items = getattr(data, "items", None)
    return f"sample {index}" if items is None else str(items[index].clip.images.label)
