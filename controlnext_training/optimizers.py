"""Optimizers, learning rates over the steps, and the moving average of the weights.

Nothing here keeps a state of its own but the optimizers and `EMA`: a learning rate is a function of the step.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .config import TrainConfig

COUNT = "updates of the average"
# what the values of a packed state are, where JSON has no such thing
TENSOR, FLOAT, TUPLE, ITEMS = "tensor", "float", "tuple", "dict"


class MissingOptimizerError(ImportError):
    """The optimizer's package is not installed or does not work here. The message says what to install."""


@dataclass(frozen=True, slots=True)
class Row:
    """One optimizer: where it is and what it takes from the configuration."""

    package: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Given to it besides what the configuration names."""
    own_rate: bool = False
    """It finds the learning rate itself, and what is configured multiplies it: the same for all groups."""


OPTIMIZERS: dict[str, Row] = {
    "adamw": Row("torch.optim", "AdamW"),
    "adamw8bit": Row("bitsandbytes.optim", "AdamW8bit"),
    "prodigy": Row("prodigyopt", "Prodigy", options={"safeguard_warmup": True}, own_rate=True),
    "schedulefree": Row("schedulefree", "AdamWScheduleFree"),
}
"""Name in a recipe -> where it comes from."""


def build(name: str, groups: Sequence[Mapping[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of `groups`, each with its `params` and its `lr`.

    Raises MissingOptimizerError, and ValueError for rates that the optimizer does not take.
    """
    row = OPTIMIZERS[name]
    rates = sorted({float(group["lr"]) for group in groups})
    if row.own_rate and len(rates) > 1:
        raise ValueError(
            f"{name} finds the learning rate itself and takes one factor for all weights, but learning_rate and "
            f"control_learning_rate are {' and '.join(f'{rate:g}' for rate in rates)}. Set both to 1."
        )
    try:
        made = getattr(importlib.import_module(row.package), row.name)
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        package = row.package.split(".")[0]
        raise MissingOptimizerError(
            f"optimizer: {name} needs the package {package}, which did not load ({error}). Run "
            f"`pip install -U {package}` in ComfyUI's Python, or choose adamw."
        ) from error
    optimizer: torch.optim.Optimizer = made(
        [dict(group) for group in groups],
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        **row.options,
    )
    if hasattr(optimizer, "train"):  # schedule-free; see weights_to_read
        optimizer.train()
    return optimizer


@contextmanager
def weights_to_read(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the weights are those to validate and save; afterwards those that train, bit for bit.

    Only schedule-free optimizers tell the two apart. Their own way back rounds, so a run that looked would differ
    from one that did not.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = [p.detach().clone() for p in parameters]
    switch: Any = optimizer
    try:
        switch.eval()
        yield
    finally:
        switch.train()
        for parameter, value in zip(parameters, own, strict=True):
            parameter.detach().copy_(value)


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


Schedule = Callable[[float, int, float], float]
SCHEDULES: dict[str, Schedule] = {
    "constant": lambda progress, cycles, power: 1.0,
    "linear": lambda progress, cycles, power: 1.0 - progress,
    "cosine": lambda progress, cycles, power: _cosine(progress),
    "cosine_restarts": lambda progress, cycles, power: _cosine(cycles * progress % 1.0) if progress < 1 else 0.0,
    "polynomial": lambda progress, cycles, power: (1.0 - progress) ** power,
    "piecewise": lambda progress, cycles, power: 0.1 ** min(int(cycles * progress), cycles - 1),
}
"""Name -> (progress in [0, 1], cycles, power) -> factor of the learning rate in [0, 1]."""


def factor(config: TrainConfig, step: int) -> float:
    """Factor of the learning rates at `step`, counted from 0: warm-up from zero, then the schedule to the last step."""
    if step < config.warmup_steps:
        return step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return SCHEDULES[config.schedule](min(progress, 1.0), config.schedule_cycles, config.schedule_power)


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


def pack(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Split an optimizer's `state_dict` into tensors, as safetensors takes them, and the rest, as JSON takes it.

    The tensors are the optimizer's own, not copies; one that stands at several places is stored once.
    Raises TypeError for what neither can hold.
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}

    def store(tensor: Tensor) -> str:
        identity = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if not tensor.numel() or identity not in seen:
            seen[identity] = f"t{len(tensors)}"
            owns_all = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
            tensors[seen[identity]] = tensor.detach() if owns_all else tensor.detach().clone().contiguous()
        return seen[identity]

    def walk(value: Any, where: str) -> Any:
        if isinstance(value, Tensor):
            return {TENSOR: store(value)}
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {FLOAT: repr(value)}
        if isinstance(value, list):
            return [walk(item, f"{where}[{i}]") for i, item in enumerate(value)]
        if isinstance(value, tuple):
            return {TUPLE: [walk(item, f"{where}[{i}]") for i, item in enumerate(value)]}
        if isinstance(value, dict):
            return {ITEMS: [[walk(key, where), walk(item, f"{where}[{key!r}]")] for key, item in value.items()]}
        raise TypeError(f"{where or 'state'}: a {type(value).__name__} cannot be saved with the optimizer's state.")

    return tensors, walk(state, "")


def unpack(tensors: Mapping[str, Tensor], rest: Any) -> Any:
    """The state that `pack` was given."""
    if isinstance(rest, list):
        return [unpack(tensors, item) for item in rest]
    if not isinstance(rest, dict):
        return rest
    ((kind, value),) = rest.items()
    if kind == TENSOR:
        return tensors[value]
    if kind == FLOAT:
        return float(value)
    if kind == TUPLE:
        return tuple(unpack(tensors, item) for item in value)
    return {unpack(tensors, key): unpack(tensors, item) for key, item in value}
