"""ControlNet-XS in diffusers: its adapter's names, its norm rule, its numbers, stored and live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint, xs_convert, xs_specs
from comfyui_controlnext.controlnext_core.key_maps import unet_key_map
from comfyui_controlnext.controlnext_core.xs_detection import read_xs_file
from comfyui_controlnext.controlnext_core.xs_key_maps import DIFFUSERS, from_ours
from comfyui_controlnext.models.controlnet_xs import ControlNetXS
from comfyui_controlnext.tests.fixtures.xs_fixtures import Forward
from comfyui_controlnext.tests.golden import make_xs_diffusers as golden
from comfyui_controlnext.tools import tiny_models
from torch import Tensor

PARITY = 1e-4
"""Largest difference to diffusers of outputs with a standard deviation of about 1."""


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    return checkpoint.load(golden.PATH)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Adapter of the golden case as a file: the pack's shapes, diffusers' names, weights by name."""
    shape = xs_specs.design(golden.HOST_CONFIG, own_time=True, widths=golden.WIDTHS)
    heads = xs_specs.heads_of(shape, (golden.HEADS,), "test")
    net = ControlNetXS(xs_specs.build_config(shape, heads, xs_specs.NORM_RULES[DIFFUSERS]), device="meta")
    names = from_ours(net.state_dict(), shape.layout, DIFFUSERS)
    tensors = {
        name: golden.weight("adapter", name, tuple(net.state_dict()[ours].shape)) for ours, name in names.items()
    }
    return checkpoint.save(tmp_path / "adapter.safetensors", tensors, {})


def forward_of(stored: dict[str, Tensor]) -> Forward:
    """Golden case on the host's UNet, whose residual blocks get the epsilon of diffusers' fused model."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel

    config: dict[str, Any] = golden.HOST_CONFIG
    unet = UNetModel(
        image_size=16,
        in_channels=4,
        out_channels=4,
        num_heads=golden.HEADS,
        use_spatial_transformer=True,
        legacy=False,
        num_classes="sequential",
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
        **{key: list(value) if key.startswith("transformer_depth_o") else value for key, value in config.items()},
    ).eval()
    published = unet_key_map(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    unet.load_state_dict({host: golden.weight("unet", name, shapes[host]) for name, host in published.items()})
    for block in unet.modules():
        if isinstance(block, ResBlock):
            block.in_layers[0].eps = block.out_layers[0].eps = 1e-6
    t = torch.full((2,), float(golden.TIMESTEP))
    return Forward(unet, config, stored["x"], t, stored["context"], stored["y"])


def worst(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


@pytest.mark.comfy
@torch.inference_mode()
def test_the_stored_output_of_diffusers_is_met(stored: dict[str, Tensor], adapter: Path) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

    forward = forward_of(stored)
    hint = stored["hint"].float() / 255

    def difference(norm_rule: str, time_mix: float) -> float:
        control = load_controlnet_xs(adapter, norm_rule, str(golden.HEADS)).control.with_options(time_mix=time_mix)
        return worst(forward.run(control.set_cond_hint(hint, golden.SCALE, (0.0, 1.0))), stored["controlled"])

    assert worst(forward.run(), stored["plain"]) < PARITY
    assert worst(stored["plain"], stored["controlled"]) > 0.1
    assert difference("auto", golden.TIME_MIX) < PARITY  # an adapter of a size of its own: diffusers' rule
    assert difference("diffusers", golden.TIME_MIX) < PARITY
    assert difference("official", golden.TIME_MIX) > 10 * PARITY
    assert difference("diffusers", 1.0) > 10 * PARITY


def test_diffusers_still_computes_the_stored_output(stored: dict[str, Tensor]) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed; the stored vectors are checked all the same")
    live = golden.run_diffusers(golden.inputs())
    for name, tensor in live.items():
        assert worst(tensor, stored[name]) < 1e-5, name


@pytest.mark.parametrize("name", tiny_models.RELEASED_XS)
def test_a_released_size_has_the_names_and_shapes_of_an_adapter(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    shapes = tiny_models.xs_shapes(tiny_models.RELEASED_XS[name])
    file = read_xs_file(checkpoint.Header(Path(name), shapes, {}))
    config = xs_convert.adapter_config(file.shape, file.heads())
    assert config is not None
    with torch.device("meta"):
        theirs = diffusers.ControlNetXSAdapter(**{key: v for key, v in config.items() if key != "_class_name"})
    adapter = from_ours(file.names, file.shape.layout, DIFFUSERS)
    found = {adapter[ours]: shapes[released] for ours, released in file.names.items()}
    assert found == {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}


def test_diffusers_opens_what_we_convert(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    shape = xs_specs.design({**golden.HOST_CONFIG, "context_dim": 1024}, own_time=True, widths=golden.WIDTHS)
    heads = xs_specs.heads_of(shape, (2,), "test")
    net = ControlNetXS(xs_specs.build_config(shape, heads, xs_specs.NORM_RULES["official"]))
    source = xs_convert.write(tmp_path / "xs.safetensors", net.state_dict(), shape, heads, "official", "xs_official")
    target = xs_convert.convert(source, tmp_path / "adapter/diffusion_pytorch_model.safetensors", "xs_diffusers")
    opened, report = diffusers.ControlNetXSAdapter.from_pretrained(target.parent, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert opened.config.num_attention_heads == [1, 2, 2]  # the first level has no attention
    back = xs_convert.convert(target, tmp_path / "back.safetensors", "xs_official")
    before, after = checkpoint.load(source), checkpoint.load(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_fused_model_is_reduced_to_the_adapter_in_it(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    adapter = diffusers.ControlNetXSAdapter.from_unet(unet, block_out_channels=[16, 32], learn_time_embedding=True)
    fused = diffusers.UNetControlNetXSModel.from_unet(unet, adapter)
    files = {}
    for name, module in (("adapter", adapter), ("fused", fused)):
        tensors = {key: tensor.clone() for key, tensor in module.state_dict().items()}
        files[name] = read_xs_file(checkpoint.peek(checkpoint.save(tmp_path / f"{name}.safetensors", tensors, {})))
    assert files["fused"].shape == files["adapter"].shape
    assert files["fused"].names.keys() == files["adapter"].names.keys()
    whole, alone = checkpoint.load(tmp_path / "fused.safetensors"), checkpoint.load(tmp_path / "adapter.safetensors")
    for ours, name in files["fused"].names.items():
        assert torch.equal(whole[name], alone[files["adapter"].names[ours]])
