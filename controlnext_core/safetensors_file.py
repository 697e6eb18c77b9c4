"""Table of a safetensors file, read from its header.

Source of the format: the safetensors documentation, "Format": 8 bytes of length, a JSON object, then the values of all
tensors without gaps. Files that the safetensors library refuses are refused here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .stored import MAX_TENSORS, Entry, StoredError, Table, check_entry, stamp_of

MAX_HEADER = 25_000_000
"""Largest header in bytes; those of the largest published checkpoints are far below one million, and Python reads this
in a second."""

DTYPES: dict[str, torch.dtype | None] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "U64": None,
    "U32": None,
    "U16": None,
    "F8_E8M0": None,
    "F6_E2M3": None,
    "F6_E3M2": None,
    "F4": None,
}
BITS = {"U64": 64, "U32": 32, "U16": 16, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
"""Bits per value of the formats that are listed but not read."""


def read_table(path: Path) -> Table:
    """Read names, shapes, positions and metadata. Raises StoredError, OSError, ValueError."""
    with open(path, "rb") as file:
        stamp = stamp_of(file)
        header, start = _read_header(file, stamp[0])
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StoredError("its metadata is not a table of texts")
    if len(header) > MAX_TENSORS:
        raise StoredError(f"it lists {len(header):,} tensors, and no more than {MAX_TENSORS:,} are read")
    entries = {name: _entry(name, about, start, stamp[0]) for name, about in header.items()}
    _check_places(entries, start, stamp[0])
    return Table(path, entries, stamp, metadata)


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """Read the JSON object; returns it with the position where the values start."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise StoredError(f"its header claims {length:,} bytes, more than the file has")
    if length > MAX_HEADER:
        raise StoredError(f"its header is {length:,} bytes long, and no more than {MAX_HEADER:,} are read")
    text = file.read(length)
    if text[:1] != b"{":
        raise StoredError("its header is not a table")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise StoredError("its header is nested too deep") from None
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise StoredError("its header names something twice")
    return found


def _entry(name: str, about: Any, start: int, size: int) -> Entry:
    if not isinstance(about, dict) or about.keys() != {"dtype", "shape", "data_offsets"}:
        raise StoredError(f"'{name}' is not described as a tensor")
    format, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(format, str) or format not in DTYPES:
        raise StoredError(f"'{name}' is of the number format {str(format)[:20]}, which is not known")
    if not (_whole_numbers(shape) and _whole_numbers(offsets) and len(offsets) == 2):
        raise StoredError(f"'{name}' has no sound shape and place")
    check_entry(name, tuple(shape), size)
    dtype = DTYPES[format]
    bits = math.prod(shape) * (8 * dtype.itemsize if dtype else BITS[format])
    if bits != 8 * (offsets[1] - offsets[0]):
        raise StoredError(f"'{name}' of shape {shape} in {format} does not fit its {offsets[1] - offsets[0]} bytes")
    return Entry(dtype, format, tuple(shape), start + offsets[0], offsets[1] - offsets[0])


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**64 for number in value)


def _check_places(entries: dict[str, Entry], start: int, size: int) -> None:
    """Check that the tensors follow each other without gaps, up to the end of the file."""
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].length)):
        if entry.start != at:
            raise StoredError(f"'{name}' does not begin where the tensor before it ends")
        at += entry.length
    if at != size:
        raise StoredError(f"its tensors end at {at:,} bytes, and the file has {size:,}")
