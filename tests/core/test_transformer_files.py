"""Files of controls for transformers: recognised by their names, written, read back, exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.controlnext_core.checkpoint import Header
from comfyui_controlnext.controlnext_core.control_files import LORA_FILE, write_control, write_host_control
from comfyui_controlnext.controlnext_core.detection import ControlFile, DetectionError, choose_spec, read_control_file
from comfyui_controlnext.controlnext_core.low_rank import LowRank, from_lora, read_differences, whole
from comfyui_controlnext.controlnext_core.specs import SPECS, Family, Spec, with_trained_gain
from comfyui_controlnext.tests.references import reference_controlnext as released
from comfyui_controlnext.tests.references import reference_transformers as reference
from torch import Tensor

WIDTH, RANK = 48, 2
NAMES = ("joint_blocks.0.x_block.attn.proj.weight", "joint_blocks.1.x_block.attn.proj.weight")
FUSED, ROWS = "joint_blocks.1.x_block.attn.qkv.weight", (0, WIDTH, WIDTH)
TRANSFORMERS = [spec for spec in SPECS.values() if spec.on_transformer]


def shape_of(name: str) -> torch.Size | None:
    shapes = dict.fromkeys(NAMES, (WIDTH, WIDTH)) | {FUSED: (3 * WIDTH, WIDTH)}
    shape = shapes.get(name.removeprefix("diffusion_model."))
    return None if shape is None else torch.Size(shape)


def differences() -> dict:
    """Differences: a low-rank one, a full one, and a low-rank one of the keys in a fused weight."""
    numbers = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=numbers)

    return {
        f"diffusion_model.{NAMES[0]}": LowRank(randn(WIDTH, RANK), randn(RANK, WIDTH)),
        f"diffusion_model.{NAMES[1]}": randn(WIDTH, WIDTH),
        (f"diffusion_model.{FUSED}", ROWS): LowRank(randn(WIDTH, RANK + 1), randn(RANK + 1, WIDTH)),
    }


def encoder(build: str = "SD15-T") -> dict[str, Tensor]:
    return released.random_weights(build, out=WIDTH)


def write(folder: Path, layout: str = "single", spec: Spec = SPECS["sd3"], changes: dict | None = None) -> ControlFile:
    given = differences() if changes is None else changes
    facts = {"controlnext.sources": "a test"}
    path = write_host_control(
        folder / "my \u00e4 control",
        encoder(reference.FAMILIES[spec.name].build),
        given,
        spec,
        layout,
        torch.float32,
        facts,
        shape_of,
    )
    return read_control_file(checkpoint.peek(path))


@pytest.mark.parametrize("spec", TRANSFORMERS, ids=lambda spec: spec.name)
def test_a_file_is_what_was_written(spec: Spec, tmp_path: Path) -> None:
    file = write(tmp_path, spec=with_trained_gain(spec, 0.4))
    assert file.candidates == [spec] and choose_spec(file, spec.family) is spec
    assert file.out_channels == WIDTH and file.host_names
    assert (file.metadata.weights_kind, file.metadata.gain, file.metadata.slices) == ("low_rank", 0.4, {FUSED: ROWS})
    stored = file.header.metadata
    assert stored["controlnext.family"] == spec.family.value
    assert stored["controlnext.site"] == "after the first joint block" and stored["controlnext.rank"] == str(RANK + 1)
    loaded = checkpoint.load(file.header.path)
    assert f"base.{NAMES[0]}.up" in loaded and "controlnext.mid_convs.1.weight" in loaded
    found = {name: loaded[kept] for name, kept in file.weights.items()}
    again = read_differences(found, file.metadata.slices, shape_of, "x")
    assert again.keys() == differences().keys()
    assert all(torch.equal(whole(again[key]), whole(difference)) for key, difference in differences().items())
    assert all(
        torch.equal(loaded[kept], encoder(reference.FAMILIES[spec.name].build)[name])
        for name, kept in file.encoder.items()
    )


def test_whole_differences_alone_are_no_low_rank(tmp_path: Path) -> None:
    key = f"diffusion_model.{NAMES[1]}"
    file = write(tmp_path, changes={key: differences()[key]})
    assert file.metadata.weights_kind == "difference" and "controlnext.rank" not in file.header.metadata
    assert file.weights == {NAMES[1]: f"base.{NAMES[1]}"}


def test_an_encoder_alone_has_no_prefix(tmp_path: Path) -> None:
    file = write(tmp_path, changes={})
    assert "mid_convs.1.weight" in file.header.shapes and not file.weights and file.metadata.weights_kind is None


def test_the_lora_layout_is_an_encoder_beside_a_lora(tmp_path: Path) -> None:
    file = write(tmp_path, "lora")
    assert file.header.path.name == "controlnet.safetensors" and not file.weights
    assert file.metadata.weights_file == LORA_FILE and file.metadata.slices == {}
    lora = checkpoint.load(file.header.path.with_name(LORA_FILE))
    up, down = (lora[f"diffusion_model.{NAMES[0].removesuffix('.weight')}.lora_{x}.weight"] for x in "BA")
    expected = differences()[f"diffusion_model.{NAMES[0]}"]
    assert torch.equal(up, expected.up) and torch.equal(down, expected.down)
    fused = read_differences(from_lora(lora, shape_of), {}, shape_of, "x")[f"diffusion_model.{FUSED}"]
    assert not whole(fused)[:WIDTH].any() and not whole(fused)[2 * WIDTH :].any()


def test_the_published_layout_is_refused_for_transformers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="published .* none for SD3.*Choose single, or lora"):
        write(tmp_path, "published")
    with pytest.raises(ValueError, match="published .* none for SD3"):
        write_control(tmp_path / "x", encoder(), {}, SPECS["sd3"], "published", torch.float32, {})


def header(width: int, metadata: dict[str, str] | None = None) -> Header:
    shapes = released.shapes("SD15-T", out=width)
    return Header(Path("some file.safetensors"), shapes, dict.fromkeys(shapes, "F32"), metadata or {})


def test_without_metadata_the_width_rules_unets_or_transformers_out_and_the_base_decides() -> None:
    wide = read_control_file(header(1536))
    assert choose_spec(wide, Family.SD3).name == "sd3"
    narrow = read_control_file(header(320))
    assert not any(spec.on_transformer for spec in narrow.candidates)
    with pytest.raises(DetectionError, match="is a control for SD1.5 / SDXL / SVD .* model is SD3"):
        choose_spec(narrow, Family.SD3)


def test_a_wrong_family_is_named() -> None:
    file = read_control_file(header(1536, {"controlnext.spec": "sd3"}))
    with pytest.raises(DetectionError, match=r"is a control for SD3 \(sd3\), but the connected model is SDXL"):
        choose_spec(file, Family.SDXL)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("site", "after the last block", "'after the first joint block' for sd3 is understood"),
        ("slices", "[1, 2]", "a JSON object of name"),
        ("slices", '{"a": [1, 2]}', "a JSON object of name"),
        ("slices", '{"a": ["b", 2, 3]}', "a JSON object of name"),
        ("slices", "{", "a JSON object of name"),
    ],
)
def test_metadata_that_is_not_understood_is_named(key: str, value: str, words: str) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=words):
        read_control_file(header(1536, {"controlnext.spec": "sd3", f"controlnext.{key}": value}))
