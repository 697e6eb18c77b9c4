"""Conversion of ControlNet-XS files between the two formats: functions, command line and nodes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint, xs_convert
from comfyui_controlnext.controlnext_core.detection import DetectionError
from comfyui_controlnext.controlnext_core.xs_detection import read_xs_file
from comfyui_controlnext.controlnext_core.xs_key_maps import DIFFUSERS, OFFICIAL
from comfyui_controlnext.tests.fixtures.lazy_layers import EITHER_WAY
from comfyui_controlnext.tests.fixtures.xs_fixtures import SDXL_LIKE, make_file, shape_of
from comfyui_controlnext.tools import tiny_models
from comfyui_controlnext.tools.cli import main

WIDTHS = (22, 24, 32)


@pytest.fixture
def official(tmp_path: Path) -> Path:
    shape = shape_of(SDXL_LIKE, WIDTHS, own_time=True, text=2048)
    return make_file(tmp_path / "official.safetensors", shape, heads=(1, 2, 4))


def same(one: Path, other: Path) -> bool:
    a, b = checkpoint.load(one), checkpoint.load(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_there_and_back_is_the_same_file(official: Path, tmp_path: Path) -> None:
    adapter = xs_convert.convert(official, tmp_path / "a" / "adapter.safetensors", "xs_diffusers")
    back = xs_convert.convert(adapter, tmp_path / "back.safetensors", "xs_official")
    files = [read_xs_file(checkpoint.peek(path)) for path in (official, adapter, back)]
    assert [file.format for file in files] == [OFFICIAL, DIFFUSERS, OFFICIAL]
    assert same(official, back)
    assert not same(official, adapter)
    configs = [file.config() for file in files]
    assert configs[0] == configs[1] == configs[2]  # heads and norm rule went along
    assert {file.heads()[-1] for file in files} == {4}


def test_an_adapter_gets_the_configuration_that_diffusers_needs(official: Path, tmp_path: Path) -> None:
    xs_convert.convert(official, tmp_path / "a" / "adapter.safetensors", "xs_diffusers")
    config = json.loads((tmp_path / "a" / "config.json").read_text("utf-8"))
    assert config["_class_name"] == "ControlNetXSAdapter"
    assert config["block_out_channels"] == list(WIDTHS)
    assert config["base_block_out_channels"] == [32, 64, 64]
    assert config["num_attention_heads"] == [1, 2, 4]
    assert config["transformer_layers_per_block"] == [1, 1, 2]
    assert config["learn_time_embedding"] is True
    assert not (tmp_path / "config.json").exists()


def test_an_adapter_that_diffusers_cannot_build_gets_none(tmp_path: Path) -> None:
    one_resnet = tiny_models.make_controlnet_xs(tmp_path / "tiny.safetensors")
    adapter = xs_convert.convert(one_resnet, tmp_path / "adapter.safetensors", "xs_diffusers")
    assert not (tmp_path / "config.json").exists()
    assert read_xs_file(checkpoint.peek(adapter)).format == DIFFUSERS


def test_a_ckpt_with_a_state_dict_is_read(tmp_path: Path) -> None:
    ckpt = tiny_models.make_controlnet_xs(tmp_path / "tiny.ckpt")
    dense = xs_convert.convert(ckpt, tmp_path / "tiny.safetensors", "xs_official")
    assert same(ckpt, dense)


def test_the_command_line_converts(official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "with space" / "adapter.safetensors"
    assert main(["convert", str(official), str(target), "--layout", "xs_diffusers"]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert read_xs_file(checkpoint.peek(target)).format == DIFFUSERS
    lora = tiny_models.make_lora(tmp_path / "lora.safetensors")
    assert main(["convert", str(lora), str(target), "--layout", "xs_official"]) == 1
    assert "is not a ControlNet-XS. It is a LoRA" in capsys.readouterr().err


def test_what_is_no_controlnet_xs_is_not_converted(tmp_path: Path) -> None:
    encoder = tiny_models.make_controlnext(tmp_path / "next.safetensors", "gen2")
    with pytest.raises(DetectionError, match="It is a ControlNeXt"):
        xs_convert.convert(encoder, tmp_path / "out.safetensors", "xs_official")
    with pytest.raises(ValueError, match="layout: 'published' is unknown"):
        xs_convert.convert(encoder, tmp_path / "out.safetensors", "published")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run ControlNeXtSave with a temporary output folder of the host; returns the path."""
    import folder_paths
    from comfyui_controlnext.nodes.loaders import ControlNeXtSave

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(ControlNeXtSave, "hidden", SimpleNamespace(unique_id=None))  # what the executor gives a node

    def save(control: Any, layout: str, dtype: str = "fp32") -> Path:
        return Path(ControlNeXtSave.execute(control, "controlnext/xs", None, layout, dtype)[0])

    return save


@EITHER_WAY
@pytest.mark.comfy
@torch.inference_mode()
def test_the_save_node_writes_both_layouts_and_the_loader_reads_them(official: Path, saved: Any) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

    control = load_controlnet_xs(official).control
    before = control.loaded.net.state_dict()
    for layout in ("single", "xs_official", "xs_diffusers"):
        path = saved(control, layout)
        again = load_controlnet_xs(path).control.loaded
        assert again.file.format == (DIFFUSERS if layout == "xs_diffusers" else OFFICIAL)
        assert all(torch.equal(before[name], tensor) for name, tensor in again.net.state_dict().items())
        assert again.net.config == control.loaded.net.config
    half = load_controlnet_xs(saved(control, "single", "fp16")).control.loaded
    assert next(half.net.parameters()).dtype == torch.float16
    with pytest.raises(ValueError, match="layout: published is for ControlNeXt"):
        saved(control, "published")


@EITHER_WAY
@pytest.mark.comfy
@torch.inference_mode()
def test_an_adapters_own_configuration_gives_its_heads(official: Path, tmp_path: Path) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

    adapter = xs_convert.convert(official, tmp_path / "a" / "adapter.safetensors", "xs_diffusers")
    bare = checkpoint.save(tmp_path / "b" / "adapter.safetensors", checkpoint.load(adapter), {})
    assert load_controlnet_xs(bare).control.loaded.heads[-1] == 1  # SDXL's rule
    (bare.parent / "config.json").write_bytes((adapter.parent / "config.json").read_bytes())
    assert load_controlnet_xs(bare).control.loaded.heads[-1] == 4
    (bare.parent / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "num_attention_heads": 2}')
    assert load_controlnet_xs(bare).control.loaded.heads[-1] == 1


@EITHER_WAY
@pytest.mark.comfy
def test_inspect_tells_size_base_type_time_and_heads(official: Path, tmp_path: Path) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.inspecting import inspect_file

    words = inspect_file(official)
    for part in (
        "ControlNet-XS for SDXL, a size of its own",
        "type B, official names, channels 22-24-32 beside the base's 32-64",
        "own time embedding: yes",
        "level 1 2x12, level 2 4x8, middle 4x8",
        "norm rule: official",
        "F32",
    ):
        assert part in words
    tiny = tiny_models.make_controlnet_xs(tmp_path / "tiny.safetensors", format="diffusers")
    assert "ControlNet-XS for SD1.5" in inspect_file(tiny)
    assert "norm rule: diffusers" in inspect_file(tiny)
