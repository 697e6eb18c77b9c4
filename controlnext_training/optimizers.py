"""Optimizers by their names in a recipe."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .settings import ConfigError


class MissingOptimizerError(ConfigError):
    """The optimizer's package is not installed or does not work here. The message says what to install."""


@dataclass(frozen=True, slots=True)
class OptimizerSource:
    """One optimizer: where it is and what it takes from the configuration."""

    package: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Given to it besides what the configuration names."""
    own_rate: bool = False
    """It finds the learning rate itself, and what is configured multiplies it: the same for all groups."""


OPTIMIZERS: dict[str, OptimizerSource] = {
    "adamw": OptimizerSource("torch.optim", "AdamW"),
    "adamw8bit": OptimizerSource("bitsandbytes.optim", "AdamW8bit"),
    "prodigy": OptimizerSource("prodigyopt", "Prodigy", options={"safeguard_warmup": True}, own_rate=True),
    "schedulefree": OptimizerSource("schedulefree", "AdamWScheduleFree"),
}
"""Name in a recipe -> where it comes from."""


def check_optimizer(name: str, rates: Sequence[float]) -> Any:
    """The optimizer's class; rates: learning rates of all groups.

    Raises MissingOptimizerError, and ValueError for rates that the optimizer does not take.
    """
    row = OPTIMIZERS[name]
    found = sorted(set(rates))
    if row.own_rate and len(found) > 1:
        raise ValueError(
            f"{name} finds the learning rate itself and takes one factor for all weights, but learning_rate and "
            f"control_learning_rate are {' and '.join(f'{rate:g}' for rate in found)}. Set both to 1."
        )
    try:
        return getattr(importlib.import_module(row.package), row.name)
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        package = row.package.split(".")[0]
        raise MissingOptimizerError(
            f"optimizer: {name} needs the package {package}, which did not load ({error}). Run "
            f"`pip install -U {package}` in ComfyUI's Python, or choose adamw."
        ) from error


def build(
    name: str,
    groups: Sequence[Mapping[str, Any]],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimizer of `groups`, each with its `params` and its `lr`.

    Raises MissingOptimizerError, and ValueError for rates that the optimizer does not take.
    """
    made = check_optimizer(name, [float(group["lr"]) for group in groups])
    optimizer: torch.optim.Optimizer = made(
        [dict(group) for group in groups],
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        **OPTIMIZERS[name].options,
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
