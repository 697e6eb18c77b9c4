"""Spatial transformers of the UNet family, as the control stream of ControlNet-XS uses them.

Shapes: B batch, N query tokens, M key tokens, C channels, E inner width (heads * width of a head), H W size.
Module names inside a transformer are the published state-dict keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .layers import zeroed

NORM_EPS = 1e-6
FEED_FORWARD = 4
"""Inner channels of the feed-forward, as a multiple of the transformer's channels."""

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(q (B, N, E), k (B, M, E), v (B, M, E), heads) -> (B, N, E)."""


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention per head, scaled by 1 / sqrt(width of a head). q: (B, N, E); k, v: (B, M, E)."""
    q, k, v = (rearrange(t, "B N (heads D) -> B heads N D", heads=heads) for t in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "B heads N D -> B N (heads D)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """Configuration of one transformer of the control stream."""

    depth: int
    heads: int
    inner: int
    """Channels between proj_in and proj_out (heads * head width); equal to the block's channels in most files."""
    groups: int
    linear: bool
    """True: proj_in and proj_out are linear layers (SD2.1, SDXL). False: 1x1 convolutions (SD1.5)."""


class CrossAttention(nn.Module):
    """Multi-head attention from features h to a context: h itself or the text."""

    def __init__(
        self, width: int, context_dim: int, heads: int, operations: Any, attention: Attention, **factory: Any
    ) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.to_q = operations.Linear(width, width, bias=False, **factory)
        self.to_k = operations.Linear(context_dim, width, bias=False, **factory)
        self.to_v = operations.Linear(context_dim, width, bias=False, **factory)
        self.to_out = nn.Sequential(operations.Linear(width, width, **factory))

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        """Attend from h: (B, N, E) to context: (B, M, context_dim). Returns (B, N, E)."""
        return self.to_out(self.attention(self.to_q(h), self.to_k(context), self.to_v(context), self.heads))


class GEGLU(nn.Module):
    """A linear layer whose second half gates the first through a GELU. Source: Shazeer 2020."""

    def __init__(self, width: int, inner: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.proj = operations.Linear(width, 2 * inner, **factory)

    def forward(self, h: Tensor) -> Tensor:
        """Apply the gated layer to h: (B, N, width). Returns (B, N, inner)."""
        value, gate = self.proj(h).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Feed-forward of a transformer block: GEGLU, then a linear layer back to the input width."""

    def __init__(self, width: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        inner = FEED_FORWARD * width
        self.net = nn.Sequential(
            GEGLU(width, inner, operations, **factory), nn.Identity(), operations.Linear(inner, width, **factory)
        )

    def forward(self, h: Tensor) -> Tensor:
        """Apply the feed-forward to h: (B, N, E). Returns (B, N, E)."""
        return self.net(h)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text and a feed-forward, each pre-normalised and with a residual."""

    def __init__(
        self, width: int, context_dim: int, heads: int, operations: Any, attention: Attention, **factory: Any
    ) -> None:
        super().__init__()
        self.norm1 = operations.LayerNorm(width, **factory)
        self.attn1 = CrossAttention(width, width, heads, operations, attention, **factory)
        self.norm2 = operations.LayerNorm(width, **factory)
        self.attn2 = CrossAttention(width, context_dim, heads, operations, attention, **factory)
        self.norm3 = operations.LayerNorm(width, **factory)
        self.ff = FeedForward(width, operations, **factory)

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        """Apply the block to h: (B, N, E), with the text context: (B, M, context_dim). Returns (B, N, E)."""
        own = self.norm1(h)
        h = h + self.attn1(own, own)
        h = h + self.attn2(self.norm2(h), context)
        return h + self.ff(self.norm3(h))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the cells of a feature map, with a residual connection around all of them."""

    def __init__(
        self,
        channels: int,
        context_dim: int,
        config: TransformerConfig,
        operations: Any,
        attention: Attention,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.linear = config.linear
        self.norm = operations.GroupNorm(config.groups, channels, eps=NORM_EPS, **factory)
        self.proj_in = self._projection(channels, config.inner, operations, factory)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(config.inner, context_dim, config.heads, operations, attention, **factory)
            for _ in range(config.depth)
        )
        self.proj_out = zeroed(self._projection(config.inner, channels, operations, factory))

    def _projection(self, in_ch: int, out_ch: int, operations: Any, factory: dict[str, Any]) -> nn.Module:
        if self.linear:
            return operations.Linear(in_ch, out_ch, **factory)
        return operations.Conv2d(in_ch, out_ch, 1, **factory)

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        """Apply the transformer to h:

        (B, C, H, W), with the text context: (B, M, context_dim). Returns (B, C, H, W).
        """
        height = h.shape[-2]
        tokens = self.norm(h)
        if not self.linear:
            tokens = self.proj_in(tokens)
        tokens = rearrange(tokens, "B C H W -> B (H W) C")
        if self.linear:
            tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        if self.linear:
            tokens = self.proj_out(tokens)
        tokens = rearrange(tokens, "B (H W) C -> B C H W", H=height)
        return h + (tokens if self.linear else self.proj_out(tokens))
