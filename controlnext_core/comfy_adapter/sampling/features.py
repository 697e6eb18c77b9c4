"""Features of hints: one cache for all controls of this pack."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

import torch
from comfy.cli_args import args
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...feature_cache import FeatureCache, GroupKey
from ...latent_clips import Frames
from ...memory import ROWS_AT_ONCE

CACHE = FeatureCache(pinned=not getattr(args, "disable_pinned_memory", False))
"""Cache that outlives nodes and runs: a queued run with another seed reuses the features of the previous run."""

LIVE: Counter[str] = Counter()
"""Number of living networks per identity of their output."""


Row = int | Frames
"""Row of a hint batch, or a group of its frames whose features are averaged."""
R = TypeVar("R", bound=Hashable)
R_contra = TypeVar("R_contra", bound=Hashable, contravariant=True)


class HintEncoder(Protocol[R_contra]):
    """Encoder of hints into features of one size, type and dtype."""

    def key(self, timestep: float) -> tuple[Hashable, ...]:
        """Cache key of the features beside encoder, hint and row: timestep, sizes, dtype."""

    def encode(self, rows: tuple[R_contra, ...], timestep: float) -> Tensor:
        """Encode these rows of the hint for one timestep:

        (len(rows), ...). Called for several timesteps in succession.
        """


def cached_rows(
    group: GroupKey,
    rows: tuple[R, ...],
    encoder: HintEncoder[R],
    timestep: float,
    later: Callable[[], list[float]],
    device: torch.device,
    recent: dict[Hashable, Tensor],
    at_once: int = ROWS_AT_ONCE,
) -> Tensor:
    """Features of each row's hint, (len(rows), ...) on `device`: read from the cache, or encoded and then cached.

    later: timesteps that the run will need, encoded in the same pass while the cache has room; recent: features used by
    the previous call, replaced by those of this call, so that neighbouring windows share frames where the cache is
    full; at_once: largest number of rows in one pass. The result must not be modified.
    """
    common = encoder.key(timestep)
    keys = {row: (group, row, *common) for row in dict.fromkeys(rows)}
    found = {
        row: recent[key] if key in recent else CACHE.get(group, (row, *common), device) for row, key in keys.items()
    }
    missing = [row for row, value in found.items() if value is None]
    timesteps = (timestep, *later()) if missing else ()
    for start in range(0, len(missing), at_once):
        found.update(_encoded(group, tuple(missing[start : start + at_once]), encoder, timesteps))
    recent.clear()
    recent.update((keys[row], value) for row, value in found.items() if value is not None)
    values = [value for row in rows if (value := found[row]) is not None]
    return values[0] if len(values) == 1 else torch.cat(values)


def _encoded(
    group: GroupKey, rows: tuple[R, ...], encoder: HintEncoder[R], timesteps: tuple[float, ...]
) -> dict[R, Tensor]:
    """Row -> features at the first timestep. These are cached, and those at further timesteps while there is room."""
    found: dict[R, Tensor] = {}
    last: Tensor | None = None
    for timestep in timesteps:
        common = encoder.key(timestep)
        if last is not None and not CACHE.makes_room(last):
            break
        if last is not None and all(CACHE.holds(group, (row, *common)) for row in rows):
            continue
        last = encoder.encode(rows, timestep)
        for row, part in zip(rows, last.split(1), strict=True):
            value = part.clone() if len(rows) > 1 else part
            CACHE.put(group, (row, *common), value)
            found.setdefault(row, value)
    return found


def group_of(uid: str, hint_id: str, patcher: ModelPatcher) -> GroupKey:
    """Cache group of this network's features for a hint, on the network's device."""
    return GroupKey(uid, hint_id, str(patcher.load_device))


def keep_features_of(net: nn.Module, uid: str) -> None:
    """Keep the features of `uid` while any network with these weights lives: a file may be loaded twice."""
    LIVE[uid] += 1
    weakref.finalize(net, _forget, uid)


def _forget(uid: str) -> None:
    LIVE[uid] -= 1
    if LIVE[uid] <= 0:
        del LIVE[uid]
        CACHE.drop(uid)


def drop_features(uid: str, patcher: ModelPatcher, unpatch_all: bool = True) -> None:
    """ON_DETACH callback of an encoder: drops its features on the device from which the host removes it."""
    if unpatch_all:
        CACHE.drop(uid, str(patcher.load_device))
