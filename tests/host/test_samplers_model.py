"""Model identity during sampling: hosts with dynamic VRAM replace the MODEL where a conditioning has hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures import video_fixtures as video
from comfyui_controlnext.tests.fixtures.sampling_fixtures import (
    REASSOCIATED,
    Studio,
    forbid_batching,
    picture,
    relative,
)
from comfyui_controlnext.tools import tiny_models
from torch import Tensor

pytestmark = pytest.mark.comfy

Wiring = tuple[bool, bool]
HALVES: dict[str, Wiring] = {"positive": (True, False), "negative": (False, True)}


def chain_of(control: Any) -> Iterator[Any]:
    while control is not None:
        yield control
        control = control.previous_controlnet


def brings_hooks(conds: Any) -> bool:
    """True: the conditionings have hooks, tested as in later hosts (`cond_has_hooks`). False: they have none."""
    options = [entry[1] for entry in conds]
    controls = [option["control"] for option in options if "control" in option]
    return any("hooks" in option for option in options) or any(control.get_extra_hooks() for control in controls)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Patchers of all sampling runs, each set up as under dynamic VRAM: hooks would have replaced it."""
    import comfy.samplers

    patchers: list[Any] = []
    guider = comfy.samplers.CFGGuider
    set_conds, sample = guider.inner_set_conds, guider.outer_sample

    def set_conds_as_if_dynamic(self: Any, conds: Any) -> None:
        swapped = any(brings_hooks(conds[name]) for name in conds)
        assert not swapped, "the host would sample from a second model"
        given = self.model_patcher
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(given, "is_dynamic", lambda: True, raising=False)
            set_conds(self, conds)
        assert self.model_patcher is given

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        patchers.append(self.model_patcher)
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(guider, "inner_set_conds", set_conds_as_if_dynamic)
    monkeypatch.setattr(guider, "outer_sample", noted)
    return patchers


def load(studio: Studio, kind: str) -> Any:
    """CONTROL_NET of a kind."""
    if kind == "controlnext":
        return studio.load().control
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

    path = studio.files / "xs.safetensors"
    return load_controlnet_xs(path if path.exists() else tiny_models.make_controlnet_xs(path)).control


@pytest.mark.parametrize("kind", ["controlnext", "xs"])
@pytest.mark.parametrize("apply_to", HALVES)
def test_a_half_through_the_stock_node_is_sampled_from_the_model_given(
    studio: Studio, used: list[Any], kind: str, apply_to: str
) -> None:
    control = load(studio, kind)
    wired = studio.stock(control, picture())
    bare = studio.positive, studio.negative
    expected = studio.sample(None, *(c if on else b for c, b, on in zip(wired, bare, HALVES[apply_to], strict=True)))
    found = studio.sample(None, *studio.stock(studio.options(control, apply_to), picture()))
    assert relative(found, expected) < REASSOCIATED
    assert used == [studio.model, studio.model]


@pytest.mark.parametrize("kind", ["controlnext", "xs"])
@pytest.mark.parametrize("apply_to", HALVES)
def test_halves_are_told_apart_one_after_another(
    studio: Studio, used: list[Any], monkeypatch: pytest.MonkeyPatch, kind: str, apply_to: str
) -> None:
    forbid_batching(monkeypatch)
    control = load(studio, kind)
    wired = studio.stock(control, picture())
    bare = studio.positive, studio.negative
    rows: list[int] = []
    handle = studio.model.model.diffusion_model.register_forward_hook(lambda _, inputs, out: rows.append(out.shape[0]))
    expected = studio.sample(None, *(c if on else b for c, b, on in zip(wired, bare, HALVES[apply_to], strict=True)))
    half = studio.options(control, apply_to)
    found = studio.sample(None, *studio.stock(half, picture()))
    handle.remove()
    assert rows == [1] * 8
    assert torch.equal(found, expected)
    assert torch.equal(found, studio.sample(studio.ours(studio.model, half, picture())))
    assert len(used) == 3 and used[:2] == [studio.model, studio.model]


def test_a_chain_of_controls_shows_the_hooks_of_others_alone(studio: Studio) -> None:
    import comfy.controlnet
    import comfy.hooks

    half = studio.options(studio.load().control, "positive")
    once = studio.stock(half, picture())
    twice = studio.apply_to(*once, half, picture(1))
    for conds in (*once, *twice):
        assert not brings_hooks(conds)
        assert all(control.extra_hooks is not None for control in chain_of(conds[0][1]["control"]))
    others = comfy.controlnet.ControlBase()
    others.extra_hooks = comfy.hooks.HookGroup()
    last = twice[0][0][1]["control"].previous_controlnet
    last.set_previous_controlnet(others)
    assert brings_hooks(twice[0])
    assert twice[0][0][1]["control"].get_extra_hooks() == [others.extra_hooks]


def test_the_question_of_the_host_itself(studio: Studio) -> None:
    import comfy.sampler_helpers

    asked = getattr(comfy.sampler_helpers, "cond_has_hooks", None)
    if asked is None:
        pytest.skip("this ComfyUI asks no conditioning for hooks (cond_has_hooks came with dynamic VRAM)")
    conds = studio.stock(studio.options(studio.load().control, "positive"), picture())
    assert not asked(conds[0]) and not asked(conds[1])


@pytest.fixture
def one_run() -> Iterator[None]:
    yield from video.one_run()


IN_TWO_BATCHES = 1e-4
"""Relative difference of a video with its halves in one forward or in two: 4e-5 through this random network."""


@pytest.mark.usefixtures("one_run")
def test_svd_is_sampled_from_the_model_given(used: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of the guidance with different gains, batched or not."""
    from comfyui_controlnext.nodes.apply import ControlNeXtOptions

    model, name, hints = video.toy_patcher(), "svd_v2", video.hints(3)
    both_halves = ControlNeXtOptions.execute(video.control(name), "both", None, "")[0]

    def film(control: Any) -> Tensor:
        return video.sample(model, 3, conds=video.stock_apply(video.conditioning(), name, hints, control=control))

    def through_our_door() -> Tensor:
        return video.sample(video.controlled(model, name, hints), 3)

    batched, the_same_gain = film(video.control(name)), film(both_halves)
    assert torch.equal(batched, through_our_door())
    forbid_batching(monkeypatch)
    apart = film(video.control(name))
    assert torch.equal(apart, through_our_door())
    assert relative(apart, batched) < IN_TWO_BATCHES
    assert relative(the_same_gain, batched) > 100 * IN_TWO_BATCHES
    assert [used[n] is model for n in range(5)] == [True, True, False, True, False]
