"""Controls of clips together with other features of Wan: the two experts of Wan 2.2, and VACE."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.next_control import ControlNeXtControl
from comfyui_controlnext.tests.fixtures.narrow_training import AveragingClips
from comfyui_controlnext.tests.fixtures.sampling_fixtures import relative
from comfyui_controlnext.tests.fixtures.transformer_fixtures import NARROW, filled, narrow_model
from comfyui_controlnext.tests.fixtures.transformer_stage import CELLS, TransformerStage
from comfyui_controlnext.tests.host.test_clips_on_host import FRAMES, LENGTH, video
from torch import Tensor

pytestmark = pytest.mark.comfy

STEPS, CHANGE = 4, 2
"""Steps of a graph with two experts, and of the first of them."""


def other_expert() -> Any:
    """MODEL of the narrow Wan's shape with other weights."""
    from comfy.model_patcher import ModelPatcher

    model: Any = narrow_model.__wrapped__("wan")  # one of its own
    with torch.no_grad():
        for name, parameter in model.diffusion_model.named_parameters():
            parameter.copy_(filled(name, parameter.shape, seed=1))
    return ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def with_model(at: TransformerStage, model: Any) -> TransformerStage:
    other = copy.copy(at)
    other.model = model
    return other


def experts(at: TransformerStage, high: tuple[Any, Any], low: tuple[Any, Any]) -> Tensor:
    """Two KSamplerAdvanced nodes, the second on the remaining noise of the first. high, low: a
    MODEL and two prompts.
    """
    import nodes as host_nodes

    latent = {"samples": torch.zeros(1, 16, LENGTH, CELLS, CELLS)}
    for (model, (positive, negative)), noise, start, end, rest in (
        (high, "enable", 0, CHANGE, "enable"),
        (low, "disable", CHANGE, 10000, "disable"),
    ):
        (latent,) = host_nodes.KSamplerAdvanced().sample(
            model, noise, 1, STEPS, 3.0, "euler", "simple", positive, negative, latent, start, end, rest
        )
    return latent["samples"]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Encoder's identity and sigma of each addition of a control."""
    seen: list[tuple[str, float]] = []
    term: Callable[..., Any] = ControlNeXtControl.term

    def spy(self: Any, h: Tensor, options: Any, *, x: Tensor, sigma: float, strength: float) -> Any:
        seen.append((self.net.uid, sigma))
        return term(self, h, options, x=x, sigma=sigma, strength=strength)

    monkeypatch.setattr(ControlNeXtControl, "term", spy)
    return seen


def test_each_of_two_experts_hears_its_own_control(stage: Any, heard: list[tuple[str, float]]) -> None:
    """Experts of Wan 2.2 14B: a MODEL for high noise and one for low, each with a control that acts
    only in its steps.
    """
    high = stage("wan")
    low = with_model(high, other_expert())
    first, second = high.load().control, low.load(seed=12).control
    bare = [(at.model, (at.positive, at.negative)) for at in (high, low)]
    stock = [(at.model, at.stock(c, video())) for at, c in ((high, first), (low, second))]
    ours = [
        (at.ours(c, video()), prompts)
        for (at, c), (_, prompts) in zip(((high, first), (low, second)), bare, strict=True)
    ]
    plain, both = experts(high, *bare), experts(high, *stock)
    by_uid = {control.net.uid: {sigma for uid, sigma in heard if uid == control.net.uid} for control in (first, second)}
    noisy, clean = by_uid[first.net.uid], by_uid[second.net.uid]
    assert len(noisy) == CHANGE and len(clean) == STEPS - CHANGE and min(noisy) > max(clean)
    assert torch.equal(both, experts(high, *ours))
    alone = [experts(high, stock[0], bare[1]), experts(high, bare[0], stock[1])]
    assert all(relative(one, plain) > 0.003 and relative(one, both) > 0.003 for one in alone)
    same = experts(high, stock[0], (low.model, low.stock(first, video())))
    assert relative(same, both) > 0.003, "one file may serve both experts"
    assert torch.equal(experts(high, *bare), plain)


def test_beside_the_hosts_vace(stage: Any) -> None:
    """WanVaceToVideo makes the prompts and the latent; the control stands on the same MODEL."""
    from comfy.model_patcher import ModelPatcher
    from comfy_extras.nodes_wan import WanVaceToVideo

    model: Any = narrow_model.__wrapped__("wan_vace")  # one of its own
    patcher = ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    at = with_model(stage("wan"), patcher)
    vae, side = AveragingClips(model, NARROW["wan"].channels, 8, 0), 8 * CELLS
    made = WanVaceToVideo.execute(
        at.positive, at.negative, vae, side, side, FRAMES, 1, 1.0, control_video=video(seed=3)
    )
    positive, negative, latent = made[0], made[1], made[2]
    assert latent["samples"].shape == (1, 16, LENGTH, CELLS, CELLS)
    vace = with_model(at, patcher)
    vace.positive, vace.negative = positive, negative
    control = at.load().control
    plain, bare = (one.sample(conds=(one.positive, one.negative), length=LENGTH) for one in (vace, at))
    together = vace.sample(conds=vace.stock(control, video()), length=LENGTH)
    assert torch.equal(together, vace.sample(vace.ours(control, video()), length=LENGTH))
    without_vace = at.sample(conds=at.stock(control, video()), length=LENGTH)
    assert relative(plain, bare) > 0.003, "VACE is heard"
    assert all(relative(together, one) > 0.003 for one in (plain, without_vace))
    assert torch.equal(vace.sample(conds=vace.stock(control, video(), 0.0, 0.0, 1.0), length=LENGTH), plain)
