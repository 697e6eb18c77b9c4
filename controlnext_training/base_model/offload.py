"""Offloading of frozen weights of blocks to host memory: they are on the device only while their block computes, and
the next block's weights are copied meanwhile.

The order is observed, not planned: upwards in a forward pass, downwards where checkpointing recomputes the blocks in
the backward pass. At most two blocks are on the device, beside the tensors of a third that a backward pass still reads.

Pinned memory and the separate stream are for CUDA only, and were never run on a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from comfy.cli_args import args
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class _Slot:
    """Attribute of a module that holds a frozen weight or a buffer."""

    owner: nn.Module
    name: str
    waiting: Tensor
    """Tensor in host memory."""

    def put(self, tensor: Tensor) -> None:
        if self.name in self.owner._parameters:
            self.owner._parameters[self.name] = nn.Parameter(tensor, requires_grad=False)
        else:
            self.owner._buffers[self.name] = tensor


class OffloadedBlocks:
    """Offloaded blocks, in the order in which a forward pass uses them."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, copier: Copier | None = None) -> None:
        """blocks: their frozen tensors in host memory are pinned where the device can read pinned memory."""
        self.copier: Copier = copier or Copier(device)
        self._slots = [[self._slot(*found) for found in _frozen(block)] for block in blocks]
        self._ready: dict[int, list[Tensor]] = {}
        self._last = -1

    def _slot(self, owner: nn.Module, name: str, tensor: Tensor) -> _Slot:
        slot = _Slot(owner, name, self.copier.pinned(tensor))
        slot.put(slot.waiting)
        return slot

    @contextmanager
    def on_device(self, number: int) -> Iterator[None]:
        """Context in which the weights of that block are on the device; the copy of the next block's weights is
        started.
        """
        ahead = number + (1 if number > self._last else -1)
        self._last = number
        self._ready = {place: copies for place, copies in self._ready.items() if place in (number, ahead)}
        here = self._begun(number)
        self.copier.wait()
        if 0 <= ahead < len(self._slots):
            self._begun(ahead)
        try:
            for slot, tensor in zip(self._slots[number], here, strict=True):
                slot.put(tensor)
            yield
        finally:
            for slot in self._slots[number]:
                slot.put(slot.waiting)

    def _begun(self, number: int) -> list[Tensor]:
        """Copies of a block's weights on the device, started unless they exist or are in progress."""
        if number not in self._ready:
            self._ready[number] = self.copier.copies([slot.waiting for slot in self._slots[number]])
        return self._ready[number]


class Copier:
    """Copier from host memory to a device: on CUDA in a separate stream, beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def pinned(self, tensor: Tensor) -> Tensor:
        """Pin the tensor on CUDA; returns it unchanged elsewhere, where the user forbids pinning or
        no memory is left.
        """
        if self.stream is None or args.disable_pinned_memory:
            return tensor
        try:
            return tensor.pin_memory()
        except RuntimeError:
            return tensor

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies on the device; on CUDA they may be in progress until `wait`."""
        if self.stream is None:
            return [tensor.to(self.device) for tensor in tensors]
        with torch.cuda.stream(self.stream):
            found = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        for tensor in found:  # freed only when the computation that reads them is through
            tensor.record_stream(torch.cuda.current_stream(self.device))
        return found

    def wait(self) -> None:
        """Make later computation wait for all copies that were started."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


def _frozen(block: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(module, name, tensor) of all frozen tensors of a block that are in host memory."""
    for owner in block.modules():
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None and not tensor.requires_grad and tensor.device.type == "cpu":
                yield owner, name, tensor
