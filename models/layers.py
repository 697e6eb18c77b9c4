"""Layers shared by the control networks.

Shapes: B batch, C channels, H W height and width of the current tensor, D width of the time embedding.
Every constructor takes `operations`, a namespace with Conv2d, GroupNorm and Linear (`torch.nn`, or the host's,
which cast and offload weights), and `dtype`/`device` for the parameters.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(timestep: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding, cosines first.

    timestep: (B,), any real number; dim: even. Returns (B, dim) in fp32:
    [cos(t w_0) .. cos(t w_n), sin(t w_0) .. sin(t w_n)] with w_i = max_period^(-i / (dim/2)).
    Source: Ho et al. 2020 in the form of diffusers' `Timesteps(flip_sin_to_cos=True, downscale_freq_shift=0)`.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * torch.exp(-math.log(max_period) * exponent)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepMLP(nn.Module):
    """Linear, SiLU, Linear on a sinusoidal embedding."""

    def __init__(self, in_dim: int, dim: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.linear_1 = operations.Linear(in_dim, dim, **factory)
        self.linear_2 = operations.Linear(dim, dim, **factory)

    def forward(self, embedding: Tensor) -> Tensor:
        """Apply the layers to an embedding: (B, in_dim). Returns (B, dim)."""
        return self.linear_2(F.silu(self.linear_1(embedding)))


class ResBlock(nn.Module):
    """Residual block: two normalised 3x3 convolutions with the time embedding added between them, around a shortcut.

    out = shortcut(h) + conv2(silu(norm2(conv1(silu(norm1(h))) + time_emb_proj(silu(emb))))). Source: diffusers'
    ResnetBlock2D with its default time mode, the block of every ControlNeXt encoder.
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        groups: int | tuple[int, int],
        emb_dim: int,
        eps: float,
        operations: Any,
        **factory: Any,
    ) -> None:
        """groups: number of groups, one for both norms or one for each."""
        super().__init__()
        before, after = groups if isinstance(groups, tuple) else (groups, groups)
        self.norm1 = operations.GroupNorm(before, in_ch, eps=eps, **factory)
        self.conv1 = operations.Conv2d(in_ch, out_ch, 3, padding=1, **factory)
        self.time_emb_proj = operations.Linear(emb_dim, out_ch, **factory)
        self.norm2 = operations.GroupNorm(after, out_ch, eps=eps, **factory)
        self.conv2 = operations.Conv2d(out_ch, out_ch, 3, padding=1, **factory)
        same = in_ch == out_ch
        self.conv_shortcut = nn.Identity() if same else operations.Conv2d(in_ch, out_ch, 1, **factory)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """Apply the block to h:

        (B, in_ch, H, W), with the time embedding emb: (B or 1, D). Returns (B, out_ch, H, W).
        """
        a = self.first_half(h)
        return self.conv_shortcut(h) + self.second_half(a, emb)

    def first_half(self, h: Tensor) -> Tensor:
        """Part that does not depend on the time: (B, in_ch, H, W) -> (B, out_ch, H, W)."""
        return self.conv1(F.silu(self.norm1(h)))

    def second_half(self, a: Tensor, emb: Tensor) -> Tensor:
        """Second part of the block, to be added to the shortcut, in a's shape.

        a: (B, out_ch, H, W) from `first_half`, emb: (B or 1, D).
        """
        return self.conv2(self.timed(a, emb))

    def timed(self, a: Tensor, emb: Tensor) -> Tensor:
        """Input of the convolution of `second_half`, from the same arguments."""
        time = self.time_emb_proj(F.silu(emb))[:, :, None, None]
        return F.silu(self.norm2(a + time))


class Downsample(nn.Module):
    """Halve height and width (rounded up) with a 3x3 convolution of stride 2."""

    def __init__(self, channels: int, operations: Any, out_ch: int | None = None, **factory: Any) -> None:
        """out_ch: output channels; None: as many as the input has."""
        super().__init__()
        self.conv = operations.Conv2d(channels, out_ch or channels, 3, stride=2, padding=1, **factory)

    def forward(self, h: Tensor) -> Tensor:
        """Downsample h: (B, C, H, W). Returns (B, C or out_ch, ceil(H/2), ceil(W/2))."""
        return self.conv(h)


def zeroed(layer: nn.Module) -> nn.Module:
    """Set the layer's parameters to zero and return it: its output starts as zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
