"""Objectives: noising of latents, target of the network's output, weight of its error.

Shapes: B samples, R rows of the host's batch (pictures: R = B; clips of SVD: R = B x frames), C H W of the latent;
latents may also be (R, C, T, H, W), with T frames in one row. `sigma` is (B,); every row of a sample has the sample's
noise level. All results are fp32 (fp64 for fp64 arguments).

Noising is the host's: z + sigma n, and (1 - sigma) z + sigma n for flow. The loss is the mean squared error of the
network's output. In terms of the denoised latents that is `clean_weight(sigma)` times their squared error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..controlnext_core.injection import pool_to


@dataclass(frozen=True, slots=True)
class Parameterisation:
    """Parameterisation of the network's output. The functions take (R, C, H, W) tensors and sigma as (R, 1, 1, 1)."""

    noisy: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(z, n, sigma) -> x, the noisy latents of the sampler at sigma."""
    target: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(z, n, sigma) -> target of the network's output at x."""
    denoised: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(output, x, sigma) -> the network's estimate of z."""
    snr: Callable[[Tensor], Tensor]
    """sigma -> signal-to-noise ratio of x, in power."""
    clean_weight: Callable[[Tensor], Tensor]
    """sigma -> w with (output - target)^2 = w (denoised - z)^2."""


def _add(z: Tensor, n: Tensor, sigma: Tensor) -> Tensor:
    return z + sigma * n


def _velocity(z: Tensor, n: Tensor, sigma: Tensor) -> Tensor:
    """Velocity alpha n - sqrt(1 - alpha^2) z with alpha = 1 / sqrt(1 + sigma^2). Source: Salimans and Ho 2022."""
    return (n - sigma * z) / (1 + sigma.square()).sqrt()


def _from_velocity(out: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    power = 1 + sigma.square()
    return x / power - out * sigma / power.sqrt()


_V = Parameterisation(
    noisy=_add,
    target=_velocity,
    denoised=_from_velocity,
    snr=lambda sigma: sigma.pow(-2),
    clean_weight=lambda sigma: 1 + sigma.pow(-2),
)

OBJECTIVES: dict[str, Parameterisation] = {
    "epsilon": Parameterisation(
        noisy=_add,
        target=lambda z, n, sigma: n,
        denoised=lambda out, x, sigma: x - sigma * out,
        snr=lambda sigma: sigma.pow(-2),
        clean_weight=lambda sigma: sigma.pow(-2),
    ),
    "v": _V,
    # SVD: x^ = x / (1 + sigma^2) - out sigma / sqrt(1 + sigma^2), loss (1 + sigma^2) / sigma^2 (x^ - z)^2. Both are
    # those of v, so the loss is (out - v)^2; in this form nothing cancels at sigma = 0.002.
    "edm": _V,
    "flow": Parameterisation(
        noisy=lambda z, n, sigma: (1 - sigma) * z + sigma * n,
        target=lambda z, n, sigma: n - z,
        denoised=lambda out, x, sigma: x - sigma * out,
        snr=lambda sigma: ((1 - sigma) / sigma).square(),
        clean_weight=lambda sigma: sigma.pow(-2),
    ),
}
"""Name in a recipe -> parameterisation of the network's output."""


def per_row(sigma: Tensor, x: Tensor) -> Tensor:
    """Expand sigma (B,) to (R, 1, 1, 1) in fp32 or fp64 on x's device, for x (R, C, H, W).

    Raises ValueError if B does not divide R.
    """
    rows, samples = x.shape[0], sigma.shape[0]
    if rows % samples:
        raise ValueError(f"sigma: {samples} noise levels are not for {rows} rows. Give one per sample.")
    dtype = torch.promote_types(x.dtype, torch.float32)
    return sigma.to(x.device, dtype).repeat_interleave(rows // samples).view(-1, *[1] * (x.ndim - 1))


def noisy(z: Tensor, n: Tensor, sigma: Tensor, objective: Parameterisation) -> Tensor:
    """Noised latents x (R, C, H, W), in the host's convention, before its scaling of the network's input."""
    level = per_row(sigma, z)
    return objective.noisy(z.to(level.dtype), n.to(level.dtype), level)


def denoised(out: Tensor, x: Tensor, sigma: Tensor, objective: Parameterisation) -> Tensor:
    """Clean latents (R, C, H, W) that the network's output predicts."""
    level = per_row(sigma, x)
    return objective.denoised(out.to(level.dtype), x.to(level.dtype), level)


def weight(sigma: Tensor, objective: Parameterisation, min_snr_gamma: float) -> Tensor:
    """Weight of each sample's error (B,): 1, or with gamma > 0 min(SNR, gamma) per error of the clean latents.

    That is min(SNR, gamma) / SNR for epsilon and / (SNR + 1) for v. Source: Hang et al. 2023, Efficient Diffusion
    Training via Min-SNR Weighting Strategy, section 3.4.
    """
    if not min_snr_gamma:
        return torch.ones_like(sigma)
    return objective.snr(sigma).clamp(max=min_snr_gamma) / objective.clean_weight(sigma)


def region_weight(mask: Tensor, size: tuple[int, int], extra: float) -> Tensor:
    """Weight 1 + extra * mask, averaged over the area of each latent cell.

    mask: (R, H, W) in [0, 1], pixels; size: the latent's (h, w). Returns (R, 1, h, w) in fp32.
    """
    return 1 + extra * pool_to(mask.float()[:, None], size)


def loss(
    out: Tensor,
    z: Tensor,
    n: Tensor,
    sigma: Tensor,
    objective: Parameterisation,
    *,
    min_snr_gamma: float = 0.0,
    region: Tensor | None = None,
) -> Tensor:
    """Loss of each sample (B,): the mean over frames, channels and cells of the weighted squared error.

    out: the network's output (R, C, H, W) or (R, C, T, H, W); z, n: latents and noise of the same shape; region: from
    `region_weight`, (R, 1, H, W), or (R, 1, T, H, W) for T > 1; a factor that is not normalised, so that a region
    counts more and no other counts less.
    """
    level = per_row(sigma, out)
    error = (out.to(level.dtype) - objective.target(z.to(level.dtype), n.to(level.dtype), level)).square()
    if region is not None:
        error = error * region.to(error).view(*region.shape[:2], *[1] * (error.ndim - region.ndim), *region.shape[2:])
    samples = sigma.to(error)
    return error.reshape(len(sigma), -1).mean(dim=1) * weight(samples, objective, min_snr_gamma)


def offset_noise(noise: Tensor, offsets: Tensor, strength: float) -> Tensor:
    """Noise with a common offset per channel, with which very dark and bright pictures are learned.

    noise: (R, C, ...); offsets: (B, C) standard normal; one offset for all frames of a sample. Source: Guttenberg 2023,
    Diffusion with offset noise.
    """
    if not strength:
        return noise
    per_row = offsets.to(noise).repeat_interleave(len(noise) // len(offsets), dim=0)
    return noise + strength * per_row.view(*per_row.shape, *[1] * (noise.ndim - 2))


def _uniform(u: Tensor, sigmas: Tensor) -> Tensor:
    return sigmas[(u * len(sigmas)).long().clamp(max=len(sigmas) - 1).to(sigmas.device)]


def _logit_normal(u: Tensor, sigmas: Tensor) -> Tensor:
    """Noise levels at positions in the table that are the logistic function of a standard normal.

    Source: Esser et al. 2024 (SD3), 3.1.
    """
    return _uniform(torch.special.ndtri(u).sigmoid(), sigmas)


SVD_IMAGE_SIDE = 64
SVD_NOISE_SIDES = (32, 64)
SVD_SIGMA_DATA = 0.5


def _svd_cosine(u: Tensor, sigmas: Tensor) -> Tensor:
    """Noise levels of the shifted cosine schedule at two resolutions, interpolated in log sigma; descending in u.

    tan(a + u (b - a)) of the angles whose tangents are the range's ends, shifted by the ratio of the sides. Source: the
    SVD trainer's numbers; the schedule is Hoogeboom et al. 2023 (simple diffusion), section 3.
    """
    low, high = sigmas[0].double().cpu(), sigmas[-1].double().cpu()
    log_sigma = torch.zeros_like(u)
    for side, part in zip(SVD_NOISE_SIDES, (1 - u, u), strict=True):
        ratio = side / SVD_IMAGE_SIDE / SVD_SIGMA_DATA
        start, end = torch.atan(ratio * high), torch.atan(ratio * low)
        log_sigma = log_sigma + part * (torch.tan(start + u * (end - start)).log() - math.log(ratio))
    return log_sigma.exp().to(sigmas)


LOG_NORMAL = "log_normal"
"""Name of EDM's distribution of timesteps, whose mean and standard deviation are settings."""


def log_normal(u: Tensor, sigmas: Tensor, mean: float, std: float) -> Tensor:
    """Noise levels whose logarithm is normal, truncated to the table's range.

    u: (B,) float64 in (0, 1); sigmas: the table (T,), ascending. Source: Karras et al. 2022 (EDM), table 1.
    """
    ends = torch.stack([sigmas[0], sigmas[-1]]).double().cpu().clamp(min=1e-12).log()
    low, high = torch.special.ndtr((ends - mean) / std)
    drawn = (mean + std * torch.special.ndtri(low + u * (high - low))).exp()
    return drawn.clamp(float(sigmas[0]), float(sigmas[-1])).to(sigmas)


def within(sigmas: Tensor, low: float, high: float) -> Tensor:
    """Part of an ascending table from `low` to `high`; 0: the table's end. May be empty."""
    return sigmas[(sigmas >= low) & (sigmas <= (high or math.inf))]


def stratified(u: float, place: int, count: int) -> float:
    """Number in the place-th of `count` equal parts of (0, 1), for u in (0, 1)."""
    return (place + u) / count


TIMESTEP_DISTRIBUTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "uniform": _uniform,
    "logit_normal": _logit_normal,
    "svd_cosine": _svd_cosine,
}
"""Name -> (u, sigmas) -> sigma (B,), in the dtype and on the device of `sigmas`.

u: (B,) float64 in (0, 1), on the CPU; sigmas: the host's table (T,), ascending.
"""
