"""Random tensors of full shape that take little space in a file, and atomic writing.

A torch file stores strides, so many tensors may be overlapping windows into one short random vector. safetensors files
are dense: use them for small tensors only.
"""

from __future__ import annotations

import math
import os
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
POOL_LENGTH = 65536  # values per pool; one pool per standard deviation


class Pools:
    """Pools of random values, read in windows of any shape; equal seed and name give equal values."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float16) -> None:
        self._seed = seed
        self._dtype = dtype
        self._pools: dict[int, Tensor] = {}
        self._constants: dict[float, Tensor] = {}

    def normal(self, name: str, shape: tuple[int, ...], std: float) -> Tensor:
        """Normal values of `shape`; std is rounded to a factor of sqrt(2), so that few pools are needed.

        Rows (dimension 0) are windows of the pool, shifted against each other. Raises ValueError if a row is longer
        than a pool.
        """
        half_octave = round(2 * math.log2(std))
        pool = self._pools.get(half_octave)
        if pool is None:
            numbers = torch.randn(POOL_LENGTH, generator=_generator(f"{self._seed} std {half_octave}"))
            pool = self._pools[half_octave] = (numbers * 2 ** (half_octave / 2)).to(self._dtype)
        rows, columns = shape[0], math.prod(shape[1:])
        shift = max(1, min(columns, (POOL_LENGTH // 2 - columns) // rows))
        room = POOL_LENGTH - (rows - 1) * shift - columns
        if room < 1:
            raise ValueError(f"{name}: shape {shape} needs a pool longer than {POOL_LENGTH}; raise POOL_LENGTH.")
        offset = zlib.crc32(f"{self._seed} {name}".encode()) % room
        inner = [math.prod(shape[axis + 1 :]) for axis in range(1, len(shape))]
        return pool.as_strided(shape, [shift, *inner], offset)

    def constant(self, value: float, shape: tuple[int, ...]) -> Tensor:
        """Tensor of `shape` filled with `value`, stored once."""
        if value not in self._constants:
            self._constants[value] = torch.tensor(value, dtype=self._dtype)
        return self._constants[value].expand(shape)


def random_tensor(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Dense fp32 tensor of `shape` with normal values; depends only on seed and name."""
    return torch.randn(shape, generator=_generator(f"{seed} {name}")) * std


def uniform_tensor(name: str, shape: tuple[int, ...], bound: float, seed: int) -> Tensor:
    """Dense fp32 tensor of `shape`, uniform in [-bound, bound]; depends only on seed and name."""
    return (torch.rand(shape, generator=_generator(f"{seed} {name}")) * 2 - 1) * bound


def _generator(text: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))


def save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write `tensors` to `path` atomically; the suffix selects torch or safetensors. Returns the path."""
    path = Path(path)
    if path.suffix.lower() == ".safetensors":
        dense = {key: value.contiguous() for key, value in tensors.items()}
        return write_atomically(path, lambda file: safetensors.torch.save_file(dense, file, metadata))
    if path.suffix.lower() not in TORCH_SUFFIXES:
        raise ValueError(f"{path}: use .safetensors or one of {', '.join(TORCH_SUFFIXES)}.")
    content = {"state_dict": dict(tensors)} if path.suffix.lower() == ".ckpt" else dict(tensors)
    return write_atomically(path, lambda file: _torch_save(content, file))


def _torch_save(content: object, file: Path) -> None:
    with file.open("wb") as stream:  # a stream, not a name: torch writes a name into the archive
        torch.save(content, stream)


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Write `path` atomically: `write` fills a temporary file beside it, which is then renamed. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
