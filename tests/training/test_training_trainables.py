"""Selection of trained weights: all others keep every bit, get no gradient, and the host's MODEL is unchanged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.families import UNET_SUBSETS
from comfyui_controlnext.controlnext_core.key_maps import unet_key_map
from comfyui_controlnext.controlnext_core.low_rank import whole
from comfyui_controlnext.controlnext_training.config import ConfigError, TrainConfig
from comfyui_controlnext.controlnext_training.trainables import selected, train_differences
from comfyui_controlnext.tests.core.test_key_maps import SD15, SDXL, SVD
from comfyui_controlnext.tests.fixtures.sampling_fixtures import Studio
from comfyui_controlnext.tests.fixtures.training_fixtures import (
    CPU,
    base_of,
    frozen,
    gradients_of,
    hashes,
    host_weights,
    loop_on,
    same,
    small,
    take_steps,
)
from torch import Tensor, nn

pytestmark = pytest.mark.comfy

FULL = {"sd15": SD15, "sdxl": SDXL, "svd": SVD}
ATTENTION_OUT = "re:to_(out|v)"
SIZES = {
    ("to_out", "sd15"): 24_805_760,
    ("to_out", "sdxl"): 204_966_400,
    ("to_out", "svd"): 49_611_520,
    ("attn2_to_out", "sd15"): 12_402_880,
    ("attn2_to_out", "sdxl"): 102_483_200,
    ("attn2_to_out", "svd"): 24_805_760,
    (ATTENTION_OUT, "sd15"): 46_780_800,
    (ATTENTION_OUT, "sdxl"): 477_760_000,
    (ATTENTION_OUT, "svd"): 99_951_360,
    ("up_to_out", "sd15"): 12_915_840,
    ("up_to_out", "sdxl"): 103_303_680,
    ("up_to_out", "svd"): 25_831_680,
    ("all", "sd15"): 859_520_964,
    ("all", "sdxl"): 2_567_463_684,
    ("all", "svd"): 1_524_623_082,
}
"""Numbers in the chosen weights of the released UNets, counted over the published classes."""
CHOICES = [
    ("none", ""),
    ("to_out", ""),
    ("attn2_to_out", ""),
    ("up_to_out", ""),
    ("all", ""),
    ("re:conv_(in|out)", ""),
    ("to_out", "input"),
    ("all", "input.0-2, middle"),
    ("all", "output"),
]


@pytest.fixture(scope="module")
def full_shapes() -> dict[str, dict[str, torch.Size]]:
    """Shapes of the released UNets by host name."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    found = {}
    for family, config in FULL.items():
        given = {"image_size": 32, "use_spatial_transformer": True, "legacy": False, **config}
        unet = UNetModel(**given, dtype=torch.float16, device="meta", operations=comfy.ops.disable_weight_init)
        found[family] = {name: tensor.shape for name, tensor in unet.state_dict().items()}
    return found


@pytest.mark.parametrize(("subset", "family"), SIZES)
def test_a_subset_of_a_released_unet_has_the_published_size(subset: str, family: str, full_shapes: Any) -> None:
    names = selected(unet_key_map(FULL[family]), subset, "")
    assert sum(full_shapes[family][name].numel() for name in names) == SIZES[subset, family]


@pytest.mark.parametrize("family", FULL)
def test_blocks_split_a_subset_without_rest_and_without_overlap(family: str) -> None:
    key_map = unet_key_map(FULL[family])
    sides = [set(selected(key_map, "to_out", side)) for side in ("input", "middle", "output")]
    assert set().union(*sides) == set(selected(key_map, "to_out", ""))
    assert sum(map(len, sides)) == len(set().union(*sides))
    assert all(name.startswith("middle_block.") for name in sides[1])
    some = selected(key_map, "all", "input.4-5")
    assert {name.split(".")[1] for name in some} == {"4", "5"}
    assert set(selected(key_map, "all", "input.4-5, output.3")) > set(some)


def test_a_choice_that_selects_nothing_is_refused_and_none_is_not() -> None:
    key_map = unet_key_map(SD15)
    assert selected(key_map, "none", "") == []
    for subset, blocks in (("re:no_such_layer", ""), ("to_out", "input.0"), ("up_to_out", "input")):
        with pytest.raises(ConfigError, match="selects none of the .* Set trainable = none"):
            selected(key_map, subset, blocks)


def _listed(config: TrainConfig, key_map: Any) -> list[str]:
    return [f"unet.{name}" for name in selected(key_map, config.trainable, config.blocks)]


@pytest.mark.parametrize(("trainable", "blocks"), CHOICES)
def test_only_the_listed_weights_change(loaded_studio: Studio, trainable: str, blocks: str) -> None:
    base = base_of(loaded_studio)
    config = small(trainable=trainable, blocks=blocks, learning_rate=1e-3)
    before_host = hashes(host_weights(base.model))
    loop = loop_on(base, config)
    listed = _listed(config, loop.controlled.key_map)
    encoder = [f"control.{name}" for name, _ in loop.controlled.net.named_parameters()]
    assert sorted(loop.parameters) == sorted(listed + encoder)
    before, start = hashes(frozen(loop.controlled)), hashes(loop.parameters)
    assert len(before) > 100
    take_steps(loop, 1)
    after = hashes(loop.parameters)
    assert hashes(frozen(loop.controlled)) == before
    assert [name for name in loop.parameters if after[name] == start[name]] == []
    assert hashes(host_weights(base.model)) == before_host
    assert not base.model.patches


@pytest.mark.parametrize(("trainable", "blocks"), [("none", ""), ("attn2_to_out", ""), ("all", "middle")])
def test_no_gradient_reaches_the_rest(loaded_studio: Studio, trainable: str, blocks: str) -> None:
    loop = loop_on(base_of(loaded_studio), small(trainable=trainable, blocks=blocks))
    gradients = gradients_of(loop)
    assert gradients.keys() == loop.parameters.keys()
    assert all(float(gradient.abs().sum()) > 0 for gradient in gradients.values())
    rest = frozen(loop.controlled)
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in rest.values())
    trained = [p for p in loop.controlled.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in loop.parameters.values()}


def test_the_whole_unet_is_what_all_selects(loaded_studio: Studio) -> None:
    base = base_of(loaded_studio)
    loop = loop_on(base, small(trainable="all"))
    found = {name.removeprefix("unet.") for name in loop.parameters if name.startswith("unet.")}
    assert found == set(base.model.model.diffusion_model.state_dict())


def test_controls_of_disjoint_blocks_touch_disjoint_weights(loaded_studio: Studio) -> None:
    trained = []
    for blocks in ("input, middle", "output"):
        loop = loop_on(base_of(loaded_studio), small(blocks=blocks))
        take_steps(loop, 1)
        moved = {n for n, t in loop.controlled.published_differences().items() if bool(t.any())}
        assert moved == set(loop.controlled.published_differences())
        trained.append(moved)
    assert trained[0] and trained[1] and not trained[0] & trained[1]
    whole = loop_on(base_of(loaded_studio), small())
    assert trained[0] | trained[1] == set(whole.controlled.published_differences())


def test_a_control_net_xs_trains_and_its_base_does_not(loaded_studio: Studio) -> None:
    base = base_of(loaded_studio)
    loop = loop_on(base, small(variant="xs", trainable="to_out"))
    assert all(name.startswith("control.") for name in loop.parameters)
    before, start = hashes(frozen(loop.controlled)), hashes(loop.parameters)
    take_steps(loop, 3)  # zero layers stand behind zero layers: each step reaches one further
    after = hashes(loop.parameters)
    assert hashes(frozen(loop.controlled)) == before
    same_still = [name for name in after if after[name] == start[name]]
    assert not same_still, same_still


def test_a_difference_is_added_to_its_base_and_starts_at_zero() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).half().requires_grad_(False)
    before = layers[0].weight.clone()
    differences = train_differences(layers, ["0.weight"], CPU)
    assert torch.equal(layers[0].weight, before.float()) and layers[0].weight.dtype == torch.float32
    assert [n for n, p in layers.named_parameters() if p.requires_grad] == ["0.parametrizations.weight.original"]
    change = torch.full((3, 4), 2.0**-14)
    differences.load({"0.weight": change})
    assert torch.equal(layers[0].weight, before.float() + change), "the sum is formed in fp32"
    assert same(differences.tensors(), {"0.weight": change})
    with pytest.raises(ValueError, match=r"1 weights are not those that train, first 0.bias"):
        differences.load({"0.weight": change, "0.bias": torch.zeros(3)})


@pytest.mark.parametrize("part", [(1, 0, 4), (0, 2, 3)], ids=str)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_slice_trains_and_the_rest_of_its_weight_does_not(part: tuple[int, int, int], rank: int) -> None:
    """Gradients against those of a whole difference, of which they are the slice."""
    torch.manual_seed(0)
    dim, start, length = part
    base, x, target = nn.Linear(10, 6).requires_grad_(False), torch.randn(5, 10), torch.randn(5, 6)

    def trained(rank: int, slices: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
        layer = copy.deepcopy(base)
        differences = train_differences(nn.Sequential(layer), ["0.weight"], CPU, rank, 0, slices)
        for parameter in differences.parameters.values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        if not slices:
            layer.parametrizations.weight.original.data.copy_(wanted)
        gradients = torch.autograd.grad((layer(x) - target).square().sum(), list(differences.parameters.values()))
        return (layer, differences), dict(zip(differences.parameters, gradients, strict=True))

    (layer, differences), found = trained(rank, {"0.weight": part})
    ((key, difference),) = differences.by_weight().items()
    assert key == ("0.weight", part) and differences.shapes == {"0.weight": (6, 10)}
    wanted = torch.zeros(6, 10)
    wanted.narrow(dim, start, length).copy_(whole(difference))
    assert torch.equal(layer.weight, base.weight + wanted) and bool(wanted.any()) and bool((wanted == 0).any())
    gradient = trained(0, {})[1]["0.weight"].narrow(dim, start, length)
    if rank:
        up, down = (differences.parameters[f"0.weight{end}"] for end in (".up", ".down"))
        torch.testing.assert_close(found["0.weight.up"], gradient @ down.T)
        torch.testing.assert_close(found["0.weight.down"], up.T @ gradient)
    else:
        torch.testing.assert_close(found["0.weight"], gradient)


def test_every_named_subset_is_a_choice_of_the_configuration() -> None:
    for name in UNET_SUBSETS:
        assert TrainConfig(trainable=name).trainable == name
