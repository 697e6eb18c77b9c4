"""Packing of hints and masks in 8 bits, as they are cached beside latents.

Every hint and mask of a run is quantised to steps of 1/255, cached or not, so that a run gives the same bits with a
cache, without one and after it was deleted. Compressed, edges and poses take a tenth of the space or less.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

STEPS = 255
FASTEST = 1
"""Compression level of zlib: higher ones take several times longer for a few percent."""


def bytes_of(values: Tensor) -> Tensor:
    """Quantise values in [0, 1] to uint8."""
    return (values * STEPS).round().to(torch.uint8)


def floats_of(values: Tensor) -> Tensor:
    """Convert uint8 to fp32 in [0, 1]."""
    return values.float() / STEPS


def pack(values: Tensor) -> Tensor:
    """Compress uint8 (C, H, W), as one channel where all are equal."""
    if bool((values == values[:1]).all()):
        values = values[:1]
    return torch.frombuffer(bytearray(zlib.compress(values.contiguous().numpy().data, FASTEST)), dtype=torch.uint8)


def unpack(packed: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """Decompress to uint8 (C, H, W). size: (H, W). Raises ValueError where the packed size differs."""
    content = zlib.decompress(packed.numpy().data)
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if len(values) not in (size[0] * size[1], channels * size[0] * size[1]):
        raise ValueError(f"{len(values)} packed numbers are not {size[1]}x{size[0]} pixels")
    return values.view(-1, *size).expand(channels, *size)
