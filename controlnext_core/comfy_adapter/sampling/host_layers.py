"""Layers of the host for networks of this pack, and the host's patcher around them.

With its dynamic memory manager the host makes Linear and Embedding without weights, and fills them while it loads a
file. `load_strict` compares names and shapes before it loads anything, and a fresh network gets its weights from a
plain twin: both need layers that are allocated from the start.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn


class _LoadsItself:
    """Layer with its own loading method, for which the host allocates weights at once (comfy/ops.py, `Linear`)."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]


class WholeLayers(comfy.ops.manual_cast):
    """Host's layers that cast their weights, all allocated at once; every network of this pack uses them."""

    @staticmethod
    def weights_of(layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias as the layer's forward casts them for a tensor such as `like`."""
        weight, bias = comfy.ops.cast_bias_weight(layer, like)
        return weight, bias

    class Linear(_LoadsItself, comfy.ops.manual_cast.Linear):
        pass

    class Embedding(_LoadsItself, comfy.ops.manual_cast.Embedding):
        pass


class Fp32Norms(WholeLayers):
    """WholeLayers whose group norms compute in fp32 for features of every dtype."""

    class GroupNorm(comfy.ops.manual_cast.GroupNorm):
        def forward(self, h: Tensor) -> Tensor:
            """Normalise h: (B, C, H, W) in fp32. Returns the same shape in h's dtype."""
            return super().forward(h.float()).to(h.dtype)


def patcher_of(net: nn.Module, disable_dynamic: bool = False, device: torch.device | None = None) -> ModelPatcher:
    """Register the network with the host's memory manager, in the kind of patcher that the host uses for its own
    models.

    disable_dynamic: True uses the plain kind, which copies all weights to the device; False uses the dynamic kind where
    the host has it. device: where the network runs; None is the host's first device.
    """
    core = getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)  # hosts before 0.12 have only ModelPatcher
    kind = ModelPatcher if disable_dynamic else core
    return kind(
        net,
        load_device=device or comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
