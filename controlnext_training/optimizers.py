"""Optimizers by their names in a recipe, and their states as tensors and JSON."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# what the values of a packed state are, where JSON has no such thing
TENSOR, FLOAT, TUPLE, ITEMS = "tensor", "float", "tuple", "dict"


class MissingOptimizerError(ImportError):
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
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
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
