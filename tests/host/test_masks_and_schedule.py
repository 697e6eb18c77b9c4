"""Masks of Options and Apply, and strength schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.sampling_fixtures import CELLS, REASSOCIATED, Studio, picture, relative
from torch import Tensor

pytestmark = pytest.mark.comfy

SIDE = 8 * CELLS
LEFT, TOP = torch.zeros(1, SIDE, SIDE), torch.zeros(1, SIDE, SIDE)
LEFT[..., : SIDE // 2] = 1
TOP[:, : SIDE // 2] = 1


def through_options(studio: Studio, loaded: Any, mask: Tensor) -> Tensor:
    control = studio.options(loaded.control, mask=mask)
    return studio.sample(loaded.model, *studio.stock(control, picture()))


def through_apply(studio: Studio, loaded: Any, mask: Tensor) -> Tensor:
    return studio.sample(studio.ours(loaded.model, loaded.control, picture(), mask=mask))


DOORS = pytest.mark.parametrize("door", [through_options, through_apply])


@DOORS
@pytest.mark.parametrize("shape", [(1, SIDE, SIDE), (SIDE, SIDE), (1, 40, 24), (3, 1, 8, 8)], ids=str)
def test_a_mask_of_zeros_is_bitwise_the_plain_model(
    studio: Studio, plain: Tensor, door: Any, shape: tuple[int, ...]
) -> None:
    assert torch.equal(door(studio, studio.load(), torch.zeros(shape)), plain)


@DOORS
def test_a_mask_of_ones_is_bitwise_unmasked(studio: Studio, door: Any) -> None:
    loaded = studio.load()
    unmasked = studio.sample(studio.ours(loaded.model, loaded.control, picture()))
    assert torch.equal(door(studio, loaded, torch.ones(1, 24, 40)), unmasked)


def test_a_part_mask_is_the_same_through_both_doors_and_unlike_all_or_nothing(studio: Studio, plain: Tensor) -> None:
    loaded = studio.load()
    masked = through_options(studio, loaded, LEFT)
    assert torch.equal(masked, through_apply(studio, loaded, LEFT))
    unmasked = studio.sample(studio.ours(loaded.model, loaded.control, picture()))
    for other in (plain, unmasked, through_apply(studio, loaded, TOP)):
        assert relative(masked, other) > 0.01


def test_a_mask_is_averaged_over_the_area_of_a_cell(studio: Studio) -> None:
    """Half of every cell covered is a mask of one half; each cell of the site is 16 pixels wide here."""
    loaded = studio.load()
    stripes = (torch.arange(SIDE) % 2).float().expand(1, SIDE, SIDE)
    found = through_apply(studio, loaded, stripes)
    assert torch.equal(found, through_apply(studio, loaded, torch.full((1, 8, 8), 0.5)))
    weaker = studio.sample(studio.ours(loaded.model, loaded.control, picture(), 0.5))
    assert relative(found, weaker) < REASSOCIATED


def test_a_mask_is_averaged_before_it_goes_to_the_device(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Averaging runs once for all steps, on a device that supports every size: an Apple GPU only pools to divisors of
    the size.
    """
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling import run_state

    pooled: list[str] = []
    pool = run_state.pool_to
    monkeypatch.setattr(run_state, "pool_to", lambda m, size: pooled.append(m.device.type) or pool(m, size))
    loaded = studio.load()
    control = studio.options(loaded.control, mask=LEFT)
    control.pre_run(loaded.model.model, lambda percent: percent)
    h = torch.empty(1, 1, 9, 7, device="meta")
    found = [control.mask(1, h, {}, 1.0) for _ in range(2)]
    control.cleanup()
    assert pooled == ["cpu"] and found[1] is found[0]
    assert found[0].device.type == "meta" and found[0].shape == (1, 1, 9, 7)


def test_masks_of_options_and_apply_multiply(studio: Studio) -> None:
    loaded = studio.load()
    product = through_apply(studio, loaded, LEFT * TOP)
    once = studio.options(loaded.control, mask=LEFT)
    assert torch.equal(studio.sample(studio.ours(loaded.model, once, picture(), mask=TOP)), product)
    twice = studio.options(once, mask=TOP)
    assert torch.equal(studio.sample(loaded.model, *studio.stock(twice, picture())), product)


@DOORS
def test_each_latent_of_a_batch_gets_its_own_mask(studio: Studio, door: Any) -> None:
    loaded = studio.load()
    masks = torch.cat([torch.ones_like(LEFT), torch.zeros_like(LEFT), LEFT])
    control = studio.options(loaded.control, mask=masks)
    if door is through_options:
        found = studio.sample(loaded.model, *studio.stock(control, picture()), batch=3)
    else:
        found = studio.sample(studio.ours(loaded.model, loaded.control, picture(), mask=masks), batch=3)
    unmasked = studio.ours(loaded.model, loaded.control, picture())
    left = studio.ours(loaded.model, loaded.control, picture(), mask=LEFT)
    for i, model in enumerate((unmasked, studio.model, left)):
        assert relative(found[i : i + 1], studio.sample(model, first=i)) < REASSOCIATED


def test_a_mask_of_the_wrong_shape_is_refused(studio: Studio) -> None:
    with pytest.raises(ValueError, match=r"mask: shape \[64\] is not a MASK"):
        studio.options(studio.load().control, mask=torch.ones(SIDE))


def test_options_leave_the_control_that_they_came_from_untouched(studio: Studio) -> None:
    loaded = studio.load()
    before = studio.sample(studio.ours(loaded.model, loaded.control, picture()))
    studio.options(loaded.control, "positive", LEFT, "0:0.3")
    assert torch.equal(studio.sample(studio.ours(loaded.model, loaded.control, picture())), before)


@pytest.mark.parametrize(("schedule", "strength"), [("0.3:0.5", 0.5), ("0:0.25, 1:0.25", 0.25), ("", 1.0)])
def test_a_constant_schedule_multiplies_the_strength(studio: Studio, schedule: str, strength: float) -> None:
    loaded = studio.load()
    control = studio.options(loaded.control, schedule=schedule)
    through_stock, through_ours = studio.through_both(loaded, picture(), control, strength=0.5)
    assert torch.equal(through_stock, through_ours)
    expected = studio.ours(loaded.model, loaded.control, picture(), 0.5 * strength)
    assert torch.equal(through_stock, studio.sample(expected))


def test_a_schedule_of_zeros_is_bitwise_the_plain_model(studio: Studio, plain: Tensor) -> None:
    loaded = studio.load()
    control = studio.options(loaded.control, schedule="0:0, 1:0")
    for latents in studio.through_both(loaded, picture(), control):
        assert torch.equal(latents, plain)


def test_a_schedule_that_falls_to_zero_ends_the_control_there(studio: Studio) -> None:
    loaded = studio.load()
    control = studio.options(loaded.control, schedule="0:1, 0.5:1, 0.501:0")
    found = studio.sample(studio.ours(loaded.model, control, picture()), steps=4)
    ended = studio.ours(loaded.model, loaded.control, picture(), 1.0, 0.0, 0.5)
    assert torch.equal(found, studio.sample(ended, steps=4))


@pytest.mark.parametrize("door", ["stock", "ours"])
def test_strength_is_interpolated_linearly_in_the_hosts_percent(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, door: str
) -> None:
    """Percent is 1 - timestep / 999 on this model, with the timestep interpolated in log sigma."""
    import comfy.samplers
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling import next_forward

    gains: list[float] = []
    fuse = next_forward.fuse

    def recording(h: Tensor, terms: Any) -> Tensor:
        gains.append(terms[0].gains)
        return fuse(h, terms)

    monkeypatch.setattr(next_forward, "fuse", recording)
    loaded = studio.load()
    points = [(0.1, 0.4), (0.4, 1.5), (0.9, 0.2)]
    control = studio.options(loaded.control, schedule=", ".join(f"{p}:{s}" for p, s in points))
    settings = (0.5, 0.05, 1.0)
    if door == "stock":
        studio.sample(loaded.model, *studio.stock(control, picture(), *settings), steps=6)
    else:
        studio.sample(studio.ours(loaded.model, control, picture(), *settings), steps=6)

    sampling = studio.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 6)[:-1]
    log_sigmas = sampling.log_sigmas
    expected = []
    for sigma in sigmas.log().tolist():
        above = int(torch.searchsorted(log_sigmas, sigma).clamp(1, 999))
        low, high = log_sigmas[above - 1 : above + 1].tolist()
        percent = 1 - (above - 1 + (sigma - low) / (high - low)) / 999
        if percent < 0.05:
            continue
        before = max((p for p in points if p[0] <= percent), default=points[0])
        after = min((p for p in points if p[0] > percent), default=points[-1])
        width = after[0] - before[0]
        part = (percent - before[0]) / width if width > 0 else 0.0
        expected.append(0.5 * (before[1] + min(max(part, 0.0), 1.0) * (after[1] - before[1])))
    assert len(expected) == 5 and len({round(e, 3) for e in expected}) == 5
    assert [pair[0] for pair in gains] == pytest.approx(expected, abs=1e-4)
    assert all(pair[0] == pair[1] for pair in gains)


@pytest.mark.parametrize("schedule", ["0:1, 0.5", "0:1; 1:0", "0.5:1, 0.2:0", "2:1", "0:-1", "0:nan", "a:b"])
def test_a_schedule_that_cannot_be_read_fails_the_prompts_validation(studio: Studio, schedule: str) -> None:
    from comfyui_controlnext.nodes.apply import ControlNeXtOptions

    answer = ControlNeXtOptions.validate_inputs(schedule=schedule)
    assert isinstance(answer, str) and answer.startswith("schedule: ")
    assert ControlNeXtOptions.validate_inputs(schedule="0:1, 0.4:1, 0.8:0.2") is True


def test_options_of_controlnet_xs_refuse_a_controlnext(studio: Studio) -> None:
    from comfyui_controlnext.nodes.xs_loader import ControlNetXSOptions

    with pytest.raises(
        ValueError, match=r"^control_net: .*is a ControlNeXt, which has no such parts\. Connect Load Con"
    ):
        ControlNetXSOptions.execute(studio.load().control, 1.0, 1.0, 1.0, -1.0)
