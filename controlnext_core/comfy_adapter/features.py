"""What the encoders make of hints, kept for every control of ours in one cache."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator

import torch
from comfy.cli_args import args
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..feature_cache import FeatureCache, GroupKey
from ..memory import ROWS_AT_ONCE

CACHE = FeatureCache(pinned=not getattr(args, "disable_pinned_memory", False))
"""Outlives nodes and runs: a queue run with another seed finds the features of the one before."""

LIVE: Counter[str] = Counter()
"""Networks alive, by the identity of what they compute."""


Common = tuple[Hashable, ...]
"""What features depend on beside the encoder, the hint and the row: the timestep, sizes, the dtype, .."""


def cached_rows(
    group: GroupKey,
    rows: tuple[int, ...],
    common: Common,
    device: torch.device,
    encode: Callable[[tuple[int, ...]], Iterator[tuple[Common, Tensor]]],
    recent: dict[Hashable, Tensor],
    at_once: int = ROWS_AT_ONCE,
) -> Tensor:
    """The features of each row's hint, (len(rows), ...) on `device`: from the cache, or encoded and kept.

    encode: rows, each once -> their features for `common`, and then any that will be needed later; it goes on after
    what it gave is kept. recent: what the call before used and, afterwards, what this one did, so that neighbouring
    windows share frames where the cache has no room. at_once: rows that `encode` is given at most.
    Never write to the result.
    """
    keys = {row: (group, row, *common) for row in dict.fromkeys(rows)}
    found = {
        row: recent[key] if key in recent else CACHE.get(group, (row, *common), device) for row, key in keys.items()
    }
    missing = [row for row, value in found.items() if value is None]
    for start in range(0, len(missing), at_once):
        batch = tuple(missing[start : start + at_once])
        for of_what, encoded in encode(batch):
            for row, part in zip(batch, encoded.split(1), strict=True):
                value = part.clone() if len(batch) > 1 else part
                CACHE.put(group, (row, *of_what), value)
                if of_what == common:
                    found[row] = value
    recent.clear()
    recent.update((keys[row], value) for row, value in found.items() if value is not None)
    values = [value for row in rows if (value := found[row]) is not None]
    return values[0] if len(values) == 1 else torch.cat(values)


def group_of(uid: str, hint_id: str, patcher: ModelPatcher) -> GroupKey:
    """The group of what this network, on its own device, makes of a hint."""
    return GroupKey(uid, hint_id, str(patcher.load_device))


def keep_features_of(net: nn.Module, uid: str) -> None:
    """Let the features of `uid` live as long as any network with these weights does: a file may be loaded twice."""
    LIVE[uid] += 1
    weakref.finalize(net, _forget, uid)


def _forget(uid: str) -> None:
    LIVE[uid] -= 1
    if LIVE[uid] <= 0:
        del LIVE[uid]
        CACHE.drop(uid)


def drop_features(uid: str, patcher: ModelPatcher, unpatch_all: bool = True) -> None:
    """ON_DETACH callback of an encoder: the host takes it off the device, its features there go too."""
    if unpatch_all:
        CACHE.drop(uid, str(patcher.load_device))
