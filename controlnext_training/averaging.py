"""Exponential moving average (EMA) of the weights in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

COUNT = "updates of the average"
"""Key of the number of updates in a saved average."""


class BackgroundUpdate:
    """Background updates of an average in host memory, in a thread, from asynchronous copies of the parameters."""

    def __init__(self, average: Mapping[str, Tensor], device: torch.device) -> None:
        """device: of the parameters. On CUDA the copies are pinned and made in a separate stream."""
        on_cuda = device.type == "cuda"
        self.device = device
        self.copies = {name: torch.empty_like(tensor, pin_memory=on_cuda) for name, tensor in average.items()}
        self.stream = torch.cuda.Stream(device) if on_cuda else None
        self.copied: torch.cuda.Event | None = None
        self.thread = ThreadPoolExecutor(1, "moving average")
        self.pending: Future[None] | None = None

    def take(self, parameters: Mapping[str, Tensor], average: Mapping[str, Tensor], rate: float) -> None:
        """Start an update; waits for the previous one."""
        self.join()
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            for name, copy in self.copies.items():
                copy.copy_(parameters[name].detach(), non_blocking=True)
            self.copied = self.stream.record_event() if self.stream is not None else None
        self.pending = self.thread.submit(_take_in, average, self.copies, rate, self.copied)

    def hold(self) -> None:
        """Make later work on the device wait for the copies, before it changes the parameters."""
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)

    def join(self) -> None:
        """Wait for the update in progress."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None


def _take_in(
    average: Mapping[str, Tensor], values: Mapping[str, Tensor], rate: float, ready: torch.cuda.Event | None = None
) -> None:
    """ready: event after which the values are valid; None: they are valid now."""
    if ready is not None:
        ready.synchronize()
    for name, tensor in average.items():
        tensor.lerp_(values[name].detach().to(tensor), rate)


class Ema:
    """Exponential moving average of named parameters, in fp32.

    The decay starts low and rises to `decay`: min(decay, (1 + n) / (10 + n)) at the n-th update, from 0.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], decay: float, on_cpu: bool = True, behind: bool | None = None
    ) -> None:
        """on_cpu:

        True stores the average in host memory; False on the parameters' device. behind: True updates it in a thread, so
        that steps do not wait for it; False updates it in the step; None: True where the parameters are on a CUDA
        device and the average is not.
        """
        self.decay = decay
        self.updates = 0
        self.average = {
            name: p.detach().to("cpu" if on_cpu else p.device, torch.float32, copy=True)
            for name, p in parameters.items()
        }
        device = next((p.device for p in parameters.values()), torch.device("cpu"))
        if behind is None:
            behind = on_cpu and device.type == "cuda"
        self._background = BackgroundUpdate(self.average, device) if behind else None

    def before_step(self) -> None:
        """Wait for the last update's copies; call it before the parameters change."""
        if self._background is not None:
            self._background.hold()

    def join(self) -> None:
        """Wait until the last update is complete."""
        if self._background is not None:
            self._background.join()

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Update the average with the parameters after a step, under the names given at the start."""
        rate = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        if self._background is None:
            _take_in(self.average, parameters, rate)
        else:
            self._background.take(parameters, self.average, rate)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """State as tensors: the averages under their names and the number of updates under `COUNT`."""
        self.join()
        return {**self.average, COUNT: torch.tensor(self.updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state of `state_dict`. Raises ValueError for a state of other parameters."""
        found = {name: tuple(tensor.shape) for name, tensor in state.items() if name != COUNT}
        if COUNT not in state or found != {name: tuple(tensor.shape) for name, tensor in self.average.items()}:
            different = sorted(found.keys() ^ self.average.keys())[:5] or "their shapes"
            raise ValueError(
                f"The moving average is of other weights than those that train now; different: {different}. Continue "
                "with the settings that the run was started with, or start a new one."
            )
        self.join()
        for name, average in self.average.items():
            average.copy_(state[name])
        self.updates = int(state[COUNT])

    @contextmanager
    def swapped(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Context in which the parameters hold the averages; afterwards they have their previous
        values, bit for bit.
        """
        self.join()
        own = {name: parameters[name].detach().to(average.device, copy=True) for name, average in self.average.items()}
        try:
            for name, average in self.average.items():
                parameters[name].detach().copy_(average)
            yield
        finally:
            for name, value in own.items():
                parameters[name].detach().copy_(value)
