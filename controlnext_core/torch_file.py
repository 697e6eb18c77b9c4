"""Table of a torch file (.ckpt, .bin, .pt, .pth), read from its pickle without executing anything in it.

The unpickler recognises tensors only, and replaces each by its shape and position in the file: no function of a file is
called, no class but dictionaries is made, and no memory is allocated for values. Source of the two formats:
torch/serialization.py (`_save`, `_legacy_save`).
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch

from .stored import ALLOWANCE, MAX_TENSORS, Entry, KindError, StoredError, Table, check_entry, stamp_of

MAX_PICKLE = 4 << 20
"""Largest size in bytes of a file's pickle; that of an SDXL checkpoint is a tenth of it."""
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.int8,
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
}
OTHERS = {
    ("torch._utils", "_rebuild_sparse_tensor"): "sparse",
    ("torch._utils", "_rebuild_qtensor"): "quantised",
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): "without numbers",
    ("torch._utils", "_rebuild_nested_tensor"): "nested",
    ("torch._utils", "_rebuild_wrapper_subclass"): "of a class of its own",
    ("torch._tensor", "_rebuild_from_type_v2"): "of a class of its own",
}
"""Tensors other than dense numeric ones -> their kind."""
HARMLESS = {
    *(("torch", "device"), ("torch", "Size"), ("collections", "Counter"), ("_codecs", "encode")),
    *(("torch.serialization", "_get_layout"), ("torch", "per_tensor_affine"), ("torch", "per_channel_affine")),
}
"""Entries beside tensors in valid files, which are skipped."""


class CodeError(StoredError):
    """Error for a pickle that holds more than tensors."""


@dataclass(frozen=True, slots=True)
class _Type:
    """Storage class or number format of torch."""

    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, slots=True)
class _Claim:
    """Tensor as the pickle describes it."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Other:
    kind: str


@dataclass(frozen=True, slots=True)
class _Named:
    """Factory of objects that are skipped, or refused by their kind."""

    kind: str

    def __call__(self, *args: Any) -> _Other:
        return _Other(self.kind)


@dataclass(frozen=True, slots=True)
class _Makes:
    """Stand-in that the unpickler calls in place of a function of torch."""

    make: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)


def _claim(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> _Claim:
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise StoredError("a tensor is not described soundly")
    if len(shape) != len(stride):
        raise StoredError("a tensor has a shape and strides of different lengths")
    dtype = rest[2].dtype if len(rest) > 2 and isinstance(rest[2], _Type) else storage.dtype  # _rebuild_tensor_v3
    return _Claim(storage, dtype, offset, tuple(shape), tuple(stride))


def _parameter(data: Any, *rest: Any) -> Any:
    return data


MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _claim,
    ("torch._utils", "_rebuild_tensor_v2"): _claim,
    ("torch._utils", "_rebuild_tensor_v3"): _claim,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}


BARRED = (
    *(pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4),
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
)
"""Pickle operations that tensors do not need, and that make objects or allocate memory by a number in the file."""


class _TensorsAlone(pickle._Unpickler):  # the one in C takes memory by numbers in the file
    """Unpickler that reads tensors as claims, and refuses all else."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        code: step for code, step in pickle._Unpickler.dispatch.items() if bytes([code]) not in BARRED
    }

    def load_build(self) -> None:
        """Attributes of an object (the `_metadata` of a state_dict) are passed over."""
        self.stack.pop()  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key == ("collections", "OrderedDict"):
            return OrderedDict
        if key in MAKERS:
            return _Makes(MAKERS[key])
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _Type(STORAGES[name])
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return _Type(getattr(torch, name))
        if key in OTHERS or key in HARMLESS:
            return _Named(OTHERS.get(key, ""))
        raise CodeError(f"{module[:80]}.{name[:80]}")

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _Type):
            raise StoredError("a storage is not described soundly")
        if type(pid[2]) is not str or type(pid[4]) is not int or pid[4] < 0:
            raise StoredError("a storage is not described soundly")
        if len(pid) > 5 and pid[5] is not None:
            raise StoredError("a storage is a part of another, as very old versions of torch wrote them")
        return _Storage(pid[2], pid[1].dtype, pid[4])


@dataclass(frozen=True, slots=True)
class _Place:
    start: int
    length: int


def read_table(path: Path) -> Table:
    """Read names, shapes and positions of the named tensors. Raises StoredError, CodeError for more than tensors,
    OSError.

    Damaged pickles and archives raise the exceptions of their readers.
    """
    with open(path, "rb") as file:
        stamp = stamp_of(file)
        zipped = zipfile.is_zipfile(file)
        file.seek(0)
        content, places = (_zipped if zipped else _legacy)(file, stamp[0])
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        kind = "Tensor" if isinstance(content, (_Claim, _Other)) else type(content).__name__
        raise KindError(f"holds a {kind}, not named tensors")
    entries = {}
    for name, value in content.items():
        if isinstance(value, _Other) and value.kind:
            raise KindError(f"its tensor '{str(name)[:80]}' is {value.kind}, and plain numbers are needed")
        if isinstance(value, _Claim) and isinstance(name, str):
            entries[name] = _entry(name, value, places, stamp[0])
    return Table(path, entries, stamp)


def _entry(name: str, claim: _Claim, places: dict[str, _Place], size: int) -> Entry:
    """Entry of a claim, checked against the length of its storage in the file."""
    check_entry(name, claim.shape, max(size, ALLOWANCE))
    place = places.get(claim.storage.key)
    if place is None or claim.storage.count * claim.storage.dtype.itemsize > place.length:
        raise StoredError(f"the numbers of '{name}' are missing or cut off")
    item, count = claim.dtype.itemsize, math.prod(claim.shape)
    span = 1 + sum((side - 1) * step for side, step in zip(claim.shape, claim.stride, strict=True)) if count else 0
    start = claim.offset * item
    if start + span * item > place.length:
        raise StoredError(
            f"'{name}' reaches to byte {start + span * item:,} of the {place.length:,} that the file has of it"
        )
    format = str(claim.dtype).removeprefix("torch.")
    stride = None if _contiguous(claim.shape, claim.stride) or not count else claim.stride
    return Entry(claim.dtype, format, claim.shape, place.start + start, span * item, stride)


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    step = 1
    for side, found in zip(reversed(shape), reversed(stride), strict=True):
        if side != 1 and found != step:
            return False
        step *= side
    return True


def _zipped(file: BinaryIO, size: int) -> tuple[Any, dict[str, _Place]]:
    """Content and storages of a file in the zip format. The archive's directory is checked before anything is read."""
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        _check_directory(parts, size)
        (pickled,) = [part for part in parts if part.filename.endswith("/data.pkl")]
        root = pickled.filename.removesuffix("data.pkl")
        order = next((part for part in parts if part.filename == f"{root}byteorder"), None)
        if order is not None and archive.read(order) != b"little":
            raise StoredError("its numbers are not in little-endian order")
        if pickled.file_size > MAX_PICKLE:
            raise StoredError(f"its list of tensors is {pickled.file_size:,} bytes long")
        with archive.open(pickled) as stream:
            content = _TensorsAlone(stream).load()
        data = f"{root}data/"
        stored = {p.filename.removeprefix(data): p for p in parts if p.filename.startswith(data)}
        return content, {key: _place(file, part, size) for key, part in stored.items()}


def _check_directory(parts: list[zipfile.ZipInfo], size: int) -> None:
    if len(parts) > MAX_TENSORS:
        raise StoredError(f"its archive has {len(parts):,} parts")
    if any(part.compress_type != zipfile.ZIP_STORED or part.flag_bits & 1 for part in parts):
        raise StoredError("its archive is compressed or encrypted, as torch does not write it")
    total = sum(part.file_size for part in parts)
    if total > size:
        raise StoredError(f"its archive claims {total:,} bytes, and the file has {size:,}")


def _place(file: BinaryIO, part: zipfile.ZipInfo, size: int) -> _Place:
    """Position of the bytes of an archive's part, after its local header, whose names may have another length."""
    file.seek(part.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise StoredError("its archive is damaged")
    start = part.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + part.file_size > size:
        raise StoredError("its archive ends inside a tensor")
    return _Place(start, part.file_size)


def _legacy(file: BinaryIO, size: int) -> tuple[Any, dict[str, _Place]]:
    """Content and storages of a file in the format before torch 1.6: pickles, then the values of all storages."""
    bounded = _Bounded(file, MAX_PICKLE)
    if _TensorsAlone(bounded).load() != LEGACY_MAGIC:
        raise StoredError("it is not a torch file")
    _TensorsAlone(bounded).load()  # version
    system = _TensorsAlone(bounded).load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise StoredError("its numbers are not in little-endian order")
    wanted = _Storages(bounded)
    content = wanted.load()
    keys = _TensorsAlone(bounded).load()
    if not isinstance(keys, list) or len(keys) > MAX_TENSORS:
        raise StoredError("its list of storages is not sound")
    places, at = {}, bounded.place
    for key in keys:
        file.seek(at)
        (count,) = struct.unpack("<q", file.read(8))
        storage = wanted.seen.get(key) if isinstance(key, str) else None
        if storage is None or count != storage.count:
            raise StoredError("its list of storages is not sound")
        places[key] = _Place(at + 8, count * storage.dtype.itemsize)
        at += 8 + places[key].length
        if at > size:
            raise StoredError("it ends inside a tensor")
    return content, places


class _Storages(_TensorsAlone):
    """Unpickler that records the storages it reads."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.seen: dict[str, _Storage] = {}

    def persistent_load(self, pid: Any) -> _Storage:
        storage = super().persistent_load(pid)
        if self.seen.setdefault(storage.key, storage) != storage:
            raise StoredError("a storage is described twice")
        return storage


class _Bounded:
    """File of which at most `limit` bytes are read; `place` is the number of bytes read so far."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self.file, self.limit, self.place = file, limit, 0

    def read(self, count: int) -> bytes:
        return self._took(self.file.read(self._allowed(count)))

    def readline(self) -> bytes:
        return self._took(self.file.readline(self.limit - self.place + 1))

    def _allowed(self, count: int) -> int:
        if count < 0 or self.place + count > self.limit:
            raise StoredError(f"its list of tensors is longer than {self.limit:,} bytes")
        return count

    def _took(self, found: bytes) -> bytes:
        self.place += len(found)
        self._allowed(0)
        return found
