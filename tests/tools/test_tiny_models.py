"""Tiny model files without the host: names, sizes, contents. With the host's loaders: test_tiny_models_in_host.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comfyui_controlnext.tests.fixtures.wrong_files import CODE_MARKER, make_wrong_files
from comfyui_controlnext.tools import tiny_models as tm
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

MEGABYTE = 1_000_000
# build: (keys, parameters, bytes of the fp32 file; None where none was published that way)
PUBLISHED_ENCODERS = {
    "sd15_legacy": (51, 5_352_327, 21_414_004),
    "sdxl_june": (55, 5_353_351, None),
    "sdxl_july": (64, 5_610_176, None),
    "svd_v1": (65, 5_610_177, None),
    "gen2": (52, 3_526_400, 14_110_296),
}
ALL_MAKERS: dict[str, Callable[[Path], Path]] = {
    "sd15": tm.make_sd15,
    "sd15_inpaint": tm.make_sd15_inpaint,
    "sd15_deep": tm.make_sd15_deep,
    "sd15_full": tm.make_sd15_full_unet,
    "sdxl": tm.make_sdxl,
    "sdxl_deep": tm.make_sdxl_deep,
    "svd": tm.make_svd,
    "svd_deep": tm.make_svd_deep,
}


def read(path: Path) -> dict[str, Tensor]:
    """Tensors of a torch file."""
    content = torch.load(path, weights_only=True)
    return content.get("state_dict", content)


@pytest.mark.parametrize("name", ALL_MAKERS)
def test_a_checkpoint_is_small_complete_and_finite(name: str, tmp_path: Path) -> None:
    path = ALL_MAKERS[name](tmp_path / "model.ckpt")
    tensors = read(path)
    prefix = "" if name == "sd15_full" else "model.diffusion_model."
    found = {key.removeprefix(prefix): tuple(value.shape) for key, value in tensors.items() if prefix in key}

    assert path.stat().st_size < 5 * MEGABYTE
    assert {key: found[key] for key in tm.unet_shapes(tm.LAYOUTS[name])} == tm.unet_shapes(tm.LAYOUTS[name])
    stored = {value.untyped_storage().data_ptr(): value for value in tensors.values()}  # what is shared counts once
    for value in stored.values():
        assert bool(torch.tensor([], dtype=value.dtype).set_(value.untyped_storage()).isfinite().all())


def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not(tmp_path: Path) -> None:
    first, again, other = (
        tm.make_sd15(tmp_path / name, seed).read_bytes() for name, seed in (("a.ckpt", 0), ("b.ckpt", 0), ("c.ckpt", 1))
    )
    assert first == again
    assert first != other


def test_layers_of_one_shape_hold_different_numbers() -> None:
    tensors = tm.unet_tensors("sd15")
    weights = [value for name, value in tensors.items() if name.endswith((".to_q.weight", ".to_out.0.weight"))]
    correlation = torch.corrcoef(
        torch.stack([weight.float().flatten() for weight in weights if weight.numel() == 320**2])
    )
    assert len(correlation) > 10
    assert float((correlation - torch.eye(len(correlation))).abs().max()) < 0.1


@pytest.mark.parametrize("build", PUBLISHED_ENCODERS)
def test_an_encoder_has_the_published_size(build: str, tmp_path: Path) -> None:
    path = tm.make_controlnext(tmp_path / "controlnet.safetensors", build)
    tensors = load_file(path)
    keys, parameters, size = PUBLISHED_ENCODERS[build]

    assert (len(tensors), sum(value.numel() for value in tensors.values())) == (keys, parameters)
    assert size in (None, path.stat().st_size)  # names and shapes decide the header's length too


def test_an_encoder_starts_as_torch_would_start_it(tmp_path: Path) -> None:
    tensors = load_file(tm.make_controlnext(tmp_path / "controlnet.safetensors", "svd_v1"))
    reference = torch.nn.Conv2d(256, 256, 3).weight.detach()
    ours = tensors["mid_convs.0.0.weight"]

    assert float(ours.std() / reference.std()) == pytest.approx(1, abs=0.01)
    assert float(ours.abs().max()) <= (9 * 256) ** -0.5
    assert bool((tensors["down_res.0.norm1.weight"] == 1).all())
    assert bool((tensors["down_res.0.norm1.bias"] == 0).all())
    assert tensors["scale"].shape == () and float(tensors["scale"]) == 1


def test_an_encoder_can_be_half_a_bin_or_of_another_width(tmp_path: Path) -> None:
    tensors = read(tm.make_controlnext(tmp_path / "controlnet.bin", "gen2", torch.float16, out_channels=64))
    assert tensors["mid_convs.1.weight"].shape == (64, 256, 1, 1)
    assert {value.dtype for value in tensors.values()} == {torch.float16}


def test_an_unknown_build_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'sd3' is not a published encoder; use one of sd15_legacy"):
        tm.make_controlnext(tmp_path / "controlnet.safetensors", "sd3")


def test_a_full_weights_file_is_base_plus_difference(tmp_path: Path) -> None:
    base = tm.unet_tensors("sd15")
    difference = load_file(tm.make_unet_difference(tmp_path / "a.safetensors", dtype=torch.float32))
    full = load_file(tm.make_unet_difference(tmp_path / "b.safetensors", kind="full", dtype=torch.float32, base=base))
    name = "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0.weight"
    host_name = "output_blocks.1.1.transformer_blocks.0.attn2.to_out.0.weight"

    assert len(difference) == len(full) == 2 * 2 * len(tm.attention_layers(tm.LAYOUTS["sd15"]))
    torch.testing.assert_close(full[name], base[host_name].float() + difference[name], rtol=0, atol=0)
    with pytest.raises(ValueError, match="use 'difference', or 'full' together with base"):
        tm.make_unet_difference(tmp_path / "c.safetensors", kind="full")


def test_the_cross_attention_rule_is_half_of_the_other(tmp_path: Path) -> None:
    every = load_file(tm.make_unet_difference(tmp_path / "a.safetensors", rule="to_out"))
    cross = load_file(tm.make_unet_difference(tmp_path / "b.safetensors", rule="attn2_to_out"))
    assert set(cross) == {name for name in every if ".attn2." in name}
    assert 2 * len(cross) == len(every)


def test_demo_models_are_made_once_and_remade_when_the_makers_change(tmp_path: Path) -> None:
    names = tm.make_demo_models(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert names["checkpoint"] == "tiny_sd15.ckpt"
    assert names["control"] == os.path.join("demo", "controlnet.safetensors")
    assert sum(path.stat().st_size for path in files) < 25 * MEGABYTE

    for path in files:
        os.utime(path, (1, 1))
    lost = tmp_path / "models" / "loras" / names["lora"]
    lost.unlink()
    assert tm.make_demo_models(tmp_path) == names
    weights = tmp_path / "models" / "checkpoints" / names["checkpoint"]
    assert lost.is_file() and weights.stat().st_mtime == 1

    (tmp_path / "models" / "tiny_models.version").write_text("older")
    tm.make_demo_models(tmp_path)
    assert weights.stat().st_mtime > 1


def test_wrong_files_are_what_they_claim(tmp_path: Path) -> None:
    files = make_wrong_files(tmp_path)
    marker = tmp_path / CODE_MARKER
    assert files["folder"].is_dir() and files["empty"].stat().st_size == 0
    for kind in ("truncated", "header_overflow", "header_not_json", "empty", "text"):
        with pytest.raises(SafetensorError), safe_open(files[kind], "pt"):
            pass

    with pytest.raises(Exception, match="weights_only|Unsupported"):
        torch.load(files["pickle_with_code"], weights_only=True)
    assert not marker.exists()
    torch.load(files["pickle_with_code"], weights_only=False)  # this is the danger; here it only makes a folder
    assert marker.is_dir()
