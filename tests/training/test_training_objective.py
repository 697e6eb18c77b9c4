"""Objectives against diffusers' schedulers, the host's model sampling and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.injection import Term, fuse, prepare
from comfyui_controlnext.controlnext_core.specs import SPECS, Fusion, Site
from comfyui_controlnext.controlnext_training.objective import (
    OBJECTIVES,
    TIMESTEP_DISTRIBUTIONS,
    denoised,
    loss,
    noisy,
    offset_noise,
    region_weight,
    weight,
)
from comfyui_controlnext.tools.launcher import declare_missing_torchvision_ops
from torch import Tensor

SHAPES = [(1, 4, 8, 8), (3, 4, 5, 9), (2, 16, 6, 4)]
ROUNDING = 2e-6  # of fp32, relative to values of order 1


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def stable_diffusion_sigmas() -> Tensor:
    """Noise levels of SD1.5 and SDXL, computed here: betas whose roots are evenly spaced."""
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()).cumprod(0)
    return ((1 - alphas) / alphas).sqrt()


def levels(objective: str, samples: int, dtype: torch.dtype = torch.float32) -> Tensor:
    if objective == "flow":
        return torch.linspace(0.05, 0.95, samples, dtype=dtype)
    return torch.logspace(-1, 1, samples, dtype=dtype)


def wide(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def training_utils() -> Any:
    """Training utilities of diffusers, which import torchvision."""
    declare_missing_torchvision_ops()
    from diffusers import training_utils

    return training_utils


@pytest.fixture(scope="module")
def ddpm() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_and_velocity_are_those_of_ddpm_at_every_timestep(ddpm: Any, shape: tuple[int, ...]) -> None:
    z, n = randn(*shape, seed=1), randn(*shape, seed=2)
    sigmas = stable_diffusion_sigmas()
    for timestep in (0, 1, 250, 500, 998, 999):
        t = torch.full((shape[0],), timestep)
        sigma = sigmas[t].float()
        scaled = noisy(z, n, sigma, OBJECTIVES["v"]) / wide(1 + sigma**2).sqrt()
        assert torch.allclose(scaled, ddpm.add_noise(z, n, t), atol=ROUNDING)
        assert torch.equal(noisy(z, n, sigma, OBJECTIVES["epsilon"]), noisy(z, n, sigma, OBJECTIVES["v"]))
        velocity = OBJECTIVES["v"].target(z, n, wide(sigma))
        assert torch.allclose(velocity, ddpm.get_velocity(z, n, t), atol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_target_denoises_to_the_clean_latents(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    objective = OBJECTIVES[name]
    z, n = randn(*shape, seed=1, dtype=dtype), randn(*shape, seed=2, dtype=dtype)
    sigma = levels(name, shape[0], torch.float64)
    x = noisy(z, n, sigma, objective)
    assert x.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    target = objective.target(z.to(x), n.to(x), wide(sigma).to(x))
    back = denoised(target, x, sigma, objective)
    assert torch.allclose(back, z.to(x), atol=1e-12 if dtype is torch.float64 else 2e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_the_weighted_error_of_the_clean_latents(name: str) -> None:
    """The natural weights, written out: 1 / sigma^2, and (1 + sigma^2) / sigma^2 where v is predicted."""
    objective, sigma = OBJECTIVES[name], levels(name, 3, torch.float64)
    z, n, out = (randn(3, 4, 6, 5, seed=i, dtype=torch.float64) for i in range(3))
    natural = sigma**-2 + (1 if name in ("v", "edm") else 0)
    error = denoised(out, noisy(z, n, sigma, objective), sigma, objective) - z
    expected = natural * error.square().mean(dim=(1, 2, 3))
    assert torch.allclose(loss(out, z, n, sigma, objective), expected, rtol=1e-12)


@pytest.mark.parametrize("sigma", [0.002, 0.05, 0.7, 12.0, 700.0])
def test_the_svd_loss_is_the_released_trainers(sigma: float) -> None:
    """Frames of one clip share a level; the mask of the hands is multiplied on and the mean is over everything."""
    z, n, out = (randn(14, 4, 6, 10, seed=i) for i in range(3))
    hands = (randn(14, 1, 6, 10, seed=3) > 1).double() * 3.2 + 1
    s, clean, answer = sigma, z.double(), out.double()
    x = clean + s * n.double()
    x_hat = -s / math.sqrt(s**2 + 1) * answer + x / (s**2 + 1)
    expected = ((1 + s**2) / s**2 * (x_hat - clean) ** 2 * hands).mean()
    found = loss(out, z, n, torch.tensor([s]), OBJECTIVES["edm"], region=hands.float())
    assert found.shape == (1,) and found.dtype is torch.float32
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.comfy
@pytest.mark.parametrize(
    ("name", "prediction", "sampling"),
    [
        ("epsilon", "EPS", "ModelSamplingDiscrete"),
        ("v", "V_PREDICTION", "ModelSamplingDiscrete"),
        ("edm", "V_PREDICTION", "ModelSamplingContinuousEDM"),
        ("flow", "CONST", "ModelSamplingDiscreteFlow"),
    ],
)
def test_the_host_noises_and_denoises_the_same(name: str, prediction: str, sampling: str) -> None:
    from comfy import model_sampling

    host = type("Host", (getattr(model_sampling, sampling), getattr(model_sampling, prediction)), {})()
    z, n, out = (randn(2, 4, 8, 6, seed=i) for i in range(3))
    for index in (0, 400, 999):
        sigma = host.sigmas[index].repeat(2)
        x = noisy(z, n, sigma, OBJECTIVES[name])
        assert torch.allclose(x, host.noise_scaling(sigma, n.clone(), z), rtol=1e-6, atol=1e-6)
        ours = denoised(out, x, sigma, OBJECTIVES[name])
        assert torch.allclose(ours, host.calculate_denoised(sigma, out, x), rtol=1e-5, atol=1e-5 * float(sigma[0] + 1))


def test_min_snr_is_that_of_diffusers_trainers(ddpm: Any, training_utils: Any) -> None:
    t = torch.tensor([0, 1, 100, 400, 700, 999])
    snr = training_utils.compute_snr(ddpm, t).double()
    sigma = stable_diffusion_sigmas()[t]
    for gamma in (1.0, 5.0, 20.0):
        clipped = snr.clamp(max=gamma)
        assert torch.allclose(weight(sigma, OBJECTIVES["epsilon"], gamma), clipped / snr, rtol=1e-4)
        for name in ("v", "edm"):
            assert torch.allclose(weight(sigma, OBJECTIVES[name], gamma), clipped / (snr + 1), rtol=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_min_snr_weighs_the_clean_latents_error_by_the_clipped_ratio(name: str) -> None:
    """Definition of the weight, common to all objectives: also flow's, whose ratio is ((1 - s) / s)^2."""
    objective, sigma = OBJECTIVES[name], levels(name, 4, torch.float64)
    z, n, out = (randn(4, 4, 5, 5, seed=i, dtype=torch.float64) for i in range(3))
    signal, noise = (1 - sigma, sigma) if name == "flow" else (torch.ones_like(sigma), sigma)
    ratio = (signal / noise) ** 2
    error = denoised(out, noisy(z, n, sigma, objective), sigma, objective) - z
    expected = ratio.clamp(max=5.0) * error.square().mean(dim=(1, 2, 3))
    assert torch.allclose(loss(out, z, n, sigma, objective, min_snr_gamma=5.0), expected, rtol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_gamma_every_level_weighs_one(name: str) -> None:
    assert torch.equal(weight(levels(name, 5), OBJECTIVES[name], 0.0), torch.ones(5))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_the_losss_gradient_is_that_of_finite_differences(name: str, gamma: float) -> None:
    sigma = levels(name, 2, torch.float64)
    z, n, out = (randn(4, 2, 3, 2, seed=i, dtype=torch.float64).requires_grad_() for i in range(3))
    region = 1 + randn(4, 1, 3, 2, seed=4, dtype=torch.float64).abs()

    def run(out: Tensor, z: Tensor, n: Tensor) -> Tensor:
        return loss(out, z, n, sigma, OBJECTIVES[name], min_snr_gamma=gamma, region=region)

    assert torch.autograd.gradcheck(run, (out, z, n))
    assert torch.autograd.gradcheck(lambda z, n: noisy(z, n, sigma, OBJECTIVES[name]), (z, n))


FUSIONS = [SPECS["sd15"].fusion, SPECS["sdxl"].fusion, SPECS["svd_v2"].fusion]
FUSIONS += [Fusion(site=Site.AFTER_CONV_IN, pool_first=True, eps=1e-5, normalization=n) for n in ("paper", "none")]


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: f"{f.normalization}, pool_first={f.pool_first}, {f.eps:g}")
@pytest.mark.parametrize("size", [(4, 3), (8, 6)], ids=str)
def test_the_fusions_gradient_is_that_of_finite_differences(
    fusion: Fusion, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients in fp64: statistics are computed in fp32, which is too coarse for finite differences, so `float` is
    double here.
    """
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    control = (randn(2, 3, *size, seed=1, dtype=torch.float64) * 3 - 0.4).requires_grad_()
    h = (randn(2, 3, 4, 3, seed=2, dtype=torch.float64) + 0.3).requires_grad_()
    mask = torch.rand(1, 1, 4, 3, generator=torch.Generator().manual_seed(3))

    def run(control: Tensor, h: Tensor) -> Tensor:
        return fuse(h, [Term(prepare(control, (4, 3), fusion), (0.7,), fusion, mask)])

    assert torch.autograd.gradcheck(run, (control, h), atol=1e-6)
    assert torch.autograd.gradcheck(lambda control: prepare(control, (4, 3), fusion), (control,), atol=1e-6)


def test_a_region_counts_more_by_its_covered_area() -> None:
    mask = torch.zeros(2, 16, 24)
    mask[0, :8, :12] = 1
    weights = region_weight(mask, (2, 3), 3.2)
    assert torch.allclose(weights, torch.tensor([[[[4.2, 2.6, 1.0], [1.0] * 3]], [[[1.0] * 3, [1.0] * 3]]]))
    z, n, out = (randn(2, 4, 2, 3, seed=i) for i in range(3))
    found = loss(out, z, n, torch.tensor([0.5, 2.0]), OBJECTIVES["epsilon"], region=weights)
    squared = (out - n).square()
    assert torch.allclose(found[0], (squared[0] * weights[0]).mean())
    assert torch.allclose(found[1], squared[1].mean())


def test_low_precision_outputs_are_compared_in_fp32() -> None:
    z, n = randn(2, 4, 64, 64, seed=1), randn(2, 4, 64, 64, seed=2)
    out = (n + 0.01).bfloat16()
    found = loss(out, z, n, torch.ones(2), OBJECTIVES["epsilon"])
    assert found.dtype is torch.float32
    assert torch.allclose(found, (out.double() - n.double()).square().mean(dim=(1, 2, 3)).float(), rtol=1e-5)


def test_levels_that_do_not_fit_the_rows_are_refused() -> None:
    z = randn(3, 4, 2, 2)
    with pytest.raises(ValueError, match="2 noise levels are not for 3 rows. Give one per sample"):
        noisy(z, z, torch.ones(2), OBJECTIVES["epsilon"])


def test_one_offset_per_channel_and_sample_is_added_to_the_noise() -> None:
    noise, offsets = randn(6, 4, 3, 2, seed=1), randn(2, 4, seed=2)
    found = offset_noise(noise, offsets, 0.1)
    for row in range(6):
        assert torch.equal(found[row], noise[row] + 0.1 * offsets[row // 3][:, None, None])
    assert offset_noise(noise, offsets, 0.0) is noise
    assert offset_noise(noise.bfloat16(), offsets, 0.1).dtype is torch.bfloat16


def grid(count: int) -> Tensor:
    """Evenly spaced numbers in (0, 1): the distribution of many draws, without their noise."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_the_uniform_distribution_draws_each_integer_timestep_equally_often() -> None:
    sigmas = stable_diffusion_sigmas().float()
    drawn = TIMESTEP_DISTRIBUTIONS["uniform"](grid(5000), sigmas)
    assert torch.equal(drawn, sigmas.repeat_interleave(5))
    ends = TIMESTEP_DISTRIBUTIONS["uniform"](torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), sigmas)
    assert torch.equal(ends, sigmas[[0, -1]])


def test_the_logit_normal_distribution_is_sd3s(training_utils: Any) -> None:
    source = torch.Generator().manual_seed(0)
    theirs = training_utils.compute_density_for_timestep_sampling(
        "logit_normal", 200_000, logit_mean=0.0, logit_std=1.0, generator=source
    )
    sigmas = (torch.arange(1000) + 1) / 1000
    ours = TIMESTEP_DISTRIBUTIONS["logit_normal"](grid(1000), sigmas)
    parts = torch.linspace(0.02, 0.98, 25)
    assert torch.allclose(ours.quantile(parts), theirs.quantile(parts), atol=0.005)  # 1/1000 and the noise of theirs
    ends = TIMESTEP_DISTRIBUTIONS["logit_normal"](torch.tensor([0.0, 1e-300, 1 - 2**-53], dtype=torch.float64), sigmas)
    assert torch.equal(ends, sigmas[[0, 0, -1]])


SVD_QUANTILES = {0.01: 58, 0.05: 12.1, 0.1: 5.85, 0.25: 2.03, 0.5: 0.709, 0.75: 0.248, 0.9: 0.087, 0.99: 0.0099}


def test_the_svd_distribution_has_the_quantiles_of_the_released_trainer() -> None:
    sigmas = torch.linspace(math.log(0.002), math.log(700.0), 1000).exp()
    u = torch.tensor([0.0, *SVD_QUANTILES, 1.0], dtype=torch.float64)
    found = TIMESTEP_DISTRIBUTIONS["svd_cosine"](u, sigmas)
    assert found.tolist() == pytest.approx([700.0, *SVD_QUANTILES.values(), 0.002], rel=6e-3)


def test_the_svd_distribution_is_the_interpolated_cosine_one_in_log_snr() -> None:
    """The distribution of the paper: log SNR -2 log tan(a t + b), shifted by 2 log(noise / image), interpolated."""

    def log_snr(t: float, side: float) -> float:
        shift = 2 * math.log(side / 64)
        ends = [math.atan(math.exp(-0.5 * (-2 * math.log(sigma / 0.5) - shift))) for sigma in (700.0, 0.002)]
        return -2 * math.log(math.tan(ends[0] + t * (ends[1] - ends[0]))) + shift

    u = grid(97)
    expected = [math.exp(-0.5 * ((1 - t) * log_snr(t, 32) + t * log_snr(t, 64))) * 0.5 for t in u.tolist()]
    found = TIMESTEP_DISTRIBUTIONS["svd_cosine"](u, torch.tensor([0.002, 700.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("distribution", TIMESTEP_DISTRIBUTIONS.values(), ids=TIMESTEP_DISTRIBUTIONS)
def test_a_distribution_gives_levels_of_the_table_one_per_sample(
    distribution: Callable[[Tensor, Tensor], Tensor],
) -> None:
    for sigmas in (stable_diffusion_sigmas().float(), torch.linspace(0.001, 1, 1000).double()):
        for u in (grid(1), grid(7), torch.rand(64, dtype=torch.float64)):
            found = distribution(u, sigmas)
            assert found.shape == u.shape and found.dtype is sigmas.dtype
            assert bool((found >= sigmas[0] * 0.999).all() and (found <= sigmas[-1] * 1.001).all())
            assert torch.equal(found[:1], distribution(u[:1], sigmas)), (
                "a sample's level depends on its own number alone"
            )


def test_a_clip_in_one_row_is_the_clip_in_rows_of_frames() -> None:
    """Latents (R, C, T, H, W) mean what the same frames mean as rows: the same noise and, up to rounding, loss."""
    z, n, out = (randn(2, 3, 4, 5, 6, seed=i) for i in range(3))  # samples, frames, channels, height, width
    sigma, offsets = torch.tensor([0.3, 2.0]), randn(2, 4, seed=9)
    rows = [tensor.flatten(0, 1) for tensor in (z, n, out)]
    whole = [tensor.transpose(1, 2) for tensor in (z, n, out)]
    for name in OBJECTIVES:
        one = loss(rows[2], rows[0], rows[1], sigma, OBJECTIVES[name])
        other = loss(whole[2], whole[0], whole[1], sigma, OBJECTIVES[name])
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
    noise = offset_noise(whole[1], offsets, 0.1).transpose(1, 2).flatten(0, 1)
    assert torch.equal(noise, offset_noise(rows[1], offsets, 0.1))


def test_the_distribution_of_edm_is_normal_in_log_sigma_and_stays_in_its_range() -> None:
    """Against scipy-free reference: quantiles of a truncated normal by bisection of its distribution function."""
    from statistics import NormalDist

    from comfyui_controlnext.controlnext_training.objective import log_normal, within

    table = torch.linspace(0.002, 700, 5000, dtype=torch.float64)
    u = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99], dtype=torch.float64)
    distribution = NormalDist(-1.2, 1.2)
    for low, high in ((0.0, 0.0), (0.2, 3.0)):
        sigmas = within(table, low, high)
        first, last = distribution.cdf(math.log(float(sigmas[0]))), distribution.cdf(math.log(float(sigmas[-1])))
        expected = [math.exp(distribution.inv_cdf(first + float(x) * (last - first))) for x in u]
        assert log_normal(u, sigmas, -1.2, 1.2).tolist() == pytest.approx(expected, rel=1e-6)
    assert float(sigmas[0]) >= 0.2 and float(sigmas[-1]) <= 3.0 and len(within(table, 800, 0)) == 0
