"""Checks that weights are floating point, without NaN or infinite values."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .checkpoint import CheckpointError

SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes per value of a weight -> the integer dtype of that size."""


def check_format(name: str, tensor: Tensor, source: str) -> None:
    """Raise CheckpointError for a tensor of integers, booleans or complex numbers."""
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{source}: '{name}' is of the number format {kind}, and weights are floating point. Choose a file in "
            "fp16, bf16 or fp32."
        )


def check_weights(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError, naming the tensor, for one that is not floating point or holds NaN or infinite values."""
    for name, tensor in tensors.items():
        check_format(name, tensor, source)
        if not math.isfinite(peak(tensor)):
            raise CheckpointError(
                f"{source}: '{name}' holds NaN or infinite values. The file is damaged: download it again."
            )


def peak(tensor: Tensor) -> float:
    """Largest magnitude; NaN if any value is NaN, 0 for an empty tensor.

    Computed from the bits: without the sign bit, floating-point numbers read as integers have the order of their
    magnitudes, with infinity and NaN above all others (IEEE 754). numpy takes the maximum in one thread: torch's
    threads wait for each other at every tensor, which takes a hundred times as long on a busy machine.
    """
    if not tensor.numel():
        return 0.0
    whole = (tensor.float() if tensor.dtype.itemsize == 1 else tensor).detach().cpu()
    bits = whole.view(SIGNED[whole.dtype.itemsize])
    sign = 1 << (8 * whole.dtype.itemsize - 1)
    numbers = bits.numpy()
    unsigned = int(numbers.view(f"u{whole.dtype.itemsize}").max())
    most = max(int(numbers.max()), unsigned & ~sign)  # of the positive values, of the negative values
    return torch.tensor(most, dtype=bits.dtype).view(whole.dtype).item()
