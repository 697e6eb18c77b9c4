"""Weight differences of transformer controls on the host's models: plain and quantised, beside LoRAs, saved again."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.tests.fixtures.sampling_fixtures import picture, relative
from comfyui_controlnext.tests.fixtures.transformer_fixtures import NARROW, WIDTH, inputs, narrow_model
from comfyui_controlnext.tests.fixtures.transformer_stage import TransformerStage, each, in_turn
from comfyui_controlnext.tests.references import reference_transformers as reference
from torch import Tensor

pytestmark = pytest.mark.comfy
RANK = 3
FP8 = torch.float8_e4m3fn
REASSOCIATED = 1e-5


def factors(family: str, block: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of one low-rank difference in a file, a tenth of the weight's size."""
    name, width = reference.FAMILIES[family].differences.replace("N", str(block)), NARROW[family].width
    generator = torch.Generator().manual_seed(seed)
    up = 0.1 * torch.randn(width, RANK, generator=generator) * RANK**-0.5
    return {f"{name}.up": up, f"{name}.down": torch.randn(RANK, width, generator=generator) * width**-0.5}


def product(tensors: dict[str, Tensor]) -> tuple[str, Tensor]:
    """Name of the weight, and its difference."""
    (up,), (down,) = ([n for n in tensors if n.endswith(end)] for end in (".up", ".down"))
    return up.removesuffix(".up"), tensors[up] @ tensors[down]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Any]:
    import comfy.model_management
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.features import CACHE

    CACHE.clear()
    with torch.inference_mode():
        yield lambda family: TransformerStage(family, tmp_path)
        comfy.model_management.unload_all_models()  # the narrow models are shared: they get their own weights back


@each
def test_the_product_of_the_factors_is_added_to_the_weight(family: str, stage: Any) -> None:
    import comfy.model_management

    at, tensors = stage(family), factors(family)
    loaded = at.load(weights=tensors, weights_strength=0.5)
    name, difference = product(tensors)

    def weight_of(model: Any) -> Tensor:
        comfy.model_management.load_models_gpu([model])
        return model.model.get_parameter(f"diffusion_model.{name}").clone()

    plain, patched = weight_of(at.model), weight_of(loaded.model)
    torch.testing.assert_close(patched, plain + 0.5 * difference, rtol=1e-5, atol=1e-6)
    assert f"low rank ({RANK}) of 1 weights, strength 0.5" in loaded.report and "quantised" not in loaded.report


@each
def test_strength_zero_is_the_plain_model_and_loras_commute(family: str, stage: Any) -> None:
    import comfy.sd

    at, tensors = stage(family), factors(family)
    plain = at.sample()
    assert torch.equal(at.sample(at.load(weights=tensors, weights_strength=0.0).model), plain)
    other = factors(family, seed=5)
    name, _ = product(other)
    layer = f"diffusion_model.{name.removesuffix('.weight')}"
    lora = {f"{layer}.lora_B.weight": other[f"{name}.up"], f"{layer}.lora_A.weight": other[f"{name}.down"]}

    def with_lora(model: Any) -> Any:
        return comfy.sd.load_lora_for_models(model, None, lora, 0.8, 0.0)[0]

    after = at.sample(with_lora(at.load(weights=tensors).model))
    before = at.sample(at.load(weights=tensors, model=with_lora(at.model)).model)
    assert relative(after, before) < REASSOCIATED
    for less in (at.load(weights=tensors).model, with_lora(at.model), at.model):
        assert relative(at.sample(less), after) > 1e-3


def quantised_stage(family: str, folder: Path) -> TransformerStage:
    from comfy.model_patcher import ModelPatcher

    at = TransformerStage(family, folder)
    at.model = ModelPatcher(narrow_model(family, FP8), torch.device("cpu"), torch.device("cpu"))
    return at


def velocity(model: Any, family: str) -> Tensor:
    """Velocity from one forward of a MODEL as the host has loaded it."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    given = inputs(family, (8, 8))
    options = {"cond_or_uncond": [0], "sigmas": given.sigma}
    return model.model.apply_model(
        given.x, given.sigma, c_crossattn=given.context, transformer_options=options, **given.more
    )


@each
def test_a_quantised_weight_gets_the_difference_whole(family: str, tmp_path: Path, stage: Any) -> None:
    """Result equals that of the stored fp8 values in fp32 plus the difference; rounding drowns a plain patch."""
    at, tensors = quantised_stage(family, tmp_path), factors(family)
    tensors = {name: 0.2 * t if name.endswith(".up") else t for name, t in tensors.items()}  # 2 % of the weight
    name, difference = product(tensors)
    loaded = at.load(weights=tensors)
    assert "added in each forward as the model is quantised" in loaded.report
    bare, found = velocity(at.model, family), velocity(loaded.model, family)
    weight = at.model.model.get_parameter(f"diffusion_model.{name}")
    assert weight.dtype == FP8
    layer = at.model.model.get_submodule(f"diffusion_model.{name.removesuffix('.weight')}")
    velocity(at.model, family)
    forward = layer.forward
    layer.forward = lambda x: torch.nn.functional.linear(x, weight.float() + difference, _bias(layer))
    try:
        expected = velocity(at.model, family)
    finally:
        layer.forward = forward
    effect = expected - bare
    assert float((found - expected).norm() / effect.norm()) < 1e-3
    plainly = at.model.clone()
    plainly.add_patches({f"diffusion_model.{name}": (difference,)}, 1.0)
    error = velocity(plainly, family) - expected
    assert float(error.norm() / effect.norm()) > 0.3, "the host patches fp8 well: the way around is not needed"
    assert torch.equal(velocity(at.model, family), bare)


def _bias(layer: Any) -> Tensor | None:
    return None if layer.bias is None else layer.bias.float()


@in_turn("layout", ["single", "lora"])
def test_what_is_saved_loads_and_acts_the_same(
    family: str, layout: str, stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.sd
    import folder_paths
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_controlnext
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.saving import save_control

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    at, tensors = stage(family), factors(family)
    loaded = at.load(weights=tensors, weights_strength=0.5)
    expected = at.sample(at.ours(loaded.control, picture(), model=loaded.model))
    path = save_control(loaded.control, loaded.model, "cn/mine", layout, "fp32")
    again = load_controlnext(at.model, path)
    found = at.sample(at.ours(again.control, picture(), model=again.model))
    assert relative(found, expected) < REASSOCIATED
    if layout == "lora":
        lora = checkpoint.load(path.with_name("lora.safetensors"))
        by_host = comfy.sd.load_lora_for_models(at.model, None, lora, 1.0, 0.0)[0]
        assert relative(at.sample(at.ours(again.control, picture(), model=by_host)), expected) < REASSOCIATED


SLICES = {
    "single_blocks.1.linear2.weight": (1, 0, WIDTH),  # the attention's part of its output with the MLP's
    "double_blocks.0.img_attn.qkv.weight": (0, WIDTH, WIDTH),  # the keys
}


def parts(seed: int = 2) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of a file with low-rank differences of both slices, and the same as differences of whole weights."""
    network = narrow_model("flux").diffusion_model
    generator, tensors, wholes = torch.Generator().manual_seed(seed), {}, {}
    for name, (dim, start, length) in SLICES.items():
        up = 0.1 * torch.randn(WIDTH, RANK, generator=generator)
        down = torch.randn(RANK, WIDTH, generator=generator) * WIDTH**-0.5
        tensors |= {f"{name}.up": up, f"{name}.down": down}
        wholes[name] = torch.zeros_like(network.get_parameter(name), dtype=torch.float32)
        wholes[name].narrow(dim, start, length).copy_(up @ down)
    return tensors, wholes


def attentions(family: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """(a file's tensors for every attention output of `single_too`, its slices, differences of the whole weights)"""
    network = narrow_model(family).diffusion_model
    generator, tensors, slices, wholes = torch.Generator().manual_seed(6), {}, {}, {}
    for name, weight in network.named_parameters():
        single = name.startswith("single_blocks.") and name.endswith(".linear2.weight")
        if not (single or name.endswith("img_attn.proj.weight")):
            continue
        up = 0.1 * torch.randn(WIDTH, RANK, generator=generator)
        down = torch.randn(RANK, WIDTH, generator=generator) * WIDTH**-0.5
        tensors |= {f"{name}.up": up, f"{name}.down": down}
        wholes[name] = torch.cat([up @ down, torch.zeros(WIDTH, weight.shape[1] - WIDTH)], dim=1)
        if single:
            slices[name] = (1, 0, WIDTH)
    return tensors, slices, wholes


@pytest.mark.parametrize("family", ["flux", "chroma"])
def test_attention_outputs_of_single_blocks_act_at_every_strength(family: str, stage: Any) -> None:
    """Against layers that compute with the sums; at strength 0 the plain model to the bit."""
    at, (tensors, slices, wholes) = stage(family), attentions(family)
    assert len(wholes) == 4 and len(slices) == 2
    bare = velocity(at.model, family)
    layers = {name: at.model.model.diffusion_model.get_submodule(name.removesuffix(".weight")) for name in wholes}
    for strength in (1.0, 0.4, 0.0):
        loaded = at.load(weights=tensors, slices=json.dumps(slices), weights_strength=strength)
        found = velocity(loaded.model, family)
        velocity(at.model, family)
        sums = {layer: layer.weight.clone() + strength * wholes[name] for name, layer in layers.items()}
        torch.testing.assert_close(found, _with_weights(at, sums), rtol=1e-4, atol=1e-5)
        assert torch.equal(found, bare) if strength == 0 else relative(found, bare) > 1e-3


@pytest.mark.parametrize("stored", ["plain", "quantised"])
def test_a_part_of_a_fused_weight_is_changed_and_no_other(stored: str, stage: Any, tmp_path: Path) -> None:
    """Flux: an output projection by its columns, a query-key-value projection by its rows."""
    import comfy.model_management

    at = stage("flux") if stored == "plain" else quantised_stage("flux", tmp_path)
    tensors, wholes = parts()
    loaded = at.load(weights=tensors, slices=json.dumps(SLICES))
    assert f"low rank ({RANK}) of 2 weights" in loaded.report
    found, bare = velocity(loaded.model, "flux"), velocity(at.model, "flux")
    network = at.model.model.diffusion_model
    layers = {name: network.get_submodule(name.removesuffix(".weight")) for name in SLICES}
    if stored == "plain":
        comfy.model_management.load_models_gpu([loaded.model])
        for name, layer in layers.items():
            untouched = wholes[name] == 0
            comfy.model_management.load_models_gpu([at.model])
            before = layer.weight.clone()
            comfy.model_management.load_models_gpu([loaded.model])
            assert torch.equal(layer.weight[untouched], before[untouched])
            torch.testing.assert_close(layer.weight, before + wholes[name], rtol=1e-5, atol=1e-6)
        comfy.model_management.load_models_gpu([at.model])
    expected = _with_weights(at, {layer: layer.weight.float() + wholes[name] for name, layer in layers.items()})
    effect = expected - bare
    assert float((found - expected).norm() / effect.norm()) < 1e-3


def _with_weights(at: TransformerStage, weights: dict[Any, Tensor]) -> Tensor:
    """A forward whose layers compute with these weights in fp32."""
    for layer, weight in weights.items():
        layer.forward = functools.partial(_linear, weight=weight, bias=_bias(layer))
    try:
        return velocity(at.model, at.family)
    finally:
        for layer in weights:
            del layer.forward


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def test_parts_of_fused_weights_are_saved_as_parts_and_as_a_lora(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_controlnext
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.saving import save_control

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    at = stage("flux")
    loaded = at.load(weights=parts()[0], slices=json.dumps(SLICES))
    expected = at.sample(loaded.model)
    assert relative(expected, at.sample()) > 1e-3
    for layout in ("single", "lora"):
        path = save_control(loaded.control, loaded.model, f"cn/{layout}", layout, "fp32")
        assert relative(at.sample(load_controlnext(at.model, path).model), expected) < REASSOCIATED


def test_inspect_says_family_subset_rank_and_parts(stage: Any) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.inspecting import inspect_file

    single = attentions("chroma")
    for family, weights, slices, words in (
        ("sd3", factors("sd3"), "{}", "changes 1 weights of SD3: subset to_out, rank 3\n"),
        ("z_image", factors("z_image"), "{}", "changes 1 weights of Z-Image: subset to_out, rank 3\n"),
        ("lumina2", _refiner(), "{}", "changes 1 weights of Lumina2: subset refiners_too, rank 3\n"),
        ("flux", parts()[0], json.dumps(SLICES), "changes 2 weights of Flux.1: subset all, rank 3, parts of 2 fused"),
        (
            "chroma",
            single[0],
            json.dumps(single[1]),
            "4 weights of Chroma: subset single_too, rank 3, parts of 2 fused",
        ),
    ):
        text = inspect_file(stage(family).file(weights=weights, slices=slices))
        assert words in text and f"({family})" not in text and f"can be: {family} = " in text
        assert "base weights with weights_name=auto: " in text and "UNet weights" not in text


def _refiner() -> dict[str, Tensor]:
    """Difference of a noise refiner's attention."""
    return {name.replace("layers", "noise_refiner"): tensor for name, tensor in factors("lumina2").items()}


def test_a_kind_that_contradicts_the_file_is_named(stage: Any) -> None:
    at = stage("sd3")
    with pytest.raises(checkpoint.CheckpointError, match="holds differences .* not full weights"):
        at.load(weights=factors("sd3"), weights_kind="full")
