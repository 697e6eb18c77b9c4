"""Single step: its noise and noise levels are functions of the position, its loss is the formula."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.specs import Family
from comfyui_controlnext.controlnext_training.encoded import Encoded
from comfyui_controlnext.controlnext_training.objective import OBJECTIVES
from comfyui_controlnext.controlnext_training.step import DiffusionObjective, draw, losses
from comfyui_controlnext.tests.fixtures.sampling_fixtures import CELLS, Studio, picture
from comfyui_controlnext.tests.fixtures.training_fixtures import SIDE, small
from comfyui_controlnext.tests.training.test_training_base import controlled_on
from torch import Tensor

pytestmark = pytest.mark.comfy

ROUNDING = 1e-5
"""Relative difference of the loss and of the same mean formed in fp64."""


@pytest.fixture(scope="module")
def controlled(loaded_studio: Studio) -> Any:
    return controlled_on(loaded_studio.model, trainable="none")


def encoded(number: int, mask: Tensor | None = None) -> Encoded:
    g = torch.Generator().manual_seed(number)
    return Encoded(
        latent=torch.randn(1, 4, CELLS, CELLS, generator=g),
        given={"context": torch.randn(1, 77, 768, generator=g)},
        hint=picture(number).movedim(-1, 1).contiguous(),
        mask=mask,
        original_size=(SIDE, SIDE),
        crop=(0, 0),
        caption="",
    )


def left_half() -> Tensor:
    mask = torch.zeros(1, SIDE, SIDE)
    mask[..., : SIDE // 2] = 1
    return mask


def drawn_batch(controlled: Any, samples: list[Encoded], positions: list[int], **settings: Any) -> Any:
    config = small(**settings)
    return draw(samples, positions, DiffusionObjective.of(config, controlled), config, controlled)


def loss_of(controlled: Any, batch: Any, **settings: Any) -> Tensor:
    config = small(**settings)
    with torch.no_grad():
        return losses(controlled, batch, DiffusionObjective.of(config, controlled), config)


def test_noise_and_level_depend_on_seed_and_position_alone(controlled: Any) -> None:
    one = drawn_batch(controlled, [encoded(1), encoded(2)], [5, 6])
    other = drawn_batch(controlled, [encoded(3)], [6])
    assert torch.equal(one.noise[1:], other.noise) and torch.equal(one.sigma[1:], other.sigma)
    assert not torch.equal(one.noise[0], one.noise[1]) and one.sigma[0] != one.sigma[1]
    reseeded = drawn_batch(controlled, [encoded(3)], [6], seed=1)
    assert not torch.equal(reseeded.noise, other.noise)
    offset = drawn_batch(controlled, [encoded(3)], [6], noise_offset=0.1)
    shift = offset.noise - other.noise
    torch.testing.assert_close(shift, shift.mean(dim=(2, 3), keepdim=True).expand_as(shift), rtol=0, atol=1e-6)
    assert torch.equal(offset.sigma, other.sigma), "switching the offset on changes nothing else"


def test_the_noise_of_validation_is_not_that_of_training(controlled: Any) -> None:
    config = small()
    objective = DiffusionObjective.of(config, controlled)
    looked_at = draw([encoded(1)], [3], objective, config, controlled, [0.5], " of validation")
    trained = draw([encoded(1)], [3], objective, config, controlled)
    assert not torch.equal(looked_at.noise, trained.noise)
    assert float(looked_at.sigma) == float(objective.sigmas[500]), "the level is the one that is asked for"


def test_levels_are_spread_over_the_whole_table(controlled: Any) -> None:
    config = small()
    objective = DiffusionObjective.of(config, controlled)
    sample = encoded(1)
    levels = torch.cat([draw([sample], [n], objective, config, controlled).sigma for n in range(300)])
    steps = torch.searchsorted(objective.sigmas, levels)
    counts = torch.histc(steps.float(), bins=5, min=0, max=1000)
    assert float(counts.min()) > 35 and float(counts.max()) < 85, "60 of 300 in each fifth, give or take"


def test_the_loss_is_the_mean_squared_error_of_the_noise(controlled: Any) -> None:
    batch = drawn_batch(controlled, [encoded(1), encoded(2)], [0, 1])
    sigma = batch.sigma.view(-1, 1, 1, 1)
    with torch.no_grad():
        out = controlled(batch.latent + sigma * batch.noise, batch.sigma, batch.conditions, batch.hint, 1.0)
    expected = (out.double() - batch.noise.double()).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss_of(controlled, batch).double(), expected, rtol=ROUNDING, atol=0)


def test_a_region_counts_more_and_the_rest_no_less(controlled: Any) -> None:
    """mean of (1 + weight * mask) * error, the mask averaged over each latent cell; without a mask nothing changes."""
    weight = 3.2
    plain = drawn_batch(controlled, [encoded(1), encoded(2)], [0, 1])
    samples = [encoded(1, left_half()), encoded(2)]
    masked = drawn_batch(controlled, samples, [0, 1], mask_weight=weight)
    assert masked.region is not None and masked.region.shape == (2, 1, CELLS, CELLS)
    sigma = plain.sigma.view(-1, 1, 1, 1)
    with torch.no_grad():
        out = controlled(plain.latent + sigma * plain.noise, plain.sigma, plain.conditions, plain.hint, 1.0)
    error = (out.double() - plain.noise.double()).square()
    factor = torch.ones(2, 1, CELLS, CELLS, dtype=torch.float64)
    factor[0, :, :, : CELLS // 2] += weight
    found = loss_of(controlled, masked, mask_weight=weight).double()
    torch.testing.assert_close(found, (error * factor).mean(dim=(1, 2, 3)), rtol=ROUNDING, atol=0)
    torch.testing.assert_close(found[1:].float(), loss_of(controlled, plain)[1:], rtol=ROUNDING, atol=0)
    switched_off = drawn_batch(controlled, samples, [0, 1])
    assert switched_off.region is None and torch.equal(loss_of(controlled, switched_off), loss_of(controlled, plain))


def test_a_cell_counts_as_much_as_of_it_lies_in_the_region(controlled: Any) -> None:
    mask = torch.zeros(1, SIDE, SIDE)
    mask[..., :4, :8] = 1  # the upper half of the first cell
    batch = drawn_batch(controlled, [encoded(1, mask)], [0], mask_weight=2.0)
    expected = torch.ones(1, 1, CELLS, CELLS)
    expected[..., 0, 0] = 2.0
    assert torch.equal(batch.region, expected)


def test_min_snr_weighs_samples_by_their_level(controlled: Any) -> None:
    batch = drawn_batch(controlled, [encoded(1), encoded(2)], [0, 1])
    batch = replace(batch, sigma=torch.tensor([0.1, 2.0]))
    plain, weighed = loss_of(controlled, batch), loss_of(controlled, batch, min_snr_gamma=5.0)
    torch.testing.assert_close(weighed / plain, torch.tensor([5 * 0.1**2, 1.0]), rtol=1e-5, atol=0)


def test_the_base_decides_what_is_learned_unless_told(controlled: Any) -> None:
    from comfyui_controlnext.controlnext_training.base_model.trained_families import FAMILIES

    assert controlled.predicts == "epsilon"
    objective = DiffusionObjective.of(small(), controlled)
    assert objective.parameterisation is OBJECTIVES["epsilon"] and objective.timesteps == "uniform"
    other = DiffusionObjective.of(small(objective="v", timesteps="logit_normal"), controlled)
    assert other.parameterisation is OBJECTIVES["v"] and other.timesteps == "logit_normal"
    video = SimpleNamespace(base=controlled.base, predicts="edm", family=FAMILIES[Family.SVD])
    assert DiffusionObjective.of(small(), video).timesteps == "svd_cosine"  # type: ignore[arg-type]
    sigmas = controlled.base.model_sampling.sigmas
    assert torch.equal(objective.sigma([0.0, 0.9999]), sigmas[[0, -1]].float())


def test_every_kind_of_model_has_an_objective() -> None:
    from comfyui_controlnext.controlnext_training.base_model.trained_families import PREDICTS

    assert set(PREDICTS.values()) == set(OBJECTIVES)


def test_stratified_noise_levels_take_one_of_each_part_in_a_forward_pass() -> None:
    from comfyui_controlnext.controlnext_training.step import _stratum

    config = small(batch_size=4, stratified_timesteps=True)
    passes = [[_stratum(config, 4 * number + place) for place in range(4)] for number in range(20)]
    assert all(sorted(one) == [0, 1, 2, 3] for one in passes)
    assert len(set(map(tuple, passes))) > 5, "in another order each time"
