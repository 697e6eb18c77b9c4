"""Networks of ours in the host's hands: weights, memory management, and features that go when the network goes."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import Tensor, nn

from .. import checkpoint
from .collector import KEY
from .features import drop_features, keep_features_of

STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def into_host(net: nn.Module, tensors: Mapping[str, Tensor], build: str, source: str) -> tuple[ModelPatcher, str]:
    """Give a network built on `meta` its weights; returns its patcher, and the identity of what it computes.

    build: what changes its features beside the weights. Raises CheckpointError where the weights are others.
    """
    kept = {n: t if t.dtype in STORED_DTYPES else t.to(torch.float32) for n, t in tensors.items()}
    checkpoint.load_strict(net, kept, source)
    net.eval().requires_grad_(False)
    dtype = next(net.parameters()).dtype
    uid = f"{checkpoint.fingerprint(net.state_dict())}:{build}:{dtype}"
    patcher = ModelPatcher(
        net,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    patcher.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, functools.partial(drop_features, uid))
    keep_features_of(net, uid)
    return patcher, uid
