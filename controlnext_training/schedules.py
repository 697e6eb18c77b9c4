"""Learning rate schedules: each is a function of the step, so a resumed run follows the same one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float, int, float], float]] = {
    "constant": lambda progress, cycles, power: 1.0,
    "linear": lambda progress, cycles, power: 1.0 - progress,
    "cosine": lambda progress, cycles, power: _cosine(progress),
    "cosine_restarts": lambda progress, cycles, power: _cosine(cycles * progress % 1.0) if progress < 1 else 0.0,
    "polynomial": lambda progress, cycles, power: (1.0 - progress) ** power,
    "piecewise": lambda progress, cycles, power: 0.1 ** min(int(cycles * progress), cycles - 1),
}
"""Name -> (progress in [0, 1], cycles, power) -> factor of the learning rate in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rate schedule over the steps: a warm-up from zero, then one of SCHEDULES until the last step."""

    name: str
    steps: int
    """Number of steps of the whole run."""
    warmup: int = 0
    cycles: int = 1
    power: float = 1.0

    def factor(self, step: int) -> float:
        """Factor of the learning rates at `step`, in [0, 1]; steps are counted from 0."""
        if step < self.warmup:
            return step / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return SCHEDULES[self.name](min(progress, 1.0), self.cycles, self.power)
