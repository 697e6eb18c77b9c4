"""Several controls, stock ControlNets, LoRAs, areas, and the host's other patches, all on one model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.sampling_fixtures import (
    CELLS,
    REASSOCIATED,
    Studio,
    demo_pair,
    picture,
    relative,
)
from torch import Tensor

pytestmark = pytest.mark.comfy

HINTS = {"a": picture(1), "b": picture(2), "c": picture(3)}
STRENGTHS = {"a": 0.7, "b": 0.4, "c": 1.0}
"""Strengths for which the sums of three terms in different orders round differently."""


def stacked(studio: Studio, model: Any, controls: dict[str, Any], plan: str) -> Tensor:
    """Apply controls in the plan's order: a letter through the stock node, a capital through this pack's."""
    positive, negative = studio.positive, studio.negative
    for step in plan:
        name = step.lower()
        if step.isupper():
            model = studio.ours(model, controls[name], HINTS[name], STRENGTHS[name])
        else:
            settings = (STRENGTHS[name], 0.0, 1.0)
            positive, negative = studio.apply_to(positive, negative, controls[name], HINTS[name], *settings)
    return studio.sample(model, positive, negative, steps=1)


def test_controls_give_the_same_bits_in_any_order_and_through_any_door(studio: Studio) -> None:
    """Encoders: two, one of them twice with another hint."""
    loaded, other = studio.load(), studio.load("other.safetensors")
    controls = {"a": loaded.control, "b": other.control, "c": loaded.control}
    expected = stacked(studio, loaded.model, controls, "abc")
    for plan in ("cba", "bca", "ABC", "BCA", "aBC", "Cba"):
        assert torch.equal(stacked(studio, loaded.model, controls, plan), expected), plan
    for fewer in ("ab", "bc", "ac"):
        assert relative(stacked(studio, loaded.model, controls, fewer), expected) > 0.001, fewer


def test_masks_alone_order_controls_that_are_otherwise_the_same(studio: Studio) -> None:
    """Controls with the same encoder, hint and strength, three with different masks: sums whose rounding depends on
    their order.
    """
    loaded = studio.load()
    side = torch.linspace(0.1, 1, 8 * CELLS).expand(1, 8 * CELLS, -1)
    masks = (side, 1 - side / 3, side.mT**2)

    def through(order: tuple[int, ...]) -> Tensor:
        conds = studio.positive, studio.negative
        for number in order:
            control = studio.options(loaded.control, mask=masks[number])
            conds = studio.apply_to(*conds, control, picture(), 0.7, 0.0, 1.0)
        return studio.sample(loaded.model, *conds, steps=1)

    expected = through((0, 1, 2))
    for order in ((2, 1, 0), (1, 2, 0), (2, 0, 1)):
        assert torch.equal(through(order), expected), order


def test_each_control_is_measured_against_the_same_features(studio: Studio) -> None:
    """Halves of a control sum to the whole: nothing is normalised against the addition of another control."""
    loaded = studio.load()
    whole = studio.ours(loaded.model, loaded.control, picture(), 0.8)
    half = studio.ours(loaded.model, loaded.control, picture(), 0.4)
    twice = studio.ours(half, loaded.control, picture(), 0.4)
    assert relative(studio.sample(twice), studio.sample(whole)) < REASSOCIATED


@pytest.fixture
def stock_control(studio: Studio, tiny: Any) -> Any:
    """Stock ControlNet from the host's loader."""
    import comfy.controlnet

    return comfy.controlnet.load_controlnet(str(tiny.models / "controlnet" / tiny.names["stock_control"]))


def test_a_stock_controlnet_goes_before_or_after(studio: Studio, stock_control: Any) -> None:
    loaded, other = studio.load(), studio.load("other.safetensors")
    controls = {"a": loaded.control, "b": other.control, "c": stock_control}
    expected = stacked(studio, loaded.model, controls, "abc")
    for plan in ("cab", "bca", "cAB", "cBa"):
        assert torch.equal(stacked(studio, loaded.model, controls, plan), expected), plan
    for without in ("ab", "c"):
        assert relative(stacked(studio, loaded.model, controls, without), expected) > 0.001


def test_two_encoders_a_lora_and_a_stock_controlnet_work_together(
    studio: Studio, stock_control: Any, tiny: Any, plain: Tensor
) -> None:
    import comfy.sd
    import comfy.utils

    lora = comfy.utils.load_torch_file(str(tiny.models / "loras" / tiny.names["lora"]))

    def with_lora(model: Any) -> Any:
        return comfy.sd.load_lora_for_models(model, None, lora, 0.8, 0.0)[0]

    first = demo_pair(studio, with_lora(studio.model))
    last = demo_pair(studio)
    other = studio.load("other.safetensors")
    results = {}
    for order, loaded, model in (("lora first", first, first.model), ("lora last", last, with_lora(last.model))):
        controls = {"a": loaded.control, "b": other.control, "c": stock_control}
        results[order] = stacked(studio, model, controls, "cab")
        assert torch.equal(stacked(studio, model, controls, "cBA"), results[order])
    assert relative(results["lora last"], results["lora first"]) < REASSOCIATED
    controls = {"a": last.control, "b": other.control, "c": stock_control}
    assert relative(stacked(studio, last.model, controls, "cab"), results["lora last"]) > 0.001
    assert torch.equal(studio.sample(), plain)


@pytest.mark.parametrize("kind", ["area", "mask"])
def test_a_control_on_a_regional_prompt_stays_in_its_region(studio: Studio, kind: str) -> None:
    """Outside the region the picture equals that of the region without control, after one step."""
    import nodes as host_nodes

    loaded = studio.load()

    def run(control: bool) -> Tensor:
        regional = studio.encode("a dog")
        if control:
            regional, _ = studio.apply_to(regional, studio.negative, loaded.control, picture())
        if kind == "area":
            (regional,) = host_nodes.ConditioningSetArea().append(regional, 4 * CELLS, 8 * CELLS, 0, 0, 1.0)
        else:
            mask = torch.zeros(1, 8 * CELLS, 8 * CELLS)
            mask[..., : 4 * CELLS] = 1
            (regional,) = host_nodes.ConditioningSetMask().append(regional, mask, "default", 1.0)
        return studio.sample(loaded.model, studio.positive + regional, steps=1)

    with_control, without = run(True), run(False)
    left, right = with_control.chunk(2, dim=-1)
    left_before, right_before = without.chunk(2, dim=-1)
    assert relative(right, right_before) < REASSOCIATED
    assert relative(left, left_before) > 0.01


def freeu(model: Any, version: str) -> Any:
    """Stock FreeU node, with a width for which its second factor applies to a UNet of 320 channels everywhere."""
    from comfy_extras import nodes_freelunch

    config = model.model.model_config.unet_config
    width = config["model_channels"]
    config["model_channels"] = width // 4
    try:
        return getattr(nodes_freelunch, version)().patch(model, 1.3, 1.4, 0.9, 0.2)[0]
    finally:
        config["model_channels"] = width


def deep_shrink(model: Any, block: int, after_skip: bool) -> Any:
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale

    return PatchModelAddDownscale.execute(model, block, 2.0, 0.0, 0.5, after_skip, "bicubic", "bicubic")[0]


def hypertile(model: Any) -> Any:
    from comfy_extras.nodes_hypertile import HyperTile

    return HyperTile.execute(model, 32, 2, 1, False)[0]


@pytest.mark.parametrize(
    ("patch", "cells"),
    [
        pytest.param(lambda model: freeu(model, "FreeU"), 8, id="FreeU"),
        pytest.param(lambda model: freeu(model, "FreeU_V2"), 8, id="FreeU_V2"),
        pytest.param(lambda model: deep_shrink(model, 1, True), 8, id="deep shrink before the site"),
        pytest.param(lambda model: deep_shrink(model, 1, False), 8, id="deep shrink before the site and skip"),
        pytest.param(lambda model: deep_shrink(model, 2, True), 8, id="deep shrink at the site"),
        pytest.param(lambda model: deep_shrink(model, 3, True), 8, id="deep shrink after the site"),
        pytest.param(hypertile, 16, id="HyperTile"),
    ],
)
def test_the_hosts_model_patches_and_a_control_work_together(studio: Studio, patch: Any, cells: int) -> None:
    loaded = studio.load()
    plain = studio.sample(steps=1, cells=cells)
    patched = patch(loaded.model)
    without = studio.sample(patched, steps=1, cells=cells)
    assert relative(without, plain) > 0.001, "the patch has no effect on this model"
    conds = studio.stock(loaded.control, picture())
    through_stock = studio.sample(patched, *conds, steps=1, cells=cells)
    assert through_stock.isfinite().all() and relative(through_stock, without) > 0.001
    before = studio.ours(patched, loaded.control, picture())
    after = patch(studio.ours(loaded.model, loaded.control, picture()))
    for model in (before, after):
        assert torch.equal(studio.sample(model, steps=1, cells=cells), through_stock)
    only = studio.sample(loaded.model, *conds, steps=1, cells=cells)
    assert relative(through_stock, only) > 0.001
    assert torch.equal(studio.sample(steps=1, cells=cells), plain)


def test_an_inpainting_unet_takes_the_control(studio: Studio, tmp_path: Any) -> None:
    """Nine channels go in: latent, mask, masked picture."""
    import comfy.sd
    from comfyui_controlnext.tools.tiny_models import make_sd15_inpaint

    import nodes as host_nodes

    path = make_sd15_inpaint(tmp_path / "inpaint.ckpt")
    model = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]
    loaded = studio.load(model=model)
    mask = torch.zeros(1, 8 * CELLS, 8 * CELLS)
    mask[:, 16:48, 16:48] = 1

    def run(model: Any, positive: Any, negative: Any) -> Tensor:
        encode = host_nodes.InpaintModelConditioning().encode
        *conds, latent = encode(positive, negative, picture(5), studio.vae, mask, noise_mask=False)
        return host_nodes.KSampler().sample(model, 1, 2, 4.0, "euler", "normal", *conds, latent)[0]["samples"]

    plain = run(model, studio.positive, studio.negative)
    through_stock = run(loaded.model, *studio.stock(loaded.control, picture()))
    through_ours = run(studio.ours(loaded.model, loaded.control, picture()), studio.positive, studio.negative)
    assert torch.equal(through_stock, through_ours)
    assert relative(through_ours, plain) > 0.001


def test_clones_of_a_controlled_model_share_one_encoder(studio: Studio) -> None:
    import copy

    loaded = studio.load()
    net = loaded.control.net.patcher.model
    controlled = studio.ours(loaded.model, loaded.control, picture())
    conds = studio.stock(loaded.control, picture())
    clone = controlled.clone().clone()
    for model in (controlled, clone):
        assert [patcher.model is net for patcher in model.get_additional_models()] == [True]
    assert conds[0][0][1]["control"].copy().get_models()[0].model is net
    assert copy.deepcopy(clone.model_options).keys() == clone.model_options.keys()
    assert torch.equal(studio.sample(clone), studio.sample(controlled))
