"""Controls of transformers with offloaded weights, the host's controls and patches, and a Cancel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.sampling_fixtures import REASSOCIATED, picture, relative
from comfyui_controlnext.tests.fixtures.transformer_files import make_vae
from comfyui_controlnext.tests.fixtures.transformer_fixtures import BLOCKS, NARROW, filled, narrow_model
from comfyui_controlnext.tests.fixtures.transformer_stage import TransformerStage, in_turn
from comfyui_controlnext.tests.host.test_interruptions import doors_of, entries, lay, on_the_model
from comfyui_controlnext.tests.host.test_transformer_weights import factors, quantised_stage
from comfyui_controlnext.tests.references import reference_transformers as reference
from torch import Tensor, nn

pytestmark = pytest.mark.comfy


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make the host load a tenth of each model's weights. Returns the number of layers it left out, for each load."""
    from comfy.model_patcher import ModelPatcher

    load, left = ModelPatcher.load, []

    def less(self: Any, device_to: Any = None, lowvram_model_memory: int = 0, **settings: Any) -> Any:
        result = load(self, device_to, lowvram_model_memory=self.model_size() // 10, **{**settings, "full_load": False})
        left.append(sum(hasattr(m, "prev_comfy_cast_weights") for m in self.model.modules()))
        return result

    monkeypatch.setattr(ModelPatcher, "load", less)
    return left


@in_turn("stored", ["plain", "quantised"])
def test_weights_that_stay_behind_are_changed_as_they_are_used(
    family: str, stored: str, stage: Any, tmp_path: Path, little_memory: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partial loading, as on a small GPU: the host patches a weight for each forward."""
    import comfy.model_management

    at = stage(family) if stored == "plain" else quantised_stage(family, tmp_path)
    loaded = at.load(weights=factors(family))
    controlled = at.ours(loaded.control, picture(), model=loaded.model)
    comfy.model_management.unload_all_models()
    partly = at.sample(controlled), at.sample(conds=at.stock(loaded.control, picture()), model=loaded.model)
    assert little_memory and all(little_memory), "the host loaded something whole"
    assert torch.equal(*partly)
    comfy.model_management.unload_all_models()
    monkeypatch.undo()
    assert relative(partly[0], at.sample(controlled)) < REASSOCIATED
    without = at.sample(at.ours(loaded.control, picture()))
    assert relative(partly[0], without) > 1e-3
    comfy.model_management.unload_all_models()


def fill(network: nn.Module) -> nn.Module:
    for name, parameter in [*network.named_parameters(), *network.named_buffers()]:
        if parameter.is_floating_point() and parameter.numel():
            parameter.data.copy_(filled(name, parameter.shape, seed=3))
    return network.eval().requires_grad_(False)


def stock_control(family: str) -> Any:
    """ControlNet of the host for a family, as narrow as its base; its hint is a latent."""
    import comfy.cldm.mmdit
    import comfy.controlnet
    import comfy.latent_formats
    import comfy.ldm.flux.controlnet
    import comfy.ldm.qwen_image.controlnet
    import comfy.ops

    kind, latents, more = {
        "sd3": (comfy.cldm.mmdit.ControlNet, comfy.latent_formats.SD3, {"num_blocks": 1}),
        "flux": (comfy.ldm.flux.controlnet.ControlNetFlux, comfy.latent_formats.Flux, {"latent_input": True}),
        "qwen_image": (
            comfy.ldm.qwen_image.controlnet.QwenImageControlNetModel,
            comfy.latent_formats.Wan21,
            {"extra_condition_channels": 0},
        ),
    }[family]
    base = narrow_model(family)
    left_out = ("image_model", "dtype")
    config = {name: value for name, value in base.model_config.unet_config.items() if name not in left_out}
    if family == "flux":
        more["control_latent_channels"] = 16
    network = kind(**(config | more), dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    return comfy.controlnet.ControlNet(
        fill(network),
        compression_ratio=1,
        latent_format=latents(),
        load_device=torch.device("cpu"),
        extra_conds=["y", "guidance"] if family == "flux" else ["y"] if family == "sd3" else [],
    )


@pytest.mark.parametrize("family", ["sd3", "flux", "qwen_image"])
def test_a_stock_controlnet_beside_ours_in_any_order(family: str, stage: Any, tmp_path: Path) -> None:
    """ControlNets of the host, for families that have one: they are added after the block, this pack's control inside
    its result.
    """
    import comfy.sd
    import comfy.utils

    import nodes as host_nodes

    at = stage(family)
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(make_vae(tmp_path / "vae.safetensors", family))))
    control, stock = at.load().control, stock_control(family)
    apply = host_nodes.ControlNetApplyAdvanced().apply_controlnet

    def both(order: str, ours: float = 1.0) -> Tensor:
        conds = at.positive, at.negative
        for which in order:
            if which == "o":
                conds = apply(*conds, control, picture(), ours, 0.0, 1.0)
            else:
                conds = apply(*conds, stock, picture(3), 0.7, 0.0, 1.0, vae)
        return at.sample(conds=conds)

    together, stock_alone, plain = both("os"), both("s"), at.sample()
    assert torch.equal(both("so"), together)
    door = at.ours(control, picture())
    conds = apply(at.positive, at.negative, stock, picture(3), 0.7, 0.0, 1.0, vae)
    assert torch.equal(at.sample(door, conds), together)
    assert torch.equal(both("os", ours=0.0), stock_alone)
    for other in (stock_alone, both("o"), plain):
        assert relative(together, other) > 0.003
    assert torch.equal(at.sample(), plain)


def diffsynth(tmp_path: Path) -> Callable[[Any], Any]:
    """Node of the host for a DiffSynth control of Qwen-Image, as narrow as its base."""
    import comfy.ops
    import comfy.sd
    import comfy.utils
    from comfy.model_patcher import ModelPatcher
    from comfy_extras.nodes_model_patch import QwenImageBlockWiseControlNet, QwenImageDiffsynthControlnet

    network = QwenImageBlockWiseControlNet(
        BLOCKS, dim=NARROW["qwen_image"].width, device="cpu", dtype=torch.float32, operations=comfy.ops.manual_cast
    )
    patch = ModelPatcher(fill(network.float()), torch.device("cpu"), torch.device("cpu"))
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(make_vae(tmp_path / "vae.safetensors", "qwen_image"))))
    node = QwenImageDiffsynthControlnet()
    return lambda model: node.diffsynth_controlnet(model, patch, vae, picture(3), strength=0.3)[0]


def fun(tmp_path: Path) -> Callable[[Any], Any]:
    """Node of the host for a Fun control of Z-Image, as narrow as its base; its blocks are spread over 30 layers."""
    import comfy.ldm.lumina.controlnet
    import comfy.ops
    import comfy.sd
    import comfy.utils
    from comfy.model_patcher import ModelPatcher
    from comfy_extras.nodes_model_patch import ZImageFunControlnet

    width, config = NARROW["z_image"].width, narrow_model("z_image").model_config.unet_config
    sizes = {"dim": width, "n_heads": config["n_heads"], "n_kv_heads": config["n_kv_heads"], "multiple_of": 32}
    network = comfy.ldm.lumina.controlnet.ZImage_Control(
        **sizes, ffn_dim_multiplier=1.0, device="cpu", dtype=torch.float32, operations=comfy.ops.manual_cast
    )
    patch = ModelPatcher(fill(network.float()), torch.device("cpu"), torch.device("cpu"))
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(make_vae(tmp_path / "vae.safetensors", "z_image"))))
    node = ZImageFunControlnet()
    return lambda model: node.diffsynth_controlnet(model, patch, vae, image=picture(3), strength=0.3)[0]


PATCHES = {"qwen_image": diffsynth, "z_image": fun}


@pytest.mark.parametrize("family", PATCHES)
def test_controls_that_the_host_loads_as_model_patches_run_beside_ours(
    family: str, stage: Any, tmp_path: Path, pinned_host: bool
) -> None:
    if family == "z_image" and pinned_host:
        pytest.skip("ComfyUI 0.3.75 has no control for Z-Image")
    at, put_on = stage(family), PATCHES[family](tmp_path)
    control, plain = at.load().control, at.sample()
    patched = put_on(at.model)
    theirs = at.sample(patched)
    together = at.sample(at.ours(control, picture(), model=patched))
    assert torch.equal(at.sample(put_on(at.ours(control, picture()))), together)
    assert torch.equal(at.sample(patched, at.stock(control, picture())), together)
    assert torch.equal(at.sample(at.ours(control, picture(), 0.0, 0.0, 1.0, model=patched)), theirs)
    for other in (theirs, at.sample(at.ours(control, picture())), plain):
        assert relative(together, other) > 0.003
    assert torch.equal(at.sample(), plain)


def cancelled_after_the_block(
    patch: pytest.MonkeyPatch, at: TransformerStage, control: Any, error: BaseException
) -> None:
    """Cancel in the second forward, in the last layer: after the block at which the control acts."""
    network = narrow_model(at.family).diffusion_model
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    lay(patch, last, "forward", error, 2)


def cancelled_in_the_block(patch: pytest.MonkeyPatch, at: TransformerStage, control: Any, error: BaseException) -> None:
    lay(patch, reference.FAMILIES[at.family].block(narrow_model(at.family).diffusion_model), "forward", error, 2)


def cancelled_in_the_encoder(
    patch: pytest.MonkeyPatch, at: TransformerStage, control: Any, error: BaseException
) -> None:
    lay(patch, control.get_models()[-1].model, "narrow", error, 2)


CUTS = {
    "after the block": cancelled_after_the_block,
    "in the block": cancelled_in_the_block,
    "in the encoder": cancelled_in_the_encoder,
}


@in_turn("cut", [f"{cut}, {door}" for cut in CUTS for door in ("stock", "ours")])
def test_a_run_that_is_cut_off_leaves_nothing_and_the_next_is_the_same_in_every_bit(
    family: str, cut: str, stage: Any
) -> None:
    import comfy.model_management
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.features import CACHE

    at = stage(family)
    control = at.load().control
    where, door = cut.split(", ")
    if door == "stock":
        model, conds = at.model, at.stock(control, picture())
        used = [cond[0][1]["control"] for cond in conds]
    else:
        model, conds = at.ours(control, picture()), None
        used = [door.control for door in doors_of(model)]
    network = narrow_model(family).diffusion_model
    before, expected = on_the_model(model), at.sample(model, conds)
    for error in (comfy.model_management.InterruptProcessingException(), KeyboardInterrupt(), RuntimeError("a fault")):
        CACHE.clear()
        with pytest.MonkeyPatch.context() as patch:
            CUTS[where](patch, at, control, error)
            with pytest.raises(type(error)):
                at.sample(model, conds)
        assert all(one.run is None for one in used), "hints, masks and features of the run are let go"
        assert on_the_model(model) == before
        assert not any(module._forward_hooks for module in network.modules())
        assert entries(CACHE) == sum(CACHE.used.values())
    assert torch.equal(at.sample(model, conds), expected)
