"""ControlNet-XS with LoRAs on the base, and on conditionings for a region or a part of the run; on the real host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.sampling_fixtures import CELLS, REASSOCIATED, Studio, picture, relative
from comfyui_controlnext.tools import tiny_models
from torch import Tensor

pytestmark = pytest.mark.comfy

LORA_STRENGTH = 0.8


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File with a time embedding, which the base uses too."""
    return tiny_models.make_controlnet_xs(tmp_path_factory.mktemp("xs") / "xs.safetensors", own_time=True)


@pytest.fixture
def control(studio: Studio, file: Path) -> Any:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

    return load_controlnet_xs(file).control


@pytest.fixture
def lora(tiny: Any) -> dict[str, Tensor]:
    import comfy.utils

    return comfy.utils.load_torch_file(str(tiny.models / "loras" / tiny.names["lora"]))


def with_lora(model: Any, lora: dict[str, Tensor]) -> Any:
    """MODEL of the stock LoRA loaders."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora, LORA_STRENGTH, 0.0)[0]


# LoRA


def baked(model: Any, tiny: Any) -> Any:
    """Checkpoint, loaded again, with the patched weights of a model merged in."""
    import comfy.model_management
    import comfy.sd

    path = tiny.models / "checkpoints" / tiny.names["checkpoint"]
    fresh = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]
    comfy.model_management.load_models_gpu([model])
    state = {name: tensor.clone() for name, tensor in model.model.diffusion_model.state_dict().items()}
    fresh.model.diffusion_model.load_state_dict(state)
    return fresh


def test_a_lora_changes_the_base_and_not_the_control_stream(
    studio: Studio, control: Any, lora: dict[str, Tensor], tiny: Any
) -> None:
    """Bit-equal to a checkpoint into which the LoRA has been merged: nothing of it reaches the control."""
    before = {name: tensor.clone() for name, tensor in control.loaded.net.state_dict().items()}
    model, conds = with_lora(studio.model, lora), studio.stock(control, picture())
    found = studio.sample(model, *conds)
    assert control.loaded.patcher.patches == {} and len(model.patches) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in control.loaded.net.state_dict().items())
    assert torch.equal(studio.sample(baked(model, tiny), *conds), found)
    for other in (studio.sample(model), studio.sample(None, *conds)):
        assert relative(found, other) > 0.01


def test_lora_and_control_go_in_any_order(studio: Studio, plain: Tensor, control: Any, lora: dict[str, Tensor]) -> None:
    through_stock = studio.sample(with_lora(studio.model, lora), *studio.stock(control, picture()))
    lora_first = studio.ours(with_lora(studio.model, lora), control, picture())
    lora_last = with_lora(studio.ours(studio.model, control, picture()), lora)
    for model in (lora_first, lora_last):
        assert torch.equal(studio.sample(model), through_stock)
    assert torch.equal(studio.sample(), plain)


# conditionings for a region


def in_region(conditioning: Any, kind: str) -> Any:
    """Stock node that binds a conditioning to the left half."""
    import nodes as host_nodes

    if kind == "area":
        return host_nodes.ConditioningSetArea().append(conditioning, 4 * CELLS, 8 * CELLS, 0, 0, 1.0)[0]
    mask = torch.zeros(1, 8 * CELLS, 8 * CELLS)
    mask[..., : 4 * CELLS] = 1
    return host_nodes.ConditioningSetMask().append(conditioning, mask, "default", 1.0)[0]


@pytest.mark.parametrize("kind", ["area", "mask"])
def test_a_control_on_a_regional_prompt_stays_in_its_region(studio: Studio, control: Any, kind: str) -> None:
    """Outside the region the picture equals that of the region without control, after one step."""
    dog = studio.encode("a dog")
    controlled, _ = studio.apply_to(dog, studio.negative, control, picture())
    with_control, without = (
        studio.sample(None, studio.positive + in_region(prompt, kind), steps=1) for prompt in (controlled, dog)
    )
    left, right = with_control.chunk(2, dim=-1)
    left_before, right_before = without.chunk(2, dim=-1)
    assert relative(right, right_before) < REASSOCIATED
    assert relative(left, left_before) > 0.01


def test_an_area_gets_the_whole_hint_at_its_size_as_with_stock_controls(studio: Studio, control: Any) -> None:
    """The left half gets the numbers of a picture of that size."""
    positive, negative = studio.stock(control, picture())
    seen: list[tuple[int, ...]] = []
    hook = control.loaded.net.hint_encoder[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    left = studio.sample(None, in_region(positive, "area"), in_region(negative, "area"), steps=1)
    hook.remove()
    assert seen == [(1, 3, 8 * CELLS, 4 * CELLS)]
    noise = torch.randn(1, 4, CELLS, CELLS, generator=torch.manual_seed(1))
    alone = one_step(studio, noise[..., : CELLS // 2], positive, negative)
    assert relative(left[..., : CELLS // 2], alone) < REASSOCIATED


def one_step(studio: Studio, noise: Tensor, positive: Any, negative: Any) -> Tensor:
    import comfy.sample

    latent = torch.zeros_like(noise)
    return comfy.sample.sample(studio.model, noise, 1, 4.0, "euler", "normal", positive, negative, latent, seed=1)


# conditionings for a part of the run


def in_range(conditioning: Any, start: float, end: float) -> Any:
    import nodes as host_nodes

    return host_nodes.ConditioningSetTimestepRange().set_range(conditioning, start, end)[0]


def parted(controlled: Any, other: Any, end: float) -> Any:
    """Conditioning up to a point of the run, and another one from there on."""
    return in_range(controlled, 0.0, end) + in_range(other, end, 1.0)


@pytest.mark.parametrize(
    ("settings", "as_if"), [({}, {"end": 0.5}), ({"start": 0.3}, {"start": 0.3, "end": 0.5}), ({"start": 0.6}, None)]
)
def test_a_conditionings_range_and_the_controls_own_intersect(
    studio: Studio, control: Any, settings: dict[str, float], as_if: dict[str, float] | None
) -> None:
    """Range of ConditioningSetTimestepRange up to 0.5, after the stock Apply node: the same bits as with the control's
    range.
    """
    steps = 6
    positive, negative = studio.stock(control, picture(), **settings)
    calls: list[int] = []
    hook = control.loaded.net.encoder[0].register_forward_hook(lambda *_: calls.append(1))
    found = studio.sample(
        None, parted(positive, studio.positive, 0.5), parted(negative, studio.negative, 0.5), steps=steps
    )
    hook.remove()
    assert len(calls) == 0 if as_if is None else 0 < len(calls) < steps
    expected = () if as_if is None else studio.stock(control, picture(), **as_if)
    assert torch.equal(found, studio.sample(None, *expected, steps=steps))


def test_other_hints_in_other_parts_of_the_run(studio: Studio, control: Any) -> None:
    """Conditionings with a control each, one after the other: each step gets the hint of its part."""
    hints = [picture(seed) for seed in (0, 1)]
    first, second = (studio.stock(control, hint) for hint in hints)
    found = studio.sample(None, *(parted(one, two, 0.5) for one, two in zip(first, second, strict=True)), steps=4)
    ranges = studio.apply_to(*studio.stock(control, hints[0], end=0.5), control, hints[1], 1.0, 0.5, 1.0)
    assert relative(found, studio.sample(None, *ranges, steps=4)) < REASSOCIATED
    for conds in (first, second):
        assert relative(found, studio.sample(None, *conds, steps=4)) > 1e-4
