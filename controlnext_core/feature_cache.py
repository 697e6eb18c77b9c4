"""Cache of encoder outputs across conditionings, steps, seeds and queue runs, within two budgets.

An entry belongs to a group, (encoder, hint, device), and has a key inside it (timestep, row, size, dtype, ...). Entries
are stored on the compute device up to `device_budget` bytes, then in host memory up to `host_budget`: pinned where the
system allows it, so that copies back are asynchronous. When a budget is full, entries of groups that the current run
has not used are dropped, least recently used group first. Entries of the current run never evict each other: of a run
that does not fit, the earliest steps stay cached.

Several devices may sample at once, each in its own thread. One lock guards the store, and a group belongs to one
device: another one would not wait for its copies to host memory. The budgets apply to all devices together.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

MIB = 1024 * 1024
DEVICE_BUDGET = 384 * MIB
"""Bytes on the device; enough for SDXL at 1024 x 1024 over 30 steps: 320 x 128 x 128 x 2 bytes = 10.0 MiB a step, 300
MiB."""
HOST_BUDGET = 1024 * MIB

Tier = Literal["device", "host"]
Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class GroupKey:
    """Group of entries that are evicted together: features of one hint by one encoder on one device."""

    encoder: str
    hint: str
    device: str = ""


@dataclass(slots=True)
class _Group:
    run: int
    entries: dict[Hashable, Tensor] = field(default_factory=dict)


def _locked(method: Method) -> Method:
    """Method of a cache, run by one thread at a time."""

    @functools.wraps(method)
    def alone(self: FeatureCache, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return cast(Method, alone)


class FeatureCache:
    """Bounded two-tier store of tensors. Tensors that it returns are shared: never write to them."""

    def __init__(self, device_budget: int = DEVICE_BUDGET, host_budget: int = HOST_BUDGET, pinned: bool = True) -> None:
        """Budgets in bytes. pinned: True pins host memory where the system allows it; False never does."""
        self.budgets: dict[Tier, int] = {"device": device_budget, "host": host_budget}
        self.used: dict[Tier, int] = {"device": 0, "host": 0}
        self.pinned = pinned
        self.lock = threading.RLock()
        """Reentrant lock: a network that is collected inside a call drops its features in the same thread."""
        self._groups: OrderedDict[GroupKey, _Group] = OrderedDict()
        self._run = 0

    def __len__(self) -> int:
        return sum(len(group.entries) for group in self._groups.values())

    @_locked
    def begin_run(self) -> None:
        """Begin a run: entries used before may be evicted for those stored from now on."""
        self._run += 1

    @_locked
    def get(self, group: GroupKey, key: Hashable, device: torch.device) -> Tensor | None:
        """Return the entry on `device`, or None. Marks its group as used."""
        found = self._groups.get(group)
        if found is None:
            return None
        found.run = self._run
        self._groups.move_to_end(group)
        entry = found.entries.get(key)
        return None if entry is None else entry.to(device, non_blocking=True)

    @_locked
    def holds(self, group: GroupKey, key: Hashable) -> bool:
        """True: `get` would return the entry. False: it is not cached. Moves and marks nothing."""
        found = self._groups.get(group)
        return found is not None and key in found.entries

    @_locked
    def put(self, group: GroupKey, key: Hashable, value: Tensor) -> bool:
        """Cache a tensor where there is room. True: it is cached. False: there is no room."""
        target = self._groups.setdefault(group, _Group(self._run))
        target.run = self._run
        self._groups.move_to_end(group)
        if key in target.entries:
            self._forget(target, key)
        for tier in _tiers(value):
            if self._make_room(tier, self._bytes_in(tier, value)):
                target.entries[key] = kept = value if tier == _tier(value) else self._to_host(value)
                self.used[tier] += _bytes_held(kept)
                return True
        return False

    @_locked
    def makes_room(self, value: Tensor) -> bool:
        """True: a tensor such as this one could be cached. False: no room. May evict features of earlier runs."""
        return any(self._make_room(tier, self._bytes_in(tier, value)) for tier in _tiers(value))

    @_locked
    def drop(self, encoder: str, device: str | None = None) -> None:
        """Drop all features of one encoder. device: only those on this device; None: on all."""
        for key in [key for key in self._groups if key.encoder == encoder and device in (None, key.device)]:
            self._drop_group(key)

    def room(self, tier: Tier = "device") -> int:
        """Bytes that still fit into a tier without eviction."""
        return max(0, self.budgets[tier] - self.used[tier])

    @_locked
    def clear(self) -> None:
        """Drop all entries."""
        self._groups.clear()
        self.used = {"device": 0, "host": 0}

    def _make_room(self, tier: Tier, size: int) -> bool:
        """Make room for `size` bytes by evicting entries of earlier runs from this tier.

        True: they fit. False: they do not.
        """
        if size > self.budgets[tier]:
            return False
        for key, group in list(self._groups.items()):
            if self.used[tier] + size <= self.budgets[tier]:
                return True
            if group.run == self._run:
                continue
            for name in [name for name, entry in group.entries.items() if _tier(entry) == tier]:
                self._forget(group, name)
            if not group.entries:
                del self._groups[key]
        return self.used[tier] + size <= self.budgets[tier]

    def _drop_group(self, key: GroupKey) -> None:
        group = self._groups.pop(key)
        for name in list(group.entries):
            self._forget(group, name)

    def _forget(self, group: _Group, key: Hashable) -> None:
        entry = group.entries.pop(key)
        self.used[_tier(entry)] -= _bytes_held(entry)

    def _to_host(self, value: Tensor) -> Tensor:
        """Copy in host memory; from a CUDA device it is pinned and copied on that device's current stream."""
        if self._pins(value):
            try:
                kept = torch.empty_like(value, device="cpu", pin_memory=True)
            except RuntimeError:  # the system pins no more: WSL and Windows have limits far below the memory
                return value.cpu()
            return kept.copy_(value, non_blocking=True)
        return value.cpu()

    def _bytes_in(self, tier: Tier, value: Tensor) -> int:
        """Bytes that a tensor would take in this tier."""
        return pinned_bytes(value.nbytes) if tier == "host" and self._pins(value) else value.nbytes

    def _pins(self, value: Tensor) -> bool:
        return self.pinned and _is_cuda(value)


def _tiers(tensor: Tensor) -> tuple[Tier, ...]:
    """Tiers that may cache a tensor, in order of preference."""
    return ("host",) if tensor.device.type == "cpu" else ("device", "host")


def _tier(tensor: Tensor) -> Tier:
    return "host" if tensor.device.type == "cpu" else "device"


def _bytes_held(entry: Tensor) -> int:
    """Bytes taken by a cached tensor."""
    pinned = _tier(entry) == "host" and torch.cuda.is_initialized() and entry.is_pinned()
    return pinned_bytes(entry.nbytes) if pinned else entry.nbytes


def _is_cuda(value: Tensor) -> bool:
    return isinstance(value, Tensor) and value.is_cuda


def pinned_bytes(size: int) -> int:
    """Bytes that torch allocates to pin `size` bytes: `size` rounded up to a power of two."""
    return 1 << (size - 1).bit_length()
