"""UNet weights of a control on quantised UNets: the effect of differences against the fp32 sum."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comfyui_controlnext.tests.fixtures.quantised_fixtures import WIDE, formats, quantised_unet
from comfyui_controlnext.tests.host.test_transformer_quantised import FORMATS, KEPT, numbers_of
from comfyui_controlnext.tests.host.test_weights_on_host import host_names
from comfyui_controlnext.tools import tiny_models
from safetensors.torch import load_file, save_file
from torch import Tensor

log = logging.getLogger(__name__)
pytestmark = pytest.mark.comfy


@pytest.fixture
def inference() -> Iterator[None]:
    import comfy.model_management

    with torch.inference_mode():
        yield
        comfy.model_management.unload_all_models()


def prediction(model: Any) -> Tensor:
    """Prediction from one forward of a MODEL as the host has loaded it."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    random = torch.Generator().manual_seed(4)
    x, words = (torch.randn(shape, generator=random) for shape in ((1, 4, 8, 8), (1, 77, 768)))
    options = {"cond_or_uncond": [0], "sigmas": torch.tensor([3.0])}
    return model.model.apply_model(x, torch.tensor([3.0]), c_crossattn=words, transformer_options=options)


def small_differences(path: Path) -> dict[str, Tensor]:
    """Differences of 2 % of the weights in published names, beside an encoder; returned by host names."""
    tiny_models.make_controlnext(path / "control.safetensors", "gen2")
    base = {f"diffusion_model.{name}": tensor for name, tensor in tiny_models.unet_tensors("sd15").items()}
    random = torch.Generator().manual_seed(5)
    published, hosts = {}, {}
    for name, host_name in host_names().items():
        weight = base[host_name].float()
        hosts[host_name] = 0.02 * weight.std() * torch.randn(weight.shape, generator=random)
        published[name] = hosts[host_name].clone()
    save_file(published, path / "unet.safetensors")
    assert load_file(path / "unet.safetensors").keys() == host_names().keys()
    return hosts


@pytest.mark.parametrize("kind", FORMATS)
def test_unet_differences_act_as_on_the_same_numbers_in_fp32(
    kind: str, tmp_path: Path, pinned_host: bool, inference: None
) -> None:
    from comfy.model_patcher import ModelPatcher
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_controlnext

    if kind not in formats(pinned_host) or kind in WIDE:
        pytest.skip(f"this host has no {kind}, or the tiny UNet no rows of 256 numbers")
    model = ModelPatcher(quantised_unet("sd15", kind, pinned_host), torch.device("cpu"), torch.device("cpu"))
    hosts = small_differences(tmp_path)
    loaded = load_controlnext(model, tmp_path / "control.safetensors", "auto")
    assert "difference" in loaded.report and "added in each forward as the model is quantised" in loaded.report
    bare, found = prediction(model), prediction(loaded.model)
    assert torch.equal(prediction(model), bare)

    def as_fp32(share: float) -> Tensor:
        with ExitStack() as stack:
            for name in {name.rpartition(".")[0] for name in hosts}:
                layer = model.model.get_submodule(name)
                weight = numbers_of(layer) + share * hosts[f"{name}.weight"]
                bias = layer.bias.float() + share * hosts[f"{name}.bias"]
                layer.forward = lambda x, weight=weight, bias=bias: F.linear(x, weight, bias)
                stack.callback(delattr, layer, "forward")
            return prediction(model)

    without = as_fp32(0.0)
    effect = as_fp32(1.0) - without
    error = float((found - without - effect).norm() / effect.norm())
    own = float((bare - without).norm() / effect.norm())
    log.info("%s: %.1e; the layers' own rounding %.2f", kind, error, own)
    assert error < KEPT
