"""Embedding of a UNet of 160 channels in one of 320, exactly: every channel is duplicated, and layers that read a pair
split their weight.

The host detects SD1.5 by 320 channels, which pictures this simple do not need; a network with half of them has a
quarter of the weights and trains in a quarter of the time. Group and layer norms see the same moments, the host's
angles of 160 values are every second one of 320, and attention divides by the root of a doubled width. A pair shares
its weight unevenly, so that further training of the full-width network need not keep it equal (Chen et al. 2015,
Net2Net).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..tiny_models.storage import uniform_tensor

SHARE = (0.25, 0.75)  # share of a weight for the first channel of a pair


def widen(narrow: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Weights of the host's UNet with twice the channels that computes the same function, in fp32."""
    return {name: _widen(name, value.float(), seed) for name, value in narrow.items()}


def _widen(name: str, value: Tensor, seed: int) -> Tensor:
    if name == "out.2.bias":
        return value
    outputs = value if name == "out.2.weight" else value.repeat_interleave(2, dim=0)
    if value.ndim == 1 or name == "input_blocks.0.0.weight" or _reads_context(name):
        return outputs
    if name == "time_embed.0.weight":
        return torch.stack([outputs, torch.zeros_like(outputs)], dim=2).flatten(1)
    if name.endswith("to_q.weight"):
        outputs = outputs * 0.5**0.5  # twice the products under a root of twice the width
    low, high = SHARE
    middle, reach = (low + high) / 2, (high - low) / 2
    first = middle + uniform_tensor(name, tuple(outputs.shape), reach, seed)
    return torch.stack([outputs * first, outputs * (1 - first)], dim=2).flatten(1, 2)


def _reads_context(name: str) -> bool:
    return name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
