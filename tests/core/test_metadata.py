"""Metadata of the pack's files: written, read back, and refused where it is unknown."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfyui_controlnext.controlnext_core.checkpoint import CheckpointError, Header, peek, save
from comfyui_controlnext.controlnext_core.families import FAMILIES
from comfyui_controlnext.controlnext_core.metadata import ControlMetadata, read_metadata, write_metadata
from comfyui_controlnext.controlnext_core.specs import SPECS, with_normalization


def header(**metadata: str) -> Header:
    return Header(Path("a file.safetensors"), {}, {}, {f"controlnext.{key}": value for key, value in metadata.items()})


@pytest.mark.parametrize("name", SPECS)
def test_what_is_written_is_read_back_from_a_file(name: str, tmp_path: Path) -> None:
    spec = with_normalization(SPECS[name], "paper")
    metadata = write_metadata(
        spec,
        "My control \u00e4",
        gain=0.1 + 0.2,
        weights_kind="difference",
        weights_file="unet.safetensors",
    )
    metadata |= {"controlnext.sources": "encoder: a.safetensors; seed: 7"}
    found = read_metadata(peek(save(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, metadata)))
    assert found == ControlMetadata(
        spec=name,
        gain=0.1 + 0.2,
        normalization="paper",
        weights_kind="difference",
        weights_file="unet.safetensors",
        sources="encoder: a.safetensors; seed: 7",
    )
    assert metadata["modelspec.title"] == "My control \u00e4"
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"].endswith("/controlnext")
    assert all(isinstance(value, str) for value in metadata.values())


def test_architectures_tell_the_families_apart() -> None:
    by_family = {spec.family: write_metadata(spec, "")["modelspec.architecture"] for spec in SPECS.values()}
    assert len(set(by_family.values())) == len(by_family) == len(FAMILIES) - 1  # SD2.1 has ControlNet-XS alone


def test_what_is_not_said_stays_unsaid() -> None:
    metadata = write_metadata(SPECS["sdxl"], "x")
    assert {key for key in metadata if key.startswith("controlnext.")} == {
        "controlnext.spec",
        "controlnext.normalization",
    }
    assert read_metadata(header()) == ControlMetadata()
    assert read_metadata(header(later_key="unknown")) == ControlMetadata()
    assert read_metadata(Header(Path("x"), {}, {}, {"format": "pt", "spec": "nonsense"})) == ControlMetadata()


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("spec", "sd4", "sd15, sd15_legacy, sdxl"),
        ("spec", "", "sd15, sd15_legacy, sdxl"),
        ("normalization", "Paper", "released, paper, none"),
        ("weights_kind", "delta", "difference, full"),
        ("gain", "strong", "a number"),
        ("gain", "", "a number"),
        ("gain", "nan", "a finite number"),
        ("gain", "inf", "a finite number"),
    ],
)
def test_a_bad_value_is_refused_with_key_value_and_remedy(key: str, value: str, allowed: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_metadata(header(**{key: value}))
    message = str(caught.value)
    assert message.startswith(f"a file.safetensors: its metadata says controlnext.{key}={value!r}")
    assert allowed in message and "Update this node pack, or save the file again." in message


@pytest.mark.parametrize(("text", "value"), [("0.35", 0.35), ("-1", -1.0), ("0", 0.0), ("1e-3", 0.001)])
def test_any_finite_gain_is_taken(text: str, value: float) -> None:
    assert read_metadata(header(gain=text)).gain == value
