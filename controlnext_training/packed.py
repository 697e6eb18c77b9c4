"""Hints and masks in whole numbers of 8 bits, as they are cached beside latents.

Every hint and mask of a run has these steps of 1/255, cached or not, so that a run gives the same bits with a cache,
without one and after it was deleted. Compressed they take a tenth or less of their room where they are edges or poses.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

STEPS = 255
FASTEST = 1
"""Level of zlib: the others take several times longer for a few percent."""


def bytes_of(values: Tensor) -> Tensor:
    """Numbers in [0, 1] -> the nearest whole numbers of 0 to 255."""
    return (values * STEPS).round().to(torch.uint8)


def floats_of(values: Tensor) -> Tensor:
    """Whole numbers of 0 to 255 -> fp32 in [0, 1]."""
    return values.float() / STEPS


def pack(values: Tensor) -> Tensor:
    """uint8 (C, H, W) -> compressed bytes, of one channel where all are equal."""
    if bool((values == values[:1]).all()):
        values = values[:1]
    return torch.frombuffer(bytearray(zlib.compress(values.contiguous().numpy().data, FASTEST)), dtype=torch.uint8)


def unpack(packed: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """The uint8 (C, H, W) that were packed. size: (H, W). Raises ValueError where they are of another size."""
    content = zlib.decompress(packed.numpy().data)
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if len(values) not in (size[0] * size[1], channels * size[0] * size[1]):
        raise ValueError(f"{len(values)} packed numbers are not {size[1]}x{size[0]} pixels")
    return values.view(-1, *size).expand(channels, *size)
