"""Batches and losses: samples are noised, predicted and weighted. Nothing here saves or shows results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..controlnext_core.latent_clips import averaged, frame_groups
from . import objective as objectives
from .base_model.controlled import Controlled, Sizes
from .choices import AUTO
from .config import ConfigError, TrainConfig
from .encoded import Encoded
from .objective import LOG_NORMAL, OBJECTIVES, TIMESTEP_DISTRIBUTIONS, Parameterisation
from .seeding import generator


@dataclass(frozen=True)
class DiffusionObjective:
    """Target of the network and distribution of its noise levels."""

    parameterisation: Parameterisation
    sigmas: Tensor
    """Noise levels of the base, ascending."""
    timesteps: str
    log_normal: tuple[float, float] = (-1.2, 1.2)
    """Mean and standard deviation of log sigma, for `timesteps = log_normal`."""

    @classmethod
    def of(cls, config: TrainConfig, controlled: Controlled) -> DiffusionObjective:
        name = controlled.predicts if config.objective == AUTO else config.objective
        timesteps = controlled.family.timesteps if config.timesteps == AUTO else config.timesteps
        table = controlled.base.model_sampling.sigmas.float().cpu()
        sigmas = objectives.within(table, config.sigma_min, config.sigma_max)
        if not len(sigmas):
            raise ConfigError(
                f"sigma_min, sigma_max: no noise level of this model lies from {config.sigma_min:g} to "
                f"{config.sigma_max:g}; its own go from {float(table[0]):g} to {float(table[-1]):g}."
            )
        return cls(OBJECTIVES[name], sigmas, timesteps, (config.log_normal_mean, config.log_normal_std))

    def sigma(self, u: Sequence[float]) -> Tensor:
        """Noise levels (B,) for numbers in (0, 1)."""
        drawn = torch.tensor(u, dtype=torch.float64)
        if self.timesteps == LOG_NORMAL:
            return objectives.log_normal(drawn, self.sigmas, *self.log_normal)
        return TIMESTEP_DISTRIBUTIONS[self.timesteps](drawn, self.sigmas)


@dataclass(frozen=True)
class Batch:
    """Batch of samples on the device. R rows = samples x frames, or samples where a clip is one latent."""

    latent: Tensor
    """Latents (R, C, h, w), or (R, C, T, h, w)."""
    hint: Tensor
    """Hints (samples x frames, 3, H, W)."""
    conditions: list[Any]
    noise: Tensor
    """Noise, in the shape of the latent."""
    sigma: Tensor
    """Noise levels (B,)."""
    region: Tensor | None
    """Loss weights (R, 1, h, w), (R, 1, T, h, w) for clips of several latent frames, or None."""
    weight: Tensor
    """Factors on the losses (B,)."""


def draw(
    samples: Sequence[Encoded],
    positions: Sequence[int],
    objective: DiffusionObjective,
    config: TrainConfig,
    controlled: Controlled,
    levels: Sequence[float] | None = None,
    purpose: str = "",
) -> Batch:
    """Batch with the noise and the noise levels of these positions of the run.

    levels: numbers in (0, 1) in place of random ones; purpose: separates the random numbers of validation from those of
    training.
    """
    device = controlled.device
    noises, offsets, drawn = [], [], []
    for sample, position in zip(samples, positions, strict=True):
        source = generator(config.seed, f"noise{purpose}", position)
        noises.append(torch.randn(sample.latent.shape, generator=source))
        offsets.append(torch.randn(sample.latent.shape[1], generator=source))
        drawn.append(float(torch.rand((), generator=source, dtype=torch.float64)))
        if config.stratified_timesteps:
            drawn[-1] = objectives.stratified(drawn[-1], _stratum(config, position), config.batch_size)
    sigma = objective.sigma(drawn if levels is None else levels)
    noise = objectives.offset_noise(torch.cat(noises), torch.stack(offsets), config.noise_offset)
    latent = torch.cat([sample.latent for sample in samples]).to(device)
    return Batch(
        latent=latent,
        hint=torch.cat([sample.hint for sample in samples]).to(device),
        conditions=[conditions_of(sample, sample.given, controlled) for sample in samples],
        noise=noise.to(device),
        sigma=sigma.to(device),
        region=_region(samples, config, latent),
        weight=torch.tensor([sample.weight for sample in samples], device=device),
    )


def _stratum(config: TrainConfig, position: int) -> int:
    """Part of the noise levels' distribution for a position: each of `batch_size` parts once in a forward pass."""
    batch, place = divmod(position, config.batch_size)
    return int(torch.randperm(config.batch_size, generator=generator(config.seed, "strata", batch))[place])


def conditions_of(
    sample: Encoded, given: dict[str, Tensor], controlled: Controlled, guidance: float | None = None
) -> Any:
    """Conditions of a sample in the host's form, from its encoded conditions; guidance: as for
    `Controlled.conditions`.
    """
    sizes = Sizes(sample.original_size, sample.crop, sample.size)
    on_device = {name: t.to(controlled.device) for name, t in given.items()}
    return controlled.conditions(sample.latent.to(controlled.device), on_device, sizes, guidance)


def _region(samples: Sequence[Encoded], config: TrainConfig, latent: Tensor) -> Tensor | None:
    if not config.mask_weight or all(sample.mask is None for sample in samples):
        return None
    masks = [torch.zeros(sample.hint[:, 0].shape) if sample.mask is None else sample.mask for sample in samples]
    size = (int(latent.shape[-2]), int(latent.shape[-1]))
    weights = objectives.region_weight(torch.cat(masks).to(latent.device), size, config.mask_weight)
    if latent.ndim < 5 or latent.shape[2] == 1:
        return weights
    return torch.stack([_of_latent_frames(w, int(latent.shape[2])) for w in weights.unflatten(0, (len(samples), -1))])


def _of_latent_frames(weights: Tensor, length: int) -> Tensor:
    """Weights (F, 1, h, w) of a clip's frames -> (1, T, h, w), means over the frames of each latent frame."""
    count = len(weights)
    groups = frame_groups(range(length), count, (count - 1) // (length - 1))
    return averaged(weights, range(count), groups).movedim(0, 1)


def losses(
    model: nn.Module, batch: Batch, objective: DiffusionObjective, config: TrainConfig, strength: float = 1.0
) -> Tensor:
    """Loss of each sample (B,) in fp32. model: the Controlled, or its distributed wrapper."""
    frames = len(batch.latent) // len(batch.sigma)
    x = objectives.noisy(batch.latent, batch.noise, batch.sigma, objective.parameterisation)
    rows = batch.sigma.repeat_interleave(frames)
    out = model(x, rows, batch.conditions, batch.hint, strength)
    return batch.weight * objectives.loss(
        out,
        batch.latent,
        batch.noise,
        batch.sigma,
        objective.parameterisation,
        min_snr_gamma=config.min_snr_gamma,
        region=batch.region,
    )
