"""Weights that are numbers: floating point, none of them NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .checkpoint import CheckpointError


def check_format(name: str, tensor: Tensor, source: str) -> None:
    """Raise CheckpointError for a tensor of whole numbers, truth values or complex numbers."""
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{source}: '{name}' is of the number format {kind}, and weights are floating point. Choose a file in "
            "fp16, bf16 or fp32."
        )


def check_weights(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError for weights that are no floating point, or hold NaN or infinite values, by name."""
    for name, tensor in tensors.items():
        check_format(name, tensor, source)
        if not math.isfinite(peak(tensor)):
            raise CheckpointError(
                f"{source}: '{name}' holds NaN or infinite values. The file is damaged: download it again."
            )


def peak(tensor: Tensor) -> float:
    """Largest magnitude; NaN where there is one, 0 of no numbers."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor if tensor.dtype.itemsize > 1 else tensor.float())
    return torch.maximum(-low, high).item()
