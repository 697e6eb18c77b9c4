"""Options of a transformer's control: regional prompts, masks, schedules, halves, guiders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.sampling_fixtures import REASSOCIATED, picture, relative
from comfyui_controlnext.tests.fixtures.transformer_stage import CELLS, TransformerStage, each, in_turn
from torch import Tensor

pytestmark = pytest.mark.comfy
SIDE = 8 * CELLS
HALVES = ("positive", "negative")
LEFT = torch.zeros(1, SIDE, SIDE)
LEFT[..., : SIDE // 2] = 1


def regional(at: TransformerStage, kind: str, control: Any, seed: int = 4) -> Any:
    """Prompt for the left half of the picture, with or without a control."""
    import nodes as host_nodes

    conds = at.prompt(11, seed)
    if control is not None:
        conds = host_nodes.ControlNetApplyAdvanced().apply_controlnet(conds, [], control, picture(), 1.0, 0.0, 1.0)[0]
    if kind == "area":
        return host_nodes.ConditioningSetArea().append(conds, SIDE // 2, SIDE, 0, 0, 1.0)[0]
    return host_nodes.ConditioningSetMask().append(conds, LEFT, "default", 1.0)[0]


@in_turn("kind", ["area", "mask"])
def test_a_control_on_a_regional_prompt_stays_in_its_region(family: str, kind: str, stage: Any) -> None:
    """Outside the region the picture equals that of the region without control, after one step."""
    at = stage(family)
    control = at.load().control

    def run(control: Any) -> Tensor:
        return at.sample(conds=(at.positive + regional(at, kind, control), at.negative), steps=1)

    with_control, without = run(control), run(None)
    left, right = with_control.chunk(2, dim=-1)
    left_before, right_before = without.chunk(2, dim=-1)
    assert relative(right, right_before) < REASSOCIATED
    assert relative(left, left_before) > 0.01


@each
def test_the_models_door_reaches_a_region_as_the_prompts_does(family: str, stage: Any) -> None:
    """Prompts are all controlled, one of them for an area, whose forward has fewer tokens than the picture."""
    at = stage(family)
    control = at.load().control
    positive, negative = at.stock(control, picture())
    through_stock = at.sample(conds=(positive + regional(at, "area", control), negative))
    bare = at.positive + regional(at, "area", None)
    through_ours = at.sample(at.ours(control, picture()), (bare, at.negative))
    assert torch.equal(through_ours, through_stock)
    assert relative(through_ours, at.sample(conds=(bare, at.negative))) > 0.01


@each
def test_a_part_mask_is_the_same_through_both_doors_and_unlike_all_or_nothing(family: str, stage: Any) -> None:
    at = stage(family)
    control = at.load().control
    masked = at.sample(at.ours(control, picture(), mask=LEFT))
    through_options = at.options(control, mask=LEFT)
    assert torch.equal(at.sample(conds=at.stock(through_options, picture())), masked)
    others = at.sample(), at.sample(at.ours(control, picture())), at.sample(at.ours(control, picture(), mask=1 - LEFT))
    assert all(relative(masked, other) > 0.003 for other in others)


@each
def test_a_schedule_is_strength_by_percent_of_the_families_own_sampling(family: str, stage: Any) -> None:
    at = stage(family)
    control = at.load().control
    level = at.options(control, schedule="0:0.6, 1:0.6")
    assert torch.equal(at.sample(at.ours(level, picture())), at.sample(at.ours(control, picture(), 0.6, 0.0, 1.0)))
    half = at.sample(at.ours(control, picture(), 1.0, 0.0, 0.5), steps=4)
    falling = at.options(control, schedule="0:1, 0.5:1, 0.501:0, 1:0")
    assert torch.equal(at.sample(at.ours(falling, picture()), steps=4), half)
    assert torch.equal(at.sample(conds=at.stock(falling, picture()), steps=4), half)
    for other in (at.sample(steps=4), at.sample(at.ours(control, picture()), steps=3)):
        assert relative(half, other) > 0.003


@in_turn("half", HALVES)
def test_a_half_is_what_wiring_the_stock_node_to_that_half_gives(family: str, half: str, stage: Any) -> None:
    at = stage(family)
    control = at.load().control
    wired = [at.positive, at.negative]
    number = HALVES.index(half)
    wired[number] = at.stock(control, picture())[number]
    expected = at.sample(conds=wired)
    one = at.options(control, apply_to=half)
    through_stock = at.sample(conds=at.stock(one, picture()))
    assert torch.equal(through_stock, at.sample(at.ours(one, picture())))
    assert relative(through_stock, expected) < REASSOCIATED
    for other in (at.sample(), at.sample(at.ours(control, picture()))):
        assert relative(expected, other) > 0.003


def guided(at: TransformerStage, name: str, model: Any, positive: Any, negative: Any) -> Tensor:
    """Sample two steps under a guider of the host."""
    from comfy_extras import nodes_custom_sampler as nodes

    if name == "basic":
        return at.guide(nodes.BasicGuider.execute(model, positive)[0])
    if name == "CFG":
        return at.guide(nodes.CFGGuider.execute(model, positive, negative, 3.0)[0])
    return at.guide(nodes.DualCFGGuider.execute(model, positive, positive, negative, 3.0, 2.0, "regular")[0])


@in_turn("guider", ["basic", "CFG", "DualCFG"])
def test_guiders_of_the_host_take_the_control_through_both_doors(
    family: str, guider: str, stage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    at = stage(family)
    control = at.load().control
    plain = guided(at, guider, at.model, at.positive, at.negative)
    through_stock = guided(at, guider, at.model, *at.stock(control, picture()))
    through_ours = guided(at, guider, at.ours(control, picture()), at.positive, at.negative)
    assert torch.equal(through_stock, through_ours)
    assert relative(through_ours, plain) > 0.01
    caplog.set_level("INFO")
    one = guided(at, guider, at.ours(at.options(control, apply_to="positive"), picture()), at.positive, at.negative)
    assert torch.equal(one, through_ours) is (guider != "CFG")
    assert ("apply_to=positive cannot be followed" in caplog.text) is (guider == "DualCFG")
    assert torch.equal(guided(at, guider, at.model, at.positive, at.negative), plain)
