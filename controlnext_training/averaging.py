"""The exponential moving average (EMA) of the weights in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

COUNT = "updates of the average"
"""Name of the number of updates in a saved average."""


class Ema:
    """An exponential moving average of named parameters, in fp32.

    The decay starts low and rises to `decay`: min(decay, (1 + n) / (10 + n)) at the n-th update, from 0.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float, on_cpu: bool = True) -> None:
        self.decay = decay
        self.updates = 0
        self.average = {
            name: p.detach().to("cpu" if on_cpu else p.device, torch.float32, copy=True)
            for name, p in parameters.items()
        }

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Take in the parameters after a step; the same names as at the start."""
        rate = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, average in self.average.items():
            average.lerp_(parameters[name].detach().to(average), rate)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as tensors: the averages under their names and the number of updates under `COUNT`."""
        return {**self.average, COUNT: torch.tensor(self.updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict`. Raises ValueError if it is of other parameters."""
        found = {name: tuple(tensor.shape) for name, tensor in state.items() if name != COUNT}
        if COUNT not in state or found != {name: tuple(tensor.shape) for name, tensor in self.average.items()}:
            different = sorted(found.keys() ^ self.average.keys())[:5] or "their shapes"
            raise ValueError(
                f"The moving average is of other weights than those that train now; different: {different}. Go on "
                "with the settings that the run was started with, or start a new one."
            )
        for name, average in self.average.items():
            average.copy_(state[name])
        self.updates = int(state[COUNT])

    @contextmanager
    def swapped(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the parameters hold the averages; afterwards their own values again, bit for bit."""
        own = {name: parameters[name].detach().to(average.device, copy=True) for name, average in self.average.items()}
        try:
            for name, average in self.average.items():
                parameters[name].detach().copy_(average)
            yield
        finally:
            for name, value in own.items():
                parameters[name].detach().copy_(value)
