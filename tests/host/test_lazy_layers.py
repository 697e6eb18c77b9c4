"""Host with its dynamic memory manager on: its layers have no weights until a file is loaded, the pack's are whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.checkpoint import load, save
from comfyui_controlnext.tests.fixtures.lazy_layers import lazy_layers
from comfyui_controlnext.tests.fixtures.sampling_fixtures import Studio, picture, relative
from comfyui_controlnext.tests.fixtures.training_fixtures import base_of, drawn, host_weights, same, small, train_in
from comfyui_controlnext.tools import tiny_models
from torch import nn

pytestmark = pytest.mark.comfy

RECIPE = Path(__file__).parents[2] / "controlnext_training" / "recipes" / "tiny.toml"


@pytest.fixture
def lazy() -> Iterator[None]:
    with lazy_layers():
        yield


@pytest.fixture(scope="module")
def lazy_base(loaded_studio: Studio, tiny: Any) -> Studio:
    """Studio with its checkpoint loaded once more, into lazy layers."""
    import comfy.sd

    path = tiny.models / "checkpoints" / tiny.names["checkpoint"]
    with torch.inference_mode(), lazy_layers():
        model = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]
        # lazy layers have the file's dtype until the dynamic patcher, which no CPU has, casts them as it loads
        model.model.diffusion_model.to(model.model.get_dtype())
    return replace(loaded_studio, model=model)


def test_the_hosts_own_layers_have_no_weights_until_they_are_loaded(lazy: None) -> None:
    import comfy.ops

    for operations in (comfy.ops.disable_weight_init, comfy.ops.manual_cast):
        layer = operations.Linear(3, 2)
        assert layer.weight is None and layer.bias is None and not layer.state_dict()
        given = {"weight": torch.rand(2, 3), "bias": torch.rand(2)}
        layer.load_state_dict(given)
        assert same(layer.state_dict(), given)
        assert operations.Embedding(3, 2).weight.is_meta


def test_our_layers_are_whole_from_the_start(lazy: None) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.host_layers import Fp32Norms, WholeLayers
    from comfyui_controlnext.controlnext_training.base_model.frozen_layers import operations

    for kind in (WholeLayers, Fp32Norms, operations):
        assert kind.Linear(3, 2).weight.shape == (2, 3) and kind.Linear(3, 2).bias.shape == (2,)
        assert kind.Embedding(3, 2).weight.shape == (3, 2) and not kind.Embedding(3, 2).weight.is_meta
        with pytest.raises(RuntimeError, match="Missing key"):
            kind.Linear(3, 2).load_state_dict({"weight": torch.rand(2, 3)})


def test_the_base_is_the_same_under_lazy_layers(lazy_base: Studio, loaded_studio: Studio) -> None:
    assert same(host_weights(lazy_base.model), host_weights(loaded_studio.model))


def control_of(studio: Studio, folder: Path, kind: str) -> Any:
    """Control of that kind, loaded for this base."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

    if not kind.startswith("xs"):
        return studio.load(kind_file(folder, kind)).control
    path = tiny_models.make_controlnet_xs(folder / f"{kind}.safetensors", own_time=True)
    return load_controlnet_xs(path).control


def kind_file(folder: Path, kind: str) -> Path:
    return tiny_models.make_controlnext(folder / f"{kind}.safetensors", kind)


@pytest.mark.parametrize("kind", ["gen2", "xs"])
def test_both_doors_give_the_same_bits_and_those_of_whole_layers(
    studio: Studio, lazy_base: Studio, tmp_path: Path, kind: str
) -> None:
    expected = studio.sample(*door(studio, control_of(studio, tmp_path, kind)))
    studio.cache.clear()
    with lazy_layers():
        control = control_of(lazy_base, tmp_path, kind)
        by_stock = lazy_base.sample(*door(lazy_base, control))
        by_ours = lazy_base.sample(lazy_base.ours(lazy_base.model, control, picture()))
        plain = lazy_base.sample()
    assert torch.equal(by_stock, by_ours) and torch.equal(by_stock, expected)
    assert relative(by_stock, plain) > 0.05


def door(studio: Studio, control: Any) -> tuple[Any, Any, Any]:
    """Inputs of the sampler after the stock Apply node."""
    return studio.model, *studio.stock(control, picture())


@pytest.mark.parametrize("wrong", ["missing", "unexpected", "misshapen"])
def test_a_file_of_another_network_is_refused_as_ever(studio: Studio, lazy: None, tmp_path: Path, wrong: str) -> None:
    tensors = load(kind_file(tmp_path, "gen2"))
    name = next(name for name in tensors if name.endswith("time_emb_proj.weight"))
    if wrong == "missing":
        del tensors[name]
    elif wrong == "unexpected":
        tensors[name.replace("weight", "extra")] = torch.zeros(3)
    else:
        tensors[name] = tensors[name][:, :-1].clone()
    path = save(tmp_path / "wrong.safetensors", tensors, {})
    with pytest.raises(ValueError, match="wrong.safetensors"):
        studio.load(path)


def test_the_trainers_unet_has_every_weight(lazy_base: Studio, lazy: None) -> None:
    from comfyui_controlnext.controlnext_training.base_model.trainable_copy import training_unet

    unet = training_unet(lazy_base.model, torch.float32, torch.device("cpu"))
    linear = [module for module in unet.modules() if isinstance(module, nn.Linear)]
    assert len(linear) > 30 and all(module.weight is not None for module in linear)
    assert same(unet.state_dict(), host_weights(lazy_base.model))


@pytest.mark.parametrize(("variant", "steps"), [("sd15", 10), ("xs", 2)])
def test_steps_of_the_tiny_recipe_end_and_their_file_loads(
    lazy_base: Studio, lazy: None, tmp_path: Path, variant: str, steps: int
) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_controlnext
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs
    from comfyui_controlnext.controlnext_training.config_files import read_recipe

    keys = ("trainable", "gain", "optimizer", "learning_rate", "beta2", "schedule", "min_snr_gamma", "caption_dropout")
    recipe = read_recipe(RECIPE)
    config = small(**{key: recipe[key] for key in keys}, variant=variant, steps=steps)
    path = train_in(tmp_path, base_of(lazy_base), config, data=drawn())
    if variant == "xs":
        control = load_controlnet_xs(path).control
    else:
        control = load_controlnext(lazy_base.model, path).control
    trained = lazy_base.sample(*door(lazy_base, control))
    assert bool(trained.isfinite().all()) and relative(trained, lazy_base.sample()) > 1e-6


def test_our_networks_are_in_the_patcher_that_the_host_uses_for_its_own(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_patcher

    class Dynamic(comfy.model_patcher.ModelPatcher):
        pass

    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Dynamic, raising=False)
    for kind in ("gen2", "xs"):
        assert type(control_of(studio, tmp_path, kind).get_models()[-1]) is Dynamic
    monkeypatch.delattr(comfy.model_patcher, "CoreModelPatcher")
    assert type(control_of(studio, tmp_path, "gen2").get_models()[-1]) is comfy.model_patcher.ModelPatcher
