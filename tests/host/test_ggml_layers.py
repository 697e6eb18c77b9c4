"""Weights of a control on a base in the form of ComfyUI-GGUF, whose layers add patches and call no weight functions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures import ggml_layers as ggml
from comfyui_controlnext.tests.fixtures.quantised_fixtures import PLAIN_FP8, quantised_unet
from comfyui_controlnext.tests.fixtures.transformer_fixtures import narrow_model
from comfyui_controlnext.tests.fixtures.transformer_stage import TransformerStage
from comfyui_controlnext.tests.host.test_transformer_weights import factors, product, velocity
from comfyui_controlnext.tests.host.test_unet_quantised import prediction, small_differences
from comfyui_controlnext.tests.host.test_weights_on_host import host_names
from safetensors.torch import load_file, save_file
from torch import Tensor

pytestmark = pytest.mark.comfy
KEPT = 1e-3
"""Relative error of a difference's effect against the fp32 sum."""


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    import comfy.model_management

    with torch.inference_mode():
        yield
        comfy.model_management.unload_all_models()


def set_weights(model: Any, differences: dict[str, Tensor]) -> None:
    """Put weight + difference, in fp32, in the place of these weights."""
    for name, difference in differences.items():
        weight = model.model.get_parameter(name)
        values = (ggml.values_of(weight) + difference).as_subclass(ggml.Held)
        weight.data = ggml.named(values, "F32", difference.shape, [])
        weight.tensor_type, weight.tensor_shape = "F32", difference.shape


def held_unet(pinned: bool) -> Any:
    return ggml.held_model(quantised_unet("sd15", PLAIN_FP8, pinned))


@pytest.mark.parametrize("family", ["sd3", "z_image", "wan"])
def test_a_low_rank_difference_acts_as_on_the_same_numbers_in_fp32(family: str, tmp_path: Path) -> None:
    at, tensors = TransformerStage(family, tmp_path), factors(family)
    at.model = ggml.held_model(narrow_model.__wrapped__(family))
    name, difference = product(tensors)
    loaded = at.load(weights=tensors)
    assert "low rank" in loaded.report and "in each forward" not in loaded.report
    bare, found = velocity(at.model, family), velocity(loaded.model, family)
    assert torch.equal(velocity(at.model, family), bare)
    layer = at.model.model.get_submodule(f"diffusion_model.{name.removesuffix('.weight')}")
    assert layer.is_ggml_quantized()
    set_weights(at.model, {f"diffusion_model.{name}": difference})
    effect = velocity(at.model, family) - bare
    assert effect.norm() > 1e-3 * bare.norm()
    assert float((found - bare - effect).norm() / effect.norm()) < KEPT


@pytest.mark.parametrize("kind", ["difference", "full"])
def test_weights_of_a_unet_act_as_on_the_same_numbers_in_fp32(kind: str, tmp_path: Path, pinned_host: bool) -> None:
    """Full weights are compared with the dequantised ones, also by weights_kind auto, which measures both."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_controlnext

    model = held_unet(pinned_host)
    differences = small_differences(tmp_path)
    if kind == "full":
        names, unet = host_names(), load_file(tmp_path / "unet.safetensors")
        base = {name: ggml.values_of(model.model.get_parameter(names[name])) for name in unet}
        save_file({name: base[name] + unet[name] for name in unet}, tmp_path / "unet.safetensors")
    loaded = load_controlnext(model, tmp_path / "control.safetensors", "auto")
    assert kind in loaded.report and "in each forward" not in loaded.report
    bare, found = prediction(model), prediction(loaded.model)
    assert torch.equal(prediction(model), bare)
    set_weights(model, differences)
    effect = prediction(model) - bare
    assert effect.norm() > 1e-3 * bare.norm()
    assert float((found - bare - effect).norm() / effect.norm()) < KEPT


def test_weights_are_read_as_numbers_without_what_lies_on_them(tmp_path: Path) -> None:
    import comfy.model_management
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.weights import base_weights

    at, tensors = TransformerStage("sd3", tmp_path), factors("sd3")
    at.model = ggml.held_model(narrow_model.__wrapped__("sd3"))
    loaded = at.load(weights=tensors)
    comfy.model_management.load_models_gpu([loaded.model])
    name = f"diffusion_model.{product(tensors)[0]}"
    weight = loaded.model.model.get_parameter(name)
    assert len(weight.patches) == 1
    found = base_weights(loaded.model)(name)
    assert type(found) is Tensor and torch.equal(found, ggml.values_of(weight)) and len(weight.patches) == 1
    true = narrow_model("sd3").get_parameter(name)  # another one, from the same seed
    assert 0 < float((found - true).norm() / true.norm()) < 0.01
    assert base_weights(loaded.model)("diffusion_model.joint_blocks.0.wait.weight") is None
