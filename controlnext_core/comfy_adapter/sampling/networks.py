"""Networks of this pack in the host's patcher: weights, memory, and features that are dropped with the network."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import Tensor, nn

from ... import checkpoint
from ...finite import check_format, check_weights
from .features import drop_features, keep_features_of
from .host_layers import patcher_of
from .next_forward import KEY

STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

COPIES: WeakValueDictionary[tuple[str, torch.device], ModelPatcher] = WeakValueDictionary()
"""Networks on further devices, by the identity of their output: all controls share one per device."""


@dataclass(frozen=True)
class _Source:
    """Factory of further patchers of a network, each with separate weights."""

    net: nn.Module
    blank: nn.Module
    """Network on `meta`, in its state before weights were loaded and the host changed its layers."""
    uid: str

    def __call__(self, disable_dynamic: bool = False, device: torch.device | None = None) -> ModelPatcher:
        """Make a patcher; the host calls this too, for hooks on weights (`disable_dynamic`) and for further devices."""
        net = copy.deepcopy(self.blank)
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in self.net.state_dict().items()}
        checkpoint.load_strict(net, tensors, "a copy for another device")
        net.eval().requires_grad_(False)
        return self.hand_over(net, disable_dynamic, device)

    def hand_over(self, net: nn.Module, disable_dynamic: bool, device: torch.device | None) -> ModelPatcher:
        """Register a network with loaded weights with the host's memory manager."""
        patcher = patcher_of(net, disable_dynamic, device)
        patcher.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, functools.partial(drop_features, self.uid))
        keep_features_of(net, self.uid)
        patcher.cached_patcher_init = (self, ())
        return patcher


def into_host(net: nn.Module, tensors: Mapping[str, Tensor], build: str, source: str) -> tuple[ModelPatcher, str]:
    """Load the weights of a network built on `meta`; returns its patcher, and the identity of its output.

    build: settings that change its features, beside the weights. Raises CheckpointError where the weights do not match.
    """
    for name, tensor in tensors.items():
        check_format(name, tensor, source)
    kept = {n: t if t.dtype in STORED_DTYPES else t.to(torch.float32) for n, t in tensors.items()}
    check_weights(kept, source)
    blank = copy.deepcopy(net)
    checkpoint.load_strict(net, kept, source)
    net.eval().requires_grad_(False)
    dtype = next(net.parameters()).dtype
    uid = f"{checkpoint.fingerprint(net.state_dict())}:{build}:{dtype}"
    return _Source(net, blank, uid).hand_over(net, False, None), uid


def on_device(patcher: ModelPatcher, device: torch.device) -> ModelPatcher:
    """Network of `into_host` on another device: a separate patcher around separate weights."""
    source: _Source = patcher.cached_patcher_init[0]
    key = (source.uid, device)
    found = COPIES.get(key)
    if found is None:
        found = COPIES[key] = source(device=device)
    return found
