"""Frozen weights that are stored in fewer bits than the run computes in, and what turns them into numbers."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = "stored_scale"
"""Name of the buffer of a layer whose stored weight is to be multiplied."""


def widened(weight: Tensor, scale: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The numbers of a stored weight, on `device` in `dtype`.

    scale: a number, or one for each row, (rows, 1); multiplied in fp32, as the host's own formats are. None: the weight
    stands for itself.
    """
    if scale is None:
        return weight.to(device, dtype)
    return (weight.to(device, torch.float32) * scale.to(device, torch.float32)).to(dtype)
