"""Candidates for ControlNeXt's two parts: the encoder in channels last, and its addition as one compiled kernel."""

from __future__ import annotations

import unittest.mock
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def channels_last(net: nn.Module) -> Iterator[None]:
    """Context in which weights and features of this encoder have the memory format channels last."""
    begin: Any = net.begin
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last = {"memory_format": torch.channels_last}
    try:
        with unittest.mock.patch.object(net, "begin", lambda hint: begin(hint.contiguous(**last))):
            yield
    finally:
        net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


@contextmanager
def one_kernel(device: torch.device) -> Iterator[None]:
    """Context in which `injection.fuse` is compiled; on a CPU it is traced and runs uncompiled, which needs no
    compiler.
    """
    from ...controlnext_core.comfy_adapter.sampling import next_forward

    plain = next_forward.fuse
    compiled = torch.compile(plain, backend="inductor" if device.type == "cuda" else "eager", dynamic=False)

    with unittest.mock.patch.object(next_forward, "fuse", compiled):
        yield
