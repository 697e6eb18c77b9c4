"""Checks before encoding, and files that are mistaken for a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.controlnext_training import optimizers
from comfyui_controlnext.controlnext_training.config import ConfigError
from comfyui_controlnext.tests.fixtures.sampling_fixtures import Studio
from comfyui_controlnext.tests.fixtures.training_fixtures import Watcher, base_of, small, train_in

pytestmark = pytest.mark.comfy


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make prodigy's package appear not installed."""
    source = optimizers.OptimizerSource("no_such_package_of_prodigy", "Prodigy", own_rate=True)
    monkeypatch.setitem(optimizers.OPTIMIZERS, "prodigy", source)


@pytest.mark.usefixtures("no_package")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"trainable": "re:no_such_weight"}, "selects none of the"),
        ({"blocks": "joint.0-3"}, "has no blocks named joint"),
        ({"trainable": "to_out", "blocks": "input.900"}, "selects none of the"),
        ({"init_control": "nowhere.safetensors"}, "init_control: nowhere.safetensors is not a file"),
        ({"init_control": "OTHER"}, "other.safetensors"),
        ({"optimizer": "prodigy", "learning_rate": 1.0, "control_learning_rate": 1.0}, "needs the package"),
        ({"optimizer": "prodigy"}, "Set both to 1"),
    ],
    ids=str,
)
def test_it_is_said_before_anything_is_encoded(
    loaded_studio: Studio, tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    other = checkpoint.save(tmp_path / "other.safetensors", {"a": torch.zeros(2)}, {})
    if settings.get("init_control") == "OTHER":
        settings = {"init_control": str(other)}
    watch = Watcher()
    with pytest.raises(ValueError, match=says):
        train_in(tmp_path, base_of(loaded_studio), small(**settings), watch)
    assert not any(line.startswith("encoding") for line in watch.lines)
    assert not (tmp_path / "runs" / "control").exists(), "no run was begun"


@pytest.mark.parametrize("name", ["base.ckpt", "base.safetensors", "base.png"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(200), r"is a picture \(PNG\)"),
        (b"\n<!DOCTYPE HTML>\n<html><body>404</body></html>", "is a page of the web"),
        (b"<HTML lang=en>", "is a page of the web"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a pointer of git-lfs"),
        (b"some text that is no model", "base.*(cannot be read|is not a model that ComfyUI knows)"),
    ],
    ids=["png", "html", "html in capitals", "pointer", "text"],
)
def test_a_base_that_is_no_model_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    from comfyui_controlnext.controlnext_training.base_model.base_files import load_base

    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as raised:
        load_base(small(base=name), tmp_path)
    assert name in str(raised.value) and (isinstance(raised.value, ConfigError) or b"text" in content)
