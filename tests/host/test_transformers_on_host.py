"""Controls of transformers in the host's sampler: both doors, their options, and no traces left."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.controlnext_core.specs import SPECS
from comfyui_controlnext.tests.fixtures.sampling_fixtures import picture, relative
from comfyui_controlnext.tests.fixtures.transformer_fixtures import narrow_model
from comfyui_controlnext.tests.fixtures.transformer_stage import CELLS, each, in_turn
from comfyui_controlnext.tests.references import reference_controlnext as released
from comfyui_controlnext.tests.references import reference_transformers as reference

pytestmark = pytest.mark.comfy


@in_turn("settings", [(1.0, 0.0, 1.0), (0.6, 0.0, 0.5)])
def test_both_doors_give_equal_latents(family: str, settings: tuple[float, ...], stage: Any) -> None:
    at = stage(family)
    control = at.load().control
    through_stock = at.sample(conds=at.stock(control, picture(), *settings))
    assert torch.equal(through_stock, at.sample(at.ours(control, picture(), *settings)))
    assert relative(through_stock, at.sample()) > 0.01


@each
def test_no_control_is_the_plain_model_bit_for_bit(family: str, stage: Any) -> None:
    at = stage(family)
    control, plain = at.load().control, at.sample()
    for settings in ((0.0, 0.0, 1.0), (1.0, 1.0, 1.0)):  # no strength; no step lies so late
        assert torch.equal(at.sample(conds=at.stock(control, picture(), *settings)), plain)
        assert torch.equal(at.sample(at.ours(control, picture(), *settings)), plain)
    zero = at.ours(control, picture(), mask=torch.zeros(1, 16, 16))
    assert torch.equal(at.sample(zero), plain)
    whole = at.sample(at.ours(control, picture()))
    assert torch.equal(at.sample(at.ours(control, picture(), mask=torch.ones(1, 16, 16))), whole)
    assert torch.equal(at.sample(), plain)


@each
def test_each_picture_of_a_batch_gets_its_own_hint(family: str, stage: Any) -> None:
    at = stage(family)
    control, hints = at.load().control, picture(count=2)
    together = at.sample(at.ours(control, hints), batch=2)
    for i in range(2):
        alone = at.sample(at.ours(control, hints[i : i + 1]), first=i)
        assert relative(together[i : i + 1], alone) < 1e-4


@each
def test_hints_of_any_size_and_with_alpha(family: str, stage: Any) -> None:
    at = stage(family)
    control = at.load().control
    expected = at.sample(at.ours(control, picture()))
    alpha = torch.cat([picture(), torch.zeros(1, 8 * CELLS, 8 * CELLS, 1)], dim=-1)
    assert torch.equal(at.sample(at.ours(control, alpha)), expected)
    assert at.sample(at.ours(control, picture(side=101))).isfinite().all()


@each
def test_cfg_one_and_one_prompt_alone(family: str, stage: Any) -> None:
    at = stage(family)
    control = at.load().control
    distilled = at.sample(at.ours(control, picture()), cfg=1.0)
    assert torch.equal(at.sample(conds=at.stock(control, picture()), cfg=1.0), distilled)
    positive, _ = at.stock(control, picture())
    one = at.sample(conds=(positive, at.negative))
    assert relative(one, at.sample(at.ours(control, picture()))) > 0.001


@each
def test_others_in_the_models_slot_still_run(family: str, stage: Any) -> None:
    at = stage(family)
    control, calls = at.load().control, []

    def replacement(args: Any, extra: Any) -> Any:
        calls.append("slot")
        return extra["original_block"](args)

    def after_block(args: Any) -> Any:
        calls.append("patch")
        return args

    other = at.model.clone()
    other.set_model_patch_replace(replacement, "dit", "double_block", 0)
    other.set_model_patch(after_block, "double_block")
    beside = at.sample(other)
    alone = list(calls)
    expected = at.sample(at.ours(control, picture()))
    calls.clear()
    assert torch.equal(at.sample(at.ours(control, picture(), model=other)), expected)
    assert calls == alone
    assert torch.equal(beside, at.sample())


@each
def test_an_error_inside_leaves_nothing_behind(family: str, stage: Any) -> None:
    at = stage(family)
    control, plain = at.load().control, at.sample()

    def fails(args: Any) -> Any:
        raise RuntimeError("as a cancelled run")

    network = narrow_model(family).diffusion_model
    controlled, block = at.ours(control, picture()), reference.FAMILIES[family].block(network)
    handle = block.register_forward_hook(lambda *_: fails(None))
    with pytest.raises(RuntimeError, match="as a cancelled run"):
        at.sample(controlled)
    handle.remove()
    assert not block._forward_hooks
    assert torch.equal(at.sample(), plain)
    assert relative(at.sample(controlled), plain) > 0.01


@each
def test_a_control_that_never_reached_its_block_says_so(
    family: str, stage: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = stage(family)
    control = at.load().control
    network = narrow_model(family).diffusion_model
    monkeypatch.setattr(type(network), "forward", lambda self, x, *args, **kwargs: torch.zeros_like(x))
    with caplog.at_level(logging.WARNING):
        at.sample(at.ours(control, picture()))
    assert "never reached the block where it is added" in caplog.text


@each
def test_the_encoder_runs_once_a_step_and_never_in_a_second_run(family: str, stage: Any) -> None:
    at = stage(family)
    loaded = at.load()
    net, calls = loaded.control.net.patcher.model, []
    narrow = net.narrow
    net.narrow = lambda begun, timestep: (calls.append(float(timestep)), narrow(begun, timestep))[1]
    try:
        first = at.sample(at.ours(loaded.control, picture()))
        times = list(calls)
        second = at.sample(at.ours(loaded.control, picture()))
    finally:
        del net.narrow
    assert len(times) == 2 and times == calls
    sampling = at.model.get_model_object("model_sampling")
    assert times[0] == pytest.approx(1000 * float(sampling.sigma_max), rel=1e-3)
    assert torch.equal(first, second)


@each
def test_a_wrong_family_is_named_at_once(family: str, stage: Any) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_controlnext

    at = stage(family)
    for spec in SPECS.values():
        if spec.on_transformer and spec.name != family:
            other = stage(spec.name)
            with pytest.raises(ValueError, match=f"is a control for {spec.family.value} .* but the connected model is"):
                other.load(model=at.model)
            with pytest.raises(ValueError, match=f"is a {spec.family.value} control .* but the connected model is"):
                at.ours(other.load().control, picture())
    unet = released.random_weights(reference.BUILD)
    path = checkpoint.save(at.folder / "sdxl.safetensors", unet, {"controlnext.spec": "sdxl"})
    with pytest.raises(ValueError, match=f"control for SDXL .* connected model is {SPECS[family].family.value}"):
        load_controlnext(at.model, path)
