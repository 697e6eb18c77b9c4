"""Packing of weights in 8 bits for distribution: integers from -127 to 127 and one factor per row (dimension 0).

Half the size of fp16, and closer to it than any 8-bit float: the error of a weight is at most 1/254 of the largest in
its row. No computation uses these files directly; `unpack` gives the fp16 weights for the host's loaders.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCALE = ".row_scale"  # suffix of the name of a packed tensor
SMALLEST = 4096  # values; smaller tensors are not packed


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pack floating-point tensors of two or more dimensions as int8 with fp32 factors; the others stay in fp16."""
    packed = {}
    for name, value in tensors.items():
        if not value.is_floating_point():
            packed[name] = value
        elif value.ndim < 2 or value.numel() < SMALLEST:
            packed[name] = value.half()
        else:
            rows = value.float().flatten(1)
            scale = rows.abs().amax(1) / 127
            packed[name] = (rows / scale.clamp_min(1e-30)[:, None]).round().to(torch.int8).view(value.shape)
            packed[name + SCALE] = scale
    return packed


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Unpack the tensors to fp16. Raises KeyError naming an 8-bit tensor without its factors."""
    tensors = {}
    for name, value in packed.items():
        if name.endswith(SCALE):
            continue
        if value.dtype is not torch.int8:
            tensors[name] = value
            continue
        if name + SCALE not in packed:
            raise KeyError(f"{name} is in 8 bits and {name}{SCALE} is missing; the file is not whole.")
        tensors[name] = (value.flatten(1).float() * packed[name + SCALE][:, None]).view(value.shape).half()
    return tensors
