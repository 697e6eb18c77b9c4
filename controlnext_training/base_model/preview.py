"""Sampler of validation pictures with the weights in training, without loading a model."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.k_diffusion.sampling
import comfy.samplers
import torch
from torch import Tensor

from .controlled import Conditions, Controlled

SCHEDULER = "normal"


@torch.no_grad()
def sample(
    controlled: Controlled,
    noise: Tensor,
    positive: Sequence[Conditions],
    negative: Sequence[Conditions],
    hint: Tensor,
    *,
    steps: int,
    cfg: float,
    strength: float,
) -> Tensor:
    """Sample latents (rows, C, H, W), or (rows, C, T, H, W) of clips, from noise of that shape, with the host's Euler
    and guidance.

    positive, negative: conditions per sample; hint: as for `Controlled.forward`; both halves get the control.
    """
    sampling = controlled.base.model_sampling
    sigmas = comfy.samplers.calculate_sigmas(sampling, SCHEDULER, steps).to(noise.device)
    start = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), True)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        wanted = controlled.denoised(x, sigma, positive, hint, strength)
        if cfg == 1:
            return wanted
        unwanted = controlled.denoised(x, sigma, negative, hint, strength)
        return unwanted + cfg * (wanted - unwanted)

    latents = comfy.k_diffusion.sampling.sample_euler(denoise, start, sigmas, disable=True)
    return sampling.inverse_noise_scaling(sigmas[-1], latents)
