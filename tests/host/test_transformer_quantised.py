"""Weight differences on quantised transformers: their effect in each format, and that of a plain patch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comfyui_controlnext.controlnext_core.checkpoint import CheckpointError
from comfyui_controlnext.tests.fixtures.quantised_fixtures import FP8, WIDE, formats, quantised_model
from comfyui_controlnext.tests.fixtures.transformer_fixtures import NARROW
from comfyui_controlnext.tests.fixtures.transformer_stage import FAMILIES, TransformerStage, in_turn
from comfyui_controlnext.tests.host.test_transformer_weights import factors, product, velocity
from torch import Tensor

log = logging.getLogger(__name__)
pytestmark = pytest.mark.comfy
FORMATS = (
    "fp8_e4m3fn",
    "scaled_fp8",
    "float8_e4m3fn",
    "float8_e5m2",
    "nvfp4",
    "mxfp8",
    "int8_tensorwise",
    "convrot_w4a4",
    "asym_w4a8_int8",
)
KEPT = 1e-3
"""Relative error of a difference's effect against the fp32 sum."""
DROWNED = 0.5
"""Relative error that a plain patch exceeds: the host quantises the sum again."""


@pytest.fixture
def inference() -> Iterator[None]:
    import comfy.model_management

    with torch.inference_mode():
        yield
        comfy.model_management.unload_all_models()


def stage_of(family: str, kind: str, folder: Path, pinned: bool) -> TransformerStage:
    """Stage with a quantised model; skips formats that this host cannot read or the narrow model cannot have."""
    from comfy.model_patcher import ModelPatcher

    if kind not in formats(pinned):
        pytest.skip(f"this host has no {kind}")
    if kind in WIDE and NARROW[family].width % 256:
        pytest.skip(f"{kind} needs rows of 256 numbers")
    at = TransformerStage(family, folder)
    at.model = ModelPatcher(quantised_model(family, kind, pinned), torch.device("cpu"), torch.device("cpu"))
    return at


def small(family: str) -> dict[str, Tensor]:
    """Factors of a difference of 2 % of the weight."""
    return {name: 0.2 * t if name.endswith(".up") else t for name, t in factors(family).items()}


def numbers_of(layer: Any) -> Tensor:
    """Weight of a layer in fp32, dequantised or scaled where needed."""
    if hasattr(layer.weight, "dequantize") and type(layer.weight.data) is not Tensor:
        return layer.weight.dequantize().float()
    scale = getattr(layer, "scale_weight", None)
    return layer.weight.float() * (1 if scale is None else scale.float())


@contextmanager
def computed(layer: Any, weight: Tensor) -> Iterator[None]:
    """Context in which the layer is a plain fp32 one."""
    bias = None if layer.bias is None else layer.bias.float()
    layer.forward = lambda x: F.linear(x, weight, bias)
    try:
        yield
    finally:
        del layer.forward


@in_turn("kind", FORMATS, sorted(FAMILIES, key=lambda family: family != "z_image"))  # wide enough for all of them
def test_a_difference_acts_as_on_the_same_numbers_in_fp32(
    family: str, kind: str, tmp_path: Path, pinned_host: bool, inference: None
) -> None:
    at = stage_of(family, kind, tmp_path, pinned_host)
    tensors = small(family)
    name, difference = product(tensors)
    loaded = at.load(weights=tensors)
    assert "added in each forward as the model is quantised" in loaded.report
    bare, found = velocity(at.model, family), velocity(loaded.model, family)
    layer = at.model.model.get_submodule(f"diffusion_model.{name.removesuffix('.weight')}")
    velocity(at.model, family)  # takes the difference away again
    weight = numbers_of(layer)
    assert layer.weight.data.dtype is not torch.float32 or type(layer.weight.data) is not Tensor
    with computed(layer, weight):
        without = velocity(at.model, family)
    with computed(layer, weight + difference):
        effect = velocity(at.model, family) - without
    plainly = at.model.clone()
    plainly.add_patches({f"diffusion_model.{name}": (difference,)}, 1.0)
    errors = [float((run - without - effect).norm() / effect.norm()) for run in (found, velocity(plainly, family))]
    own = float((bare - without).norm() / effect.norm())
    log.info("%s, %s: %.1e, by a plain patch %.2f; the layer's own rounding %.2f", family, kind, *errors, own)
    assert errors[0] < KEPT
    assert errors[1] > DROWNED, "the host patches this format well: the way around is not needed"
    assert torch.equal(velocity(at.model, family), bare)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_control_with_weights_samples_on_a_quantised_base_through_both_doors(
    kind: str, tmp_path: Path, pinned_host: bool, inference: None
) -> None:
    from comfyui_controlnext.tests.fixtures.sampling_fixtures import picture, relative

    at = stage_of("z_image", kind, tmp_path, pinned_host)
    loaded = at.load(weights=factors("z_image"))
    through_ours = at.sample(at.ours(loaded.control, picture(), model=loaded.model))
    assert torch.equal(at.sample(loaded.model, at.stock(loaded.control, picture())), through_ours)
    for model in (loaded.model, at.ours(loaded.control, picture())):
        assert relative(at.sample(model), through_ours) > 1e-3


@pytest.mark.parametrize("kind", FORMATS)
def test_the_weights_of_a_quantised_base_are_read_as_numbers(
    kind: str, tmp_path: Path, pinned_host: bool, inference: None
) -> None:
    """A full UNet file is compared with them."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.weights import base_weights

    at = stage_of("z_image", kind, tmp_path, pinned_host)
    look_up, name = base_weights(at.model), "diffusion_model.layers.0.attention.out"
    found = look_up(f"{name}.weight")
    assert found is not None and torch.allclose(found.float(), numbers_of(at.model.model.get_submodule(name)))
    assert look_up(f"{name}.wait") is None and look_up(f"{name}.forward") is None and look_up("") is None


def test_a_difference_does_not_meet_the_factors_on_a_layers_input(
    tmp_path: Path, pinned_host: bool, inference: None
) -> None:
    """nvfp4 with `pre_quant_scale`: the layer multiplies its input with it, the difference is for the input itself."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.weights import base_weights

    at = stage_of("z_image", "nvfp4", tmp_path, pinned_host)
    tensors = small("z_image")
    name, difference = product(tensors)
    layer = at.model.model.get_submodule(f"diffusion_model.{name.removesuffix('.weight')}")
    factors_of_input = 0.5 + torch.rand(difference.shape[1], generator=torch.Generator().manual_seed(1))
    layer.pre_quant_scale = torch.nn.Parameter(factors_of_input, requires_grad=False)
    weight = numbers_of(layer) * factors_of_input
    found_weight = base_weights(at.model)(f"diffusion_model.{name}")
    assert found_weight is not None and torch.allclose(found_weight, weight)
    found = velocity(at.load(weights=tensors).model, "z_image")
    velocity(at.model, "z_image")
    with computed(layer, weight):
        without = velocity(at.model, "z_image")
    with computed(layer, weight + difference):
        effect = velocity(at.model, "z_image") - without
    assert float((found - without - effect).norm() / effect.norm()) < KEPT


def test_a_small_layer_of_a_dynamic_patcher_gets_a_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a patcher gives layers of up to 16 KiB no weight functions; this one has 16.1 KiB."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.files import host_weights

    at = stage_of("sd3", "fp8_e4m3fn", tmp_path, pinned=True)
    name = f"diffusion_model.{product(small('sd3'))[0]}"
    for dynamic, limit, patched in ((True, 16 * 1024, False), (True, 32 * 1024, True), (False, 32 * 1024, False)):
        monkeypatch.setattr(type(at.model), "is_dynamic", lambda self, dynamic=dynamic: dynamic, raising=False)
        monkeypatch.setattr(host_weights, "LOADED_WHOLE", limit)
        model = at.load(weights=small("sd3")).model
        assert (name in model.patches) == patched and (name in model.weight_wrapper_patches) != patched


def test_a_layer_that_takes_nothing_in_its_forward_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned_host: bool, inference: None
) -> None:
    """Layer of a pack with an unknown quantised format."""
    at = stage_of("sd3", "fp8_e4m3fn", tmp_path, pinned_host)
    name, _ = product(small("sd3"))
    layer = at.model.model.get_submodule(f"diffusion_model.{name.removesuffix('.weight')}")

    class Foreign(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = layer.weight, layer.bias

    parent = at.model.model.get_submodule(f"diffusion_model.{name.removesuffix('.weight').rpartition('.')[0]}")
    monkeypatch.setitem(parent._modules, name.split(".")[-2], Foreign())
    with pytest.raises(CheckpointError, match=rf"'diffusion_model.{name}' .* quantised .*Foreign.*fp16 or bf16"):
        at.load(weights=small("sd3"))


def test_fp8_multiplication_is_refused_in_words() -> None:
    """Hosts with it hand the weight over in fp8."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.host_weights import AddedInForward

    with pytest.raises(TypeError, match="without --fast fp8_matrix_mult"):
        AddedInForward(torch.ones(2, 2), None, 1.0)(torch.ones(2, 2).to(FP8))
