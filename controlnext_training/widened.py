"""Widening of frozen weights that are stored in fewer bits than the run computes in."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = "stored_scale"
"""Name of a layer's buffer with the factor of its stored weight."""


def widened(weight: Tensor, scale: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Values of a stored weight, on `device` in `dtype`.

    scale: a number, or one per row of the weight, (rows, 1); multiplied in fp32, as in the host's formats. None: no
    factor.
    """
    if scale is None:
        return weight.to(device, dtype)
    return (weight.to(device, torch.float32) * scale.to(device, torch.float32)).to(dtype)
