"""Blocks of the host's networks as autograd needs them: nothing written in place, recomputed, without fused operators.

All of it is put around each block's own forward, and not around a step: checkpointing calls that forward a second time
in the backward pass, where nothing else of the step is in force any more.
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

from .offload import Fetched

Forward = Callable[..., Any]

LIMITS = ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit", "accumulated_cache_size_limit")
"""Limits of torch._dynamo.config; the last two are their names before torch 2.6."""
SIZES_OF_A_BLOCK = 16
"""Sizes of pictures, lengths of texts and the like for which a block may be compiled."""


class OutOfPlace(TorchFunctionMode):
    """Inside, `x += y` makes a new tensor and binds x to it: what autograd, or the caller, keeps of x stays as it was.

    A statement `x.add_(y)` would do nothing here. The host's blocks of the families that need this have none; the
    tests compare each family's output with the host's own.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.add_, Tensor.__iadd__):
            func = Tensor.add
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def host_in_training() -> Iterator[None]:
    """Inside, a host that has operators without a gradient takes its others; earlier hosts have no such operators."""
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
    """Make blocks of these kinds ready for a backward pass; returns their number.

    recompute: True computes their activations again in the backward pass in place of keeping them; writes_in_place:
    True means that they add to what they are given, which is answered by `OutOfPlace`. fetched_on: device on which
    their weights, which wait in host memory, are while a block computes; None: they stay where they are.
    compiles: True compiles their forward and backward passes with torch.compile, each block for itself.
    """
    found = [module for module in _outermost(network, kinds)]
    if compiles:
        _allow_compiling(len(found))
    fetched = Fetched(found, fetched_on) if fetched_on is not None else None
    for number, module in enumerate(found):
        forward = _compiled(module.forward) if compiles else module.forward
        forward = _trained(forward, writes_in_place)
        forward = _fetched(forward, fetched, number) if fetched is not None else forward
        module.forward = _recomputed(forward) if recompute else forward
    return len(found)


def _outermost(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    """Modules of these kinds that lie in no other of them."""
    if isinstance(module, kinds):
        yield module
        return
    for child in module.children():
        yield from _outermost(child, kinds)


def _compiled(forward: Forward) -> Forward:
    """torch.compile compiles it at its first call, and again for other sizes and dtypes."""
    return torch.compile(forward, dynamic=False)


def _allow_compiling(blocks: int) -> None:
    """Raise torch's limits of compiled versions of one forward, which all blocks of a kind share, for this process.

    Beyond its limit (8 as torch comes) torch runs what is left uncompiled. Some sizes for each block are allowed.
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


def _fetched(forward: Forward, fetched: Fetched, number: int) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        with fetched.on_device(number):
            return forward(*args, **kwargs)

    return run


def _recomputed(forward: Forward) -> Forward:
    def again(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return again
