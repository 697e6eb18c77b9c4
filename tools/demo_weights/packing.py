"""Packing of weights for distribution: integers of 8 or 6 bits and one factor per row (dimension 0).

8 bits are half the size of fp16, and closer to it than any 8-bit float: the error of a weight is at most 1/254 of the
largest in its row. 6 bits, four in three bytes, are for the controls, whose encoders forgive more: of nine factors for
each row the one with the least squared error is taken, so the largest weights may be cut. No computation uses these
files directly; `unpack` gives the fp16 weights for the host's loaders.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCALE = ".row_scale"  # suffix of the name of a packed tensor
SHAPE = ".shape"  # suffix of the name of a tensor packed in 6 bits, whose bytes stand in rows
SMALLEST = 4096  # values; smaller tensors are not packed
BITS = (6, 8)


def pack(tensors: Mapping[str, Tensor], bits: int = 8) -> dict[str, Tensor]:
    """Pack floating-point tensors of two or more dimensions with fp32 factors; the others stay in fp16.

    bits: of BITS. Raises ValueError for others.
    """
    if bits not in BITS:
        raise ValueError(f"bits: {bits} is not one of {', '.join(map(str, BITS))}.")
    packed = {}
    for name, value in tensors.items():
        if not value.is_floating_point():
            packed[name] = value
        elif value.ndim < 2 or value.numel() < SMALLEST:
            packed[name] = value.half()
        else:
            rows = value.float().flatten(1)
            largest = 2 ** (bits - 1) - 1
            scale = rows.abs().amax(1) / largest
            if bits == 8:
                packed[name] = _rounded(rows, scale, largest).view(value.shape)
            else:
                scale = _closest(rows, scale, largest)
                packed[name] = _in_six_bits(_rounded(rows, scale, largest))
                packed[name + SHAPE] = torch.tensor(value.shape)
            packed[name + SCALE] = scale
    return packed


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Unpack the tensors to fp16. Raises KeyError naming a packed tensor without its factors or its shape."""
    tensors = {}
    for name, value in packed.items():
        if name.endswith((SCALE, SHAPE)):
            continue
        if value.dtype not in (torch.int8, torch.uint8):
            tensors[name] = value
            continue
        bits = 8 if value.dtype is torch.int8 else 6
        for part in (SCALE,) if bits == 8 else (SCALE, SHAPE):
            if name + part not in packed:
                raise KeyError(f"{name} is in {bits} bits and {name}{part} is missing; the file is not whole.")
        shape = value.shape if bits == 8 else packed[name + SHAPE].tolist()
        rows = value.flatten(1) if bits == 8 else _from_six_bits(value)[:, : torch.Size(shape[1:]).numel()]
        tensors[name] = (rows.float() * packed[name + SCALE][:, None]).view(shape).half()
    return tensors


def _rounded(rows: Tensor, scale: Tensor, largest: int) -> Tensor:
    """Integers (R, N) of rows (R, N) in units of scale (R,), from -largest to largest."""
    return (rows / scale.clamp_min(1e-30)[:, None]).round().clamp(-largest, largest).to(torch.int8)


def _closest(rows: Tensor, scale: Tensor, largest: int) -> Tensor:
    """Factor (R,) of each row with the least squared error, of nine from 0.6 to 1 times `scale`."""
    best, least = scale, torch.full_like(scale, torch.inf)
    for share in torch.linspace(0.6, 1, 9):
        tried = scale * share
        error = (_rounded(rows, tried, largest).float() * tried[:, None] - rows).square().sum(1)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best


def _in_six_bits(values: Tensor) -> Tensor:
    """Integers (R, N) from -31 to 31 as bytes (R, 3 * ceil(N / 4))."""
    padded = torch.nn.functional.pad(values.to(torch.int32) + 32, (0, -values.shape[1] % 4))
    a, b, c, d = padded.unflatten(1, (-1, 4)).unbind(2)
    whole = torch.stack([a << 2 | b >> 4, (b & 15) << 4 | c >> 2, (c & 3) << 6 | d], 2)
    return whole.flatten(1).to(torch.uint8)


def _from_six_bits(packed: Tensor) -> Tensor:
    """Integers (R, 4 * M) of bytes (R, 3 * M)."""
    x, y, z = packed.to(torch.int32).unflatten(1, (-1, 3)).unbind(2)
    return torch.stack([x >> 2, (x & 3) << 4 | y >> 4, (y & 15) << 2 | z >> 6, z & 63], 2).flatten(1) - 32
