"""Keyframes of Advanced-ControlNet in ControlNeXt Options, through both doors, for both kinds of control."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.core.test_keyframes import latents, timesteps
from comfyui_controlnext.tests.fixtures.sampling_fixtures import CELLS, REASSOCIATED, Studio, picture, relative
from comfyui_controlnext.tests.fixtures.transformer_stage import TransformerStage
from comfyui_controlnext.tools.tiny_models import make_controlnet_xs
from torch import Tensor

pytestmark = pytest.mark.comfy
STEPS = 4
LEFT = torch.zeros(1, 8 * CELLS, 8 * CELLS)
LEFT[..., : 4 * CELLS] = 1


def options(control: Any, **inputs: Any) -> Any:
    from comfyui_controlnext.nodes.apply import ControlNeXtOptions

    return ControlNeXtOptions.execute(control, "auto", **inputs)[0]


def load(studio: Studio, kind: str) -> Any:
    """ControlNeXt, or a ControlNet-XS without a time embedding of its own, which is one for all images."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

    if kind == "gen2":
        return studio.load().control
    path = studio.files / "keyframes xs.safetensors"
    return load_controlnet_xs(path if path.exists() else make_controlnet_xs(path)).control


def runs(studio: Studio, control: Any, strength: float = 1.0, batch: int = 1, **settings: Any) -> Tensor:
    """Latents through both doors, which are the same."""
    stock = studio.sample(None, *studio.stock(control, picture(), strength), steps=STEPS, batch=batch, **settings)
    ours = studio.sample(studio.ours(studio.model, control, picture(), strength), steps=STEPS, batch=batch, **settings)
    assert torch.equal(stock, ours)
    return stock


def percents(studio: Studio) -> list[float]:
    """Percents of the steps, a little before each."""
    import comfy.samplers
    from comfyui_controlnext.controlnext_core.schedule import percent_of

    sampling = studio.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)[:-1]
    return [max(percent_of(float(sigma), sampling.percent_to_sigma) - 1e-4, 0.0) for sigma in sigmas]


@pytest.mark.parametrize("kind", ["gen2", "xs"])
def test_strengths_are_those_of_a_schedule_with_a_value_for_each_step(studio: Studio, kind: str) -> None:
    control, strengths = load(studio, kind), (1.0, 0.0, 0.25, 0.5)
    entries = zip(percents(studio), strengths, strict=True)
    group = timesteps(*({"start_percent": start, "strength": strength} for start, strength in entries))
    found = runs(studio, options(control, timestep_keyframes=group), 0.9)
    pairs = [(p + 1e-4, s) for p, s in zip(percents(studio), strengths, strict=True)]
    schedule = ", ".join(f"{p:.9f}:{s}" for p, s in pairs)
    expected = runs(studio, options(control, schedule=schedule), 0.9)
    assert relative(found, expected) < 1e-3, "the schedule's percents are rounded"
    assert relative(found, runs(studio, control, 0.9)) > 0.01


def test_a_keyframe_that_keeps_two_steps_holds_the_next_one_back(studio: Studio) -> None:
    control, starts = load(studio, "gen2"), percents(studio)
    first, off = {"start_percent": starts[1]}, {"start_percent": starts[2], "strength": 0.0}
    kept = options(control, timestep_keyframes=timesteps({"start_percent": 0.0}, first | {"guarantee_steps": 2}, off))
    later = options(control, timestep_keyframes=timesteps({"start_percent": 0.0}, off | {"start_percent": starts[3]}))
    assert torch.equal(runs(studio, kept), runs(studio, later))
    at_once = options(control, timestep_keyframes=timesteps({"start_percent": 0.0}, first, off))
    assert relative(runs(studio, at_once), runs(studio, later)) > 1e-3


@pytest.mark.parametrize("kind", ["gen2", "xs"])
def test_a_mask_acts_from_its_keyframe_on(studio: Studio, kind: str) -> None:
    control, starts = load(studio, kind), percents(studio)
    whole = timesteps({"start_percent": 0.0, "mask_hint_orig": LEFT})
    masked = runs(studio, options(control, mask=LEFT))
    assert torch.equal(runs(studio, options(control, timestep_keyframes=whole)), masked)
    late = options(
        control,
        timestep_keyframes=timesteps({"start_percent": 0.0}, {"start_percent": starts[2], "mask_hint_orig": LEFT}),
    )
    found = runs(studio, late)
    for other in (masked, runs(studio, control)):
        assert relative(found, other) > 1e-3


@pytest.mark.parametrize("kind", ["gen2", "xs"])
def test_each_image_of_a_batch_has_its_factor(studio: Studio, kind: str) -> None:
    control = load(studio, kind)
    found = runs(studio, options(control, latent_keyframes=latents(i0=0.5, i_1=1.0)), batch=3)
    weaker, without, full = (
        runs(studio, control, strength, first=first) for first, strength in enumerate((0.5, 0.0, 1.0))
    )
    for image, alone in zip(found, (weaker, without, full), strict=True):
        assert relative(image[None], alone) < REASSOCIATED
    assert relative(found[:1], found[2:]) > 0.01


def test_latent_frames_of_a_clip_have_their_factors(tmp_path: Any) -> None:
    """Equal to a mask for each frame of the video."""
    import comfy.model_management

    at = TransformerStage("wan", tmp_path)
    loaded = at.load()
    hints = picture(count=9, side=8 * CELLS)
    factors = torch.tensor([0.25, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]).view(-1, 1, 1).expand(-1, 4, 4)
    with torch.inference_mode():
        by_keyframes = options(loaded.control, latent_keyframes=latents(i0=0.25, i2=1.0))
        by_mask = options(loaded.control, mask=factors.contiguous())
        found, expected, full = (
            at.sample(at.ours(control, hints), length=3) for control in (by_keyframes, by_mask, loaded.control)
        )
        comfy.model_management.unload_all_models()  # before its patchers go: the network is shared
    assert torch.equal(found, expected)
    assert relative(found, full) > 1e-3


def test_frames_of_a_window_have_the_factors_of_the_whole_video(studio: Studio) -> None:
    control = options(load(studio, "gen2"), latent_keyframes=latents(i1=0.5, i_1=2.0))
    control.pre_run(studio.model.model, studio.model.model.model_sampling.percent_to_sigma)
    h = torch.empty(3, 4, 2, 2)
    window = {"ad_params": {"sub_idxs": [1, 2, 7], "full_length": 8}}
    found = control.mask(3, h, window, 1.0)
    control.cleanup()
    assert found[:, 0, 0, 0].tolist() == [0.5, 0.0, 2.0] and found.shape == (3, 1, 2, 2)
