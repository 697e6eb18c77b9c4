"""Optimizers, learning rates over the steps, and the moving average of the weights.

Nothing here keeps a state of its own but the optimizers and `EMA`: a learning rate is a function of the step.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .config import TrainConfig


class MissingOptimizerError(ImportError):
    """The optimizer's package is not installed or does not work here. The message says what to install."""


@dataclass(frozen=True, slots=True)
class Row:
    """One optimizer: where it is and what it takes from the configuration."""

    package: str
    name: str
    own_rate: bool = False
    """It finds the learning rate itself, and what is configured multiplies it: the same for all groups."""


OPTIMIZERS: dict[str, Row] = {
    "adamw": Row("torch.optim", "AdamW"),
    "adamw8bit": Row("bitsandbytes.optim", "AdamW8bit"),
    "prodigy": Row("prodigyopt", "Prodigy", own_rate=True),
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
    betas = (config.beta1, config.beta2)
    return made([dict(group) for group in groups], betas=betas, eps=config.adam_eps, weight_decay=config.weight_decay)


def set_mode(optimizer: torch.optim.Optimizer, training: bool) -> None:
    """Put the weights to where the optimizer trains them, or to where they are read.

    Only schedule-free optimizers tell the two apart. Call before training, and around validation and saving.
    """
    switch = getattr(optimizer, "train" if training else "eval", None)
    if switch is not None:
        switch()


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
