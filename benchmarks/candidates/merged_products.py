"""Candidate for ControlNet-XS with fewer matrix products: query, key and value of a self-attention in one, and all keys
and values of the text in one for the whole network.
"""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.attention import CrossAttention

Forward = Callable[[Tensor, Tensor], Tensor]


class _Joined:
    """Concatenated weights of several layers, on the device and in the dtype of their input."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers, self.weight = layers, torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        """Project x: (B, N, width). Returns (B, N, sum of the layers' widths)."""
        if not self.weight.numel() or self.weight.device != x.device or self.weight.dtype != x.dtype:
            self.weight = torch.cat([layer.weight.to(x.device, x.dtype) for layer in self.layers])
        return F.linear(x, self.weight)


class _Text:
    """Keys and values of all cross-attentions, computed once per context."""

    def __init__(self, attentions: list[Any]) -> None:
        layers = [layer for attention in attentions for layer in (attention.to_k, attention.to_v)]
        self.joined, self.widths = _Joined(layers), [layer.weight.shape[0] for layer in layers]
        self.context: Tensor | None = None
        self.parts: tuple[Tensor, ...] = ()

    def of(self, number: int, context: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of that attention, each (B, T, width)."""
        if self.context is not context:
            self.context, self.parts = context, self.joined(context).split(self.widths, dim=-1)
        return self.parts[2 * number], self.parts[2 * number + 1]


@contextmanager
def merged_products(net: nn.Module) -> Iterator[None]:
    """Context in which this ControlNet-XS computes its projections as merged products."""
    named = [(name, module) for name, module in net.named_modules() if isinstance(module, CrossAttention)]
    cross = [module for name, module in named if name.endswith("attn2")]
    text = _Text(cross)
    with ExitStack() as stack:
        for name, module in named:
            forward = _of_text(module, text, cross.index(module)) if name.endswith("attn2") else _of_itself(module)
            stack.enter_context(unittest.mock.patch.object(module, "forward", forward))
        yield


def _of_itself(module: Any) -> Forward:
    joined = _Joined([module.to_q, module.to_k, module.to_v])

    def forward(h: Tensor, context: Tensor) -> Tensor:
        return module.to_out(module.attention(*joined(h).chunk(3, dim=-1), module.heads))

    return forward


def _of_text(module: Any, text: _Text, number: int) -> Forward:
    def forward(h: Tensor, context: Tensor) -> Tensor:
        return module.to_out(module.attention(module.to_q(h), *text.of(number, context), module.heads))

    return forward
