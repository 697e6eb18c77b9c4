"""Injection of controls: standardise, pool, scale to the moments of the features, apply gain and mask. Pure tensors.

Shapes: B rows (chunks of the guided batch x latents or frames), C channels, H W the site's size, h w the control's.
Statistics are per row over (C, H, W), unbiased, summed in fp32.

Cross Normalization as released: (c - m(c)) * s(x) / (s(c) + eps) + m(x), with m and s the mean and the standard
deviation. The first factor depends only on the hint and the timestep (`prepare`, whose result is cached), the rest on
the features (`fuse`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .specs import Fusion, Gain, GainFormula


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and unbiased standard deviation of a feature map, each (B, 1, 1, 1)."""

    mean: Tensor
    std: Tensor
    count: int
    """Number of elements per row."""


@dataclass(frozen=True, slots=True)
class Normalization:
    """Normalisation that scales a control to the features.

    `own` acts on the control only; `affine` returns the (scale, shift), each (B, 1, 1, 1), for given features.
    """

    own: Callable[[Tensor, float], Tensor]
    affine: Callable[[Moments, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Term:
    """Control that is ready to be added, with its gains."""

    control: Tensor
    """Output of `prepare`, (n, C, h, w); n = 1, or one row per latent of a chunk, or one per row of the features."""
    gains: tuple[float, ...] | Tensor
    """Gains, one per chunk of the guided batch, or one per row where the control has all rows; a tensor where gains
    are trained."""
    fusion: Fusion
    mask: Tensor | None = None
    """Mask (1 or the rows of `control`, 1, any, any) in [0, 1], multiplied with the control."""


def moments(x: Tensor) -> Moments:
    """Moments of each row of x (B, C, H, W), any float dtype: summed in fp32 or better, returned in x's dtype."""
    std, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)
    return Moments(mean, std, x[0].numel())


def standardise(control: Tensor, eps: float) -> Tensor:
    """Standardise a control: (c - m(c)) / (s(c) + eps), per row over (C, h, w), in fp32. A constant control gives
    zeros.

    Source: released cross normalisation; eps is added to the standard deviation.
    """
    control = control.float()
    m = moments(control)
    return (control - m.mean) / (m.std + eps)


def _released_affine(features: Moments, eps: float) -> tuple[Tensor, Tensor]:
    return features.std, features.mean


def _paper_affine(features: Moments, eps: float) -> tuple[Tensor, Tensor]:
    variance = features.std.float().square() * ((features.count - 1) / features.count)
    scale = (variance + eps).rsqrt()
    return scale, -features.mean * scale


def _plain_affine(features: Moments, eps: float) -> tuple[Tensor, Tensor]:
    return torch.ones_like(features.mean), torch.zeros_like(features.mean)


NORMALIZATIONS: dict[str, Normalization] = {
    "released": Normalization(own=standardise, affine=_released_affine),
    # the paper, equations 8-10: (c - m(x)) / sqrt(var(x) + eps), biased variance; the statistics of c are not used
    "paper": Normalization(own=lambda control, eps: control.float(), affine=_paper_affine),
    # c unchanged: plain addition, also for an encoder that ends with a zero convolution
    "none": Normalization(own=lambda control, eps: control.float(), affine=_plain_affine),
}


def pool_to(control: Tensor, size: tuple[int, int]) -> Tensor:
    """Pool (n, C, h, w) to `size` by adaptive averages; unchanged where the size is equal. Source: released code."""
    if tuple(control.shape[-2:]) == size:
        return control
    if control.device.type == "mps":  # on MPS torch pools only to divisors of the size
        return F.adaptive_avg_pool2d(control.cpu(), size).to(control.device)
    return F.adaptive_avg_pool2d(control, size)


def prepare(control: Tensor, size: tuple[int, int], fusion: Fusion) -> Tensor:
    """Compute the part of the normalisation that needs no features, at the site's size.

    control: (n, C, h, w) from the encoder; size: the site's (H, W). Returns (n, C, H, W) in fp32. Pooling is an
    average, so it commutes with the features' scale and shift that `fuse` applies.
    """
    own = NORMALIZATIONS[fusion.normalization].own
    if fusion.pool_first:
        return own(pool_to(control.float(), size), fusion.eps)
    return pool_to(own(control, fusion.eps), size)


def fuse(h: Tensor, terms: Sequence[Term]) -> Tensor:
    """Add every control to h, all measured against the same h.

    h: (chunks * latents, C, H, W). Returns a new tensor of h's shape and dtype: h + sum of gain * mask * (control *
    scale + shift). With all gains zero the values of h are returned bit for bit. The order of `terms` decides the
    rounding of the sum; callers sort them.
    """
    assert terms, "fuse needs at least one control"
    features, total = moments(h), h
    for term in terms:
        whole = 1 < len(total) == len(term.control) == len(term.gains)
        total = _added(total.unflatten(0, (1 if whole else len(term.gains), -1)), term, features).flatten(0, 1)
    return total


def _added(total: Tensor, term: Term, features: Moments) -> Tensor:
    """total (chunks, rows of a chunk, C, H, W) and one control."""
    chunks, dtype = total.shape[0], total.dtype
    scale, shift = (
        part.unflatten(0, (chunks, -1))
        for part in NORMALIZATIONS[term.fusion.normalization].affine(features, term.fusion.eps)
    )
    control, gains = term.control.to(dtype)[None], term.gains
    if term.mask is None and isinstance(gains, tuple) and len(set(gains)) == 1:
        total = torch.add(total, shift.to(dtype), alpha=gains[0])
        return torch.addcmul(total, control, scale.to(dtype), value=gains[0])
    if isinstance(gains, tuple):  # filled in on the device: a copy from the host would synchronise
        gains = torch.cat([torch.full((1,), gain, dtype=torch.float32, device=total.device) for gain in gains])
    gains = gains.view(chunks, -1, 1, 1, 1)
    delta = torch.addcmul((shift * gains).to(dtype), control, (scale * gains).to(dtype))
    if term.mask is not None:
        mask = pool_to(term.mask.to(total.device, torch.float32), (total.shape[-2], total.shape[-1]))
        delta = delta * mask.to(dtype)[None]
    return total + delta


def gain_of(gain: Gain, scale: float | None) -> float:
    """Gain of the conditional half at strength 1, from the row of the table and the encoder's learned `scale`."""
    if gain.formula is GainFormula.CONSTANT:
        return gain.factor
    assert scale is not None, f"gain formula {gain.formula} needs the encoder's scale"
    if gain.formula is GainFormula.LEARNED:
        return gain.factor * scale
    return gain.factor * (1 + math.tanh(scale / 2)) / 2  # the sigmoid, for scales of any size
