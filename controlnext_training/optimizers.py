"""Optimizers by their names in recipes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .settings import ConfigError


class MissingOptimizerError(ConfigError):
    """Error for an optimizer whose package is missing or does not work here. The message says what to install."""


DECAYED = "matrices"
"""Rule of weight decay, as named in saved states: matrices and kernels decay, norms and biases do not. States without
it: all weights decay, and the optimizer chooses its kernels."""

ROOT_FLOOR = 1e-15
"""Adafactor: smallest root of the second moment. Source: Shazeer and Stern 2018, section 9: 1e-30 beside the square."""


def _as_adam(betas: tuple[float, float], eps: float, weight_decay: float) -> dict[str, Any]:
    return {"betas": betas, "eps": eps, "weight_decay": weight_decay}


def _as_adafactor(betas: tuple[float, float], eps: float, weight_decay: float) -> dict[str, Any]:
    """Arguments of Adafactor. torch multiplies the rate by the larger of eps[1] and the weights' root mean square.

    With 1 a difference, which starts at zero, gets the configured rate, as with other optimizers.
    """
    return {"eps": (ROOT_FLOOR, 1.0), "weight_decay": weight_decay}


@dataclass(frozen=True, slots=True)
class OptimizerSource:
    """Source of one optimizer: its package, and its arguments from the configuration."""

    package: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments, beside those of the configuration."""
    own_rate: bool = False
    """True: it adapts the learning rate itself, and the configured factor must be the same for all groups. False: it
    uses the configured rates."""
    arguments: Callable[[tuple[float, float], float, float], dict[str, Any]] = _as_adam
    """(betas, eps, weight_decay) from the configuration -> its arguments."""
    fuses: bool = False
    """True: it has a fused kernel for the whole step, on devices that torch supports. False: it has none."""


OPTIMIZERS: dict[str, OptimizerSource] = {
    "adamw": OptimizerSource("torch.optim", "AdamW", fuses=True),
    "adafactor": OptimizerSource("torch.optim", "Adafactor", arguments=_as_adafactor),
    "adamw8bit": OptimizerSource("bitsandbytes.optim", "AdamW8bit"),
    "prodigy": OptimizerSource("prodigyopt", "Prodigy", options={"safeguard_warmup": True}, own_rate=True),
    "schedulefree": OptimizerSource("schedulefree", "AdamWScheduleFree"),
}
"""Name in recipes -> source of the optimizer."""


def check_optimizer(name: str, rates: Sequence[float]) -> Any:
    """Class of the optimizer; rates: learning rates of all groups.

    Raises MissingOptimizerError, and ValueError for rates that the optimizer does not support.
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
        if package == "torch":
            raise MissingOptimizerError(
                f"optimizer: {name} came with torch 2.5, and this is torch {torch.__version__}. Update torch as "
                "ComfyUI's manual says, or choose adamw."
            ) from error
        raise MissingOptimizerError(
            f"optimizer: {name} needs the package {package}, which did not load ({error}). Run "
            f"`pip install -U {package}` in ComfyUI's Python, or choose adamw."
        ) from error


def grouped(
    tensors: Sequence[nn.Parameter], rate: float, weight_decay: float, decay_all: bool = False
) -> list[dict[str, Any]]:
    """Parameter groups of one learning rate: matrices and kernels, then norms and biases, which do not decay.

    decay_all: True makes one group, in which everything decays, as before states named `DECAYED`; False makes two.
    """
    if decay_all:
        return [{"params": list(tensors), "lr": rate}]
    parts = [p for p in tensors if p.ndim > 1], [p for p in tensors if p.ndim <= 1]
    return [
        {"params": part, "lr": rate, "weight_decay": decay}
        for part, decay in zip(parts, (weight_decay, 0.0), strict=True)
        if part
    ]


def build(
    name: str,
    groups: Sequence[Mapping[str, Any]],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """Build the optimizer of `groups`, each with `params` and `lr`.

    fused: True uses one kernel per step, where the device has it; False leaves the choice to the optimizer. Raises
    MissingOptimizerError, and ValueError for rates that the optimizer does not support.
    """
    row = OPTIMIZERS[name]
    made = check_optimizer(name, [float(group["lr"]) for group in groups])
    arguments = {**row.arguments(betas, eps, weight_decay), **row.options}
    optimizer: torch.optim.Optimizer
    try:
        fusing = {"fused": True} if row.fuses and fused else {}
        optimizer = made([dict(group) for group in groups], **arguments, **fusing)
    except RuntimeError:  # torch has no such kernel for this device
        optimizer = made([dict(group) for group in groups], **arguments)
    if hasattr(optimizer, "train"):  # schedule-free; see weights_to_read
        optimizer.train()
    return optimizer


@contextmanager
def weights_to_read(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Context in which the parameters hold the weights to validate and save; afterwards the training weights, bit for
    bit.

    Only schedule-free optimizers distinguish the two. Their own conversion back rounds, so that a run with a validation
    would differ from one without.
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
