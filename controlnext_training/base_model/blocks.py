"""Blocks of the host's networks prepared for autograd: no in-place writes, no fused operators, checkpointing.

Each block's forward is wrapped, not the step: checkpointing calls that forward a second time in the backward pass, when
contexts around the step have ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from .offload import OffloadedBlocks

Forward = Callable[..., Any]

LIMITS = ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit", "accumulated_cache_size_limit")
"""Limits of torch._dynamo.config; the last two are their names before torch 2.6."""
SIZES_OF_A_BLOCK = 16
"""Number of sizes of pictures, lengths of texts and the like for which a block may be compiled."""


class OutOfPlace(TorchFunctionMode):
    """Mode in which `x += y` makes a new tensor and binds x to it: values of x saved by autograd, or the caller, do not
    change.

    A statement `x.add_(y)` would have no effect here. The blocks of the families that need this mode have none; the
    tests compare each family's output with the host's.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.add_, Tensor.__iadd__):
            func = Tensor.add
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def host_in_training() -> Iterator[None]:
    """Context in which hosts use operators with a gradient instead of fused ones; earlier hosts have no fused ones."""
    host: Any = comfy.model_management
    before = getattr(host, "in_training", None)
    if before is None:
        yield
        return
    host.in_training = True
    try:
        yield
    finally:
        host.in_training = before


def prepare_blocks(
    network: nn.Module,
    kinds: tuple[type[nn.Module], ...],
    recompute: bool,
    writes_in_place: bool = False,
    fetched_on: torch.device | None = None,
    compiles: bool = False,
) -> int:
    """Prepare blocks of these kinds for a backward pass; returns their number.

    recompute: True recomputes their activations in the backward pass; False stores them. writes_in_place: True means
    that they add in place to their input, which `OutOfPlace` prevents; False: they do not. fetched_on: device to which
    their weights, stored in host memory, are copied while a block computes; None: they stay where they are. compiles:
    True compiles the forward and backward pass of each block with torch.compile; False does not.
    """
    found = [module for module in _outermost(network, kinds)]
    if compiles:
        _allow_compiling(len(found))
    fetched = OffloadedBlocks(found, fetched_on) if fetched_on is not None else None
    for number, module in enumerate(found):
        forward = _compiled(module.forward) if compiles else module.forward
        forward = _trained(forward, writes_in_place)
        forward = _fetched(forward, fetched, number) if fetched is not None else forward
        module.forward = _recomputed(forward) if recompute else forward
    return len(found)


def _outermost(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    """Modules of these kinds that are not inside another of them."""
    if isinstance(module, kinds):
        yield module
        return
    for child in module.children():
        yield from _outermost(child, kinds)


def _compiled(forward: Forward) -> Forward:
    """Forward that torch.compile compiles at its first call, and again for other sizes and dtypes."""
    return torch.compile(forward, dynamic=False)


def _allow_compiling(blocks: int) -> None:
    """Raise torch's limits of compiled versions of one forward, which all blocks of a kind share, for this process.

    Beyond its limit (8 by default) torch runs further versions uncompiled. The new limit allows several sizes for each
    block.
    """
    settings: Any = torch._dynamo.config
    for name in LIMITS:
        if hasattr(settings, name):
            setattr(settings, name, max(getattr(settings, name), SIZES_OF_A_BLOCK * blocks))


def _trained(forward: Forward, writes_in_place: bool) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        with host_in_training(), OutOfPlace() if writes_in_place else contextlib.nullcontext():
            return forward(*args, **kwargs)

    return run


def _fetched(forward: Forward, fetched: OffloadedBlocks, number: int) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        with fetched.on_device(number):
            return forward(*args, **kwargs)

    return run


def _recomputed(forward: Forward) -> Forward:
    def again(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return again
