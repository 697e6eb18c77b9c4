"""Device and precision of the training stages: bf16 where this machine is fast at it, else fp32."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator

import torch
from torch import Tensor

GAIN = 1.3  # smallest speed-up for which bf16 is used


@functools.cache
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def bf16_is_quick() -> bool:
    """True: bf16 is faster here. False: it is not. Measured once on a matrix product, in a tenth of a second."""
    wide, slow = (
        _seconds(torch.randn(512, 512, device=device()).to(dtype)) for dtype in (torch.bfloat16, torch.float32)
    )
    return wide * GAIN < slow


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Autocast to bf16 where that helps."""
    with torch.autocast(device().type, torch.bfloat16, enabled=bf16_is_quick()):
        yield


def _seconds(matrix: Tensor, times: int = 3) -> float:
    float((matrix @ matrix).sum())
    started = time.perf_counter()
    for _ in range(times):
        float((matrix @ matrix).sum())
    return time.perf_counter() - started
