"""Merged convolutions: a 3x3 or 1x1 convolution and the stride-2 convolution after it, with nothing between them.

Both are linear, so their product is one convolution of stride 2, of 5x5 or 3x3: for C channels on S cells 6.25 S C^2
multiply-adds in place of 11.25 S C^2, and no map of S cells between them. In exact arithmetic the results are equal; in
floating point they differ as two orders of one sum do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Downsample, ResBlock

WeightsOf = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
"""(convolution, a tensor of the required dtype and device) -> (weight, bias)."""
CELLS_PER_CHANNEL = 64
"""Smallest number of cells per channel of a map at which convolutions are merged. Merging takes 81 C^3 multiply-adds
and saves 5 S C^2 at each timestep of the hint: from 16 cells per channel on it pays at the first."""
EDGE = 3
"""Rows of a map that determine the first, or the last, row of the downsampled map."""


def own_weights(layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a plain torch convolution, for input of the dtype and device of `like`."""
    plain: Any = layer
    return plain.weight, plain.bias


@dataclass(frozen=True, slots=True)
class MergedConv:
    """Convolution of stride 2 that replaces two: `first` (stride 1, padded), then the 3x3 one of a downsampling."""

    first: tuple[Tensor, Tensor]
    """Weight (M, I, k, k) and bias (M), k odd."""
    second: tuple[Tensor, Tensor | None]
    """Weight (O, M, 3, 3) and bias (O), which may be None."""
    weight: Tensor
    """(O, I, k + 2, k + 2)."""
    bias: Tensor

    def __call__(self, h: Tensor) -> Tensor:
        """Apply both convolutions to h: (B, I, H, W). Returns (B, O, ceil(H/2), ceil(W/2)).

        The downsampling pads the intermediate map with zeros, which the merged convolution does not reproduce: the
        first row and column, and the last of an odd size, are computed in two steps.
        """
        if min(h.shape[2:]) < EDGE:
            return self._in_two(h)
        half = F.conv2d(h, self.weight, self.bias, stride=2, padding=self.weight.shape[-1] // 2)
        for dim in (2, 3):
            size = h.shape[dim]
            half.narrow(dim, 0, 1).copy_(self._in_two(h.narrow(dim, 0, EDGE)).narrow(dim, 0, 1))
            if size % 2:
                last = self._in_two(h.narrow(dim, size - EDGE, EDGE)).narrow(dim, 1, 1)
                half.narrow(dim, half.shape[dim] - 1, 1).copy_(last)
        return half

    def _in_two(self, h: Tensor) -> Tensor:
        weight, bias = self.first
        return F.conv2d(F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2), *self.second, stride=2, padding=1)


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor | None], like: Tensor) -> MergedConv:
    """Merge two convolutions: weight p of the product is the sum over k of second[k] first[p - k], in fp32.

    Its bias is second's, plus first's through the sum of second's taps. like: a tensor that gives dtype and layout.
    """
    (early, early_bias), (late, late_bias) = first, second
    (out, mid, _, _), (_, channels, size, _) = late.shape, early.shape
    taps = late.permute(0, 2, 3, 1).reshape(-1, mid).float() @ early.reshape(mid, -1).float()
    terms = taps.reshape(out, 3, 3, channels, size, size)
    weight = sum(F.pad(terms[:, y, x], (x, 2 - x, y, 2 - y)) for y in range(3) for x in range(3))
    assert isinstance(weight, Tensor)
    bias = late.sum((2, 3), dtype=torch.float32) @ early_bias.float()
    bias = bias if late_bias is None else bias + late_bias.float()
    last = like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return MergedConv(first, second, weight.to(like.dtype).contiguous(memory_format=layout), bias.to(like.dtype))


@dataclass(frozen=True, slots=True)
class MergedStage:
    """Merged convolutions of a residual block and the downsampling after it."""

    residual: MergedConv
    """Second convolution of the block merged with the downsampling, without the latter's bias."""
    shortcut: Callable[[Tensor], Tensor]
    """Shortcut of the block merged with the downsampling, with its bias: (B, I, H, W) -> (B, O, ceil(H/2),
    ceil(W/2))."""


def merge_stage(
    res: ResBlock, down: Downsample, cells: float, like: Tensor, weights_of: WeightsOf
) -> MergedStage | None:
    """Merge the convolutions for maps of `cells` cells; None where merging costs more than it saves.

    like: a tensor of the maps' dtype, device and layout.
    """
    conv: Any = res.conv2
    if cells < CELLS_PER_CHANNEL * conv.out_channels:
        return None
    late, bias = weights_of(down.conv, like)
    residual = merge(weights_of(conv, like), (late, None), like)
    if isinstance(res.conv_shortcut, nn.Identity):
        return MergedStage(residual, down)
    return MergedStage(residual, merge(weights_of(res.conv_shortcut, like), (late, bias), like))
