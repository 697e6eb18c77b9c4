"""Tensors in a file: their positions, and how they are read into memory of their own.

No file is mapped: a mapped file that is truncated or overwritten while its weights are in use ends the process (SIGBUS)
or changes its results. Every size is checked against the file's before memory is allocated.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

MAX_DIMENSIONS = 8
MAX_NAME = 500
"""Largest length of a tensor's name in characters; real ones have a hundred, and analysing one takes quadratic time."""
MAX_TENSORS = 100_000
ALLOWANCE = 512 << 20
"""Bytes that tensors may claim in total where the file is smaller: those of a torch file may share their storage."""


class StoredError(ValueError):
    """Error for a file whose content contradicts its header. The message is a part of a sentence."""


class KindError(StoredError):
    """Error for an intact file of a kind that cannot be used here."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Record of one tensor in a file: format, shape and position."""

    dtype: torch.dtype | None
    """Number format; None: one that torch, or this pack, does not support."""
    format: str
    """Name of the number format in the file."""
    shape: tuple[int, ...]
    start: int
    """Offset in bytes from the start of the file."""
    length: int
    """Length in bytes in the file."""
    stride: tuple[int, ...] | None = None
    """Strides in elements; None: contiguous."""

    @property
    def claimed(self) -> int:
        """Bytes of the tensor in memory."""
        return math.prod(self.shape) * (self.dtype.itemsize if self.dtype else 0)


@dataclass(frozen=True, slots=True)
class Table:
    """Tensors of a file by name, with the file's stamp at the time of listing."""

    path: Path
    entries: dict[str, Entry]
    stamp: tuple[int, int]
    metadata: dict[str, str] = field(default_factory=dict)


def stamp_of(file: BinaryIO) -> tuple[int, int]:
    """Size in bytes and modification time in nanoseconds of an open file."""
    stat = os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of a file by name, each read at the time of access and not cached.

    Raises StoredError where the file has changed since it was listed, or where its tensors claim more bytes than it
    has.
    """

    def __init__(self, table: Table, names: Iterable[str]) -> None:
        self.table = table
        self.names = tuple(names)
        claimed = sum(table.entries[name].claimed for name in self.names)
        if claimed > max(ALLOWANCE, table.stamp[0]):
            raise StoredError(f"its tensors claim {claimed:,} bytes, and the file has {table.stamp[0]:,}")

    def __getitem__(self, name: str) -> Tensor:
        with open(self.table.path, "rb", buffering=0) as file:
            if stamp_of(file) != self.table.stamp:
                raise StoredError("it was changed while it was being read")
            return read_tensor(file, name, self.table.entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self.table.entries[name].shape

    def read_all(self) -> dict[str, Tensor]:
        """Read every tensor, opening the file once."""
        with open(self.table.path, "rb", buffering=0) as file:
            if stamp_of(file) != self.table.stamp:
                raise StoredError("it was changed while it was being read")
            return {name: read_tensor(file, name, self.table.entries[name]) for name in self.names}


def read_tensor(file: BinaryIO, name: str, entry: Entry) -> Tensor:
    """Read the tensor of an entry into memory of its own, contiguous. file: opened without a buffer."""
    if entry.dtype is None:
        raise KindError(f"'{name}' is of the number format {entry.format}, which is not supported")
    if entry.stride is None:
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        _fill(file, name, entry, tensor)
        return tensor
    whole = torch.empty(entry.length // entry.dtype.itemsize, dtype=entry.dtype)
    _fill(file, name, entry, whole)
    return whole.as_strided(entry.shape, entry.stride).contiguous()


def _fill(file: BinaryIO, name: str, entry: Entry, tensor: Tensor) -> None:
    if entry.length == 0:
        return
    rest = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
    file.seek(entry.start)
    while rest:
        count = file.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            raise StoredError(f"it ends inside '{name}'")
        rest = rest[count:]


def check_entry(name: str, shape: tuple[int, ...], size: int) -> None:
    """Raise StoredError for a name that no network gives, and for a shape that no file of `size` bytes holds."""
    if len(name) > MAX_NAME:
        raise StoredError(f"'{name[:80]}...', the name of a tensor, has {len(name):,} letters")
    if len(shape) > MAX_DIMENSIONS:
        raise StoredError(f"'{name}' has {len(shape)} dimensions")
    if any(not 0 <= side <= 2 * size for side in shape):  # two numbers of 4 bits in a byte
        raise StoredError(f"'{name}' has shape {list(shape)}")
