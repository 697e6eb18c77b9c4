"""Doors of a control, the stock Apply node and ControlNeXtApply: one engine, and no traces left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.sampling_fixtures import (
    CELLS,
    REASSOCIATED,
    SEED,
    Studio,
    demo_pair,
    picture,
    relative,
)
from torch import Tensor

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strength": 0.35},
        {"strength": 2.0, "start": 0.3},
        {"end": 0.4},
    ],
    ids=str,
)
def test_both_doors_give_equal_latents(studio: Studio, plain: Tensor, settings: dict[str, float]) -> None:
    through_stock, through_ours = studio.through_both(studio.load(), picture(), **settings)
    assert torch.equal(through_stock, through_ours)
    assert relative(through_stock, plain) > 100 * REASSOCIATED


def test_the_old_apply_node_is_the_stock_door_on_one_conditioning(studio: Studio) -> None:
    import nodes as host_nodes

    loaded = studio.load()
    (positive,) = host_nodes.ControlNetApply().apply_controlnet(studio.positive, loaded.control, picture(), 0.8)
    both = studio.sample(loaded.model, positive)  # the old node controls the negative as well
    assert torch.equal(both, studio.sample(studio.ours(loaded.model, loaded.control, picture(), 0.8)))


def test_a_control_without_unet_weights_leaves_the_model_its_weights(studio: Studio, plain: Tensor) -> None:
    assert torch.equal(studio.sample(studio.load().model), plain)


@pytest.mark.parametrize("weights", ["none", "auto"])
def test_applying_leaves_model_and_conditioning_untouched(studio: Studio, plain: Tensor, weights: str) -> None:
    loaded = studio.load() if weights == "none" else demo_pair(studio)
    before = [fingerprint(studio.model), fingerprint(loaded.model), repr(studio.positive), repr(studio.negative)]
    conds = studio.stock(loaded.control, picture())
    controlled = studio.ours(loaded.model, loaded.control, picture())
    studio.sample(loaded.model, *conds)
    studio.sample(controlled)
    after = [fingerprint(studio.model), fingerprint(loaded.model), repr(studio.positive), repr(studio.negative)]
    assert before == after
    assert "control" not in studio.positive[0][1] and "control" in conds[0][0][1]
    assert torch.equal(studio.sample(), plain)


def fingerprint(model: Any) -> str:
    """Fingerprint of all that a node may have added to a MODEL."""
    parts = (
        model.model_options,
        {name: len(patches) for name, patches in model.patches.items()},
        model.patches_uuid,
        model.wrappers,
        model.callbacks,
        model.attachments,
        model.additional_models,
        model.object_patches,
    )
    return repr(parts)


def stock_door(studio: Studio, loaded: Any, *settings: float) -> Tensor:
    return studio.sample(loaded.model, *studio.stock(loaded.control, picture(), *settings))


def our_door(studio: Studio, loaded: Any, *settings: float) -> Tensor:
    return studio.sample(studio.ours(loaded.model, loaded.control, picture(), *settings))


DOORS = pytest.mark.parametrize("door", [stock_door, our_door])
Door = Callable[..., Tensor]


@DOORS
@pytest.mark.parametrize("settings", [(0.0, 0.0, 1.0), (1.0, 1.0, 1.0), (1.0, 0.0, 0.0)], ids=str)
def test_strength_zero_and_an_empty_range_are_bitwise_the_plain_model(
    studio: Studio, plain: Tensor, door: Door, settings: tuple[float, ...]
) -> None:
    assert torch.equal(door(studio, studio.load(), *settings), plain)


def test_a_range_controls_exactly_the_steps_inside_it(studio: Studio) -> None:
    """Against a run put together from plain and controlled pieces by the host's advanced sampler node."""
    import comfy.samplers

    import nodes as host_nodes

    steps, start, end = 4, 0.2, 0.6
    loaded = studio.load()
    sampling = studio.model.get_model_object("model_sampling")
    first, last = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)[:-1]
    inside = [i for i, sigma in enumerate(sigmas.tolist()) if last <= sigma <= first]
    assert 0 < inside[0] and inside[-1] < steps - 1

    def piece(model: Any, latent: Any, begin: int, stop: int) -> Any:
        sampler = ("enable" if begin == 0 else "disable", SEED, steps, 4.0, "euler", "normal")
        rest = (latent, begin, stop, "enable" if stop < steps else "disable")
        return host_nodes.KSamplerAdvanced().sample(model, *sampler, studio.positive, studio.negative, *rest)[0]

    everywhere = studio.ours(loaded.model, loaded.control, picture())
    latent = piece(loaded.model, {"samples": torch.zeros(1, 4, CELLS, CELLS)}, 0, inside[0])
    latent = piece(everywhere, latent, inside[0], inside[-1] + 1)
    expected = piece(loaded.model, latent, inside[-1] + 1, steps)["samples"]

    conds = studio.stock(loaded.control, picture(), 1.0, start, end)
    assert relative(studio.sample(loaded.model, *conds, steps=steps), expected) < REASSOCIATED
    ranged = studio.ours(loaded.model, loaded.control, picture(), 1.0, start, end)
    assert relative(studio.sample(ranged, steps=steps), expected) < REASSOCIATED
    assert relative(studio.sample(everywhere, steps=steps), expected) > 0.01


@DOORS
def test_after_a_run_the_control_holds_nothing_of_it(studio: Studio, door: Door) -> None:
    loaded = studio.load()
    if door is stock_door:
        positive, negative = studio.stock(loaded.control, picture())
        applied = positive[0][1]["control"]
        studio.sample(loaded.model, positive, negative)
    else:
        model = studio.ours(loaded.model, loaded.control, picture())
        applied = model.get_wrappers("outer_sample", "controlnext")[0].__self__.control
        studio.sample(model)
    assert applied.run is None and applied.cond_hint is None and applied.timestep_range is None


@DOORS
def test_a_run_that_is_interrupted_does_not_hurt_the_next(studio: Studio, door: Door) -> None:
    import comfy.model_management as management

    loaded = studio.load()
    expected = door(studio, loaded)
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            management.interrupt_current_processing()

    handle = studio.model.model.diffusion_model.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(management.InterruptProcessingException):
            door(studio, loaded)
    finally:
        handle.remove()
        management.interrupt_current_processing(False)
    assert torch.equal(door(studio, loaded), expected)


def test_control_is_refused_outside_a_sampling_run(studio: Studio) -> None:
    control = studio.load().control.copy().set_cond_hint(picture().movedim(-1, 1))
    latent, sigma = torch.zeros(1, 4, CELLS, CELLS), torch.ones(1)
    with pytest.raises(RuntimeError, match=r"gen2\.safetensors: .*outside a sampling run"):
        control.get_control(latent, sigma, {}, 1, {})


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun"])
def test_other_samplers_take_the_control_through_both_doors(studio: Studio, sampler: str) -> None:
    loaded = studio.load()
    conds = studio.stock(loaded.control, picture())
    through_stock = studio.sample(loaded.model, *conds, sampler=sampler)
    through_ours = studio.sample(studio.ours(loaded.model, loaded.control, picture()), sampler=sampler)
    assert torch.equal(through_stock, through_ours)
    assert relative(through_ours, studio.sample(sampler=sampler)) > 0.01


def test_the_sigma_of_a_forward_is_of_its_own_timesteps() -> None:
    """A wrapper between the two doors may change the timesteps under the same options."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.run_state import sigma_of

    options: dict[str, Any] = {}
    assert sigma_of(torch.full((2,), 3.5), options) == 3.5
    assert sigma_of(torch.full((2,), 1.25), options) == 1.25


def test_a_control_given_another_hint_knows_it_as_another(studio: Studio) -> None:
    """The Apply nodes copy a control first; code of others may not."""
    control = studio.load().control.copy()
    identities = {control.set_cond_hint(picture(seed).movedim(-1, 1)).hint_id for seed in (1, 2)}
    assert len(identities) == 2
