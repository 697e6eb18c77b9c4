"""Messages name the right widget, once, and the file relative to the host's folders."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.checkpoint import CheckpointError
from comfyui_controlnext.controlnext_training.config import ConfigError
from comfyui_controlnext.controlnext_training.config_files import read_recipe
from comfyui_controlnext.tools import bench, cli
from comfyui_controlnext.tools.tiny_models import make_controlnext, make_unet_difference
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer

ROOT = Path(__file__).resolve().parents[2]


def bundle(folder: Path) -> Path:
    """Control in one file: encoder and UNet weights."""
    encoder = load_file(make_controlnext(folder / "encoder.safetensors", "gen2"))
    weights = load_file(make_unet_difference(folder / "weights.safetensors"))
    path = folder / "whole.safetensors"
    save_file({f"controlnext.{k}": v for k, v in encoder.items()} | {f"unet.{k}": v for k, v in weights.items()}, path)
    return path


@pytest.fixture
def control_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder models/controlnext of the host, for one test."""
    import folder_paths
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.folders import register_folder

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    table = {key: value for key, value in folder_paths.folder_names_and_paths.items() if key != "controlnext"}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    register_folder()
    folder = tmp_path / "models" / "controlnext"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.comfy
def test_a_control_chosen_as_weights_is_sent_to_the_other_widget(control_folder: Path) -> None:
    from comfyui_controlnext.controlnext_core.checkpoint import peek
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.folders import choose_weights
    from comfyui_controlnext.controlnext_core.detection import read_control_file

    bundle(control_folder)
    file = read_control_file(peek(control_folder / "encoder.safetensors"))
    with pytest.raises(CheckpointError, match=r"is a whole control.*: choose it as control_name, and set weights_name"):
        choose_weights(file, "whole.safetensors")
    with pytest.raises(CheckpointError, match=r"is an encoder and holds no weights of a base: choose it as control_na"):
        choose_weights(file, "encoder.safetensors")
    assert choose_weights(file, "weights.safetensors").path == control_folder / "weights.safetensors"


@pytest.mark.comfy
def test_errors_name_files_from_the_hosts_folders(control_folder: Path) -> None:
    from comfyui_controlnext.nodes.xs_loader import ControlNetXSLoader

    (control_folder / "empty one.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"^models/controlnext/empty one\.safetensors: is empty"):
        ControlNetXSLoader.execute("empty one.safetensors")
    with pytest.raises(CheckpointError, match=r"^x{100,250}.{0,20}: no such file in models/controlnext"):
        ControlNetXSLoader.execute("x" * 10_000)


@pytest.mark.comfy
def test_inspect_answers_for_files_that_are_no_control_of_ours(control_folder: Path) -> None:
    from comfyui_controlnext.nodes.loaders import ControlNeXtInspect

    save_file({"zero_convs.0.0.weight": torch.zeros(1)}, control_folder / "classic.safetensors")
    (control_folder / "empty.safetensors").touch()
    answers = {"classic": "is a classic ControlNet. Load it", "empty": "is empty", "gone": "no such file"}
    for name, words in answers.items():
        (text,) = ControlNeXtInspect.execute(f"{name}.safetensors").args
        assert f"{name}.safetensors: " in text and words in text and str(control_folder) not in text


@pytest.mark.comfy
def test_inspect_prints_a_recipe_a_line_a_setting(control_folder: Path) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.inspecting import inspect_file

    path = make_controlnext(control_folder / "trained.safetensors", "gen2")
    save_file(load_file(path), path, {"controlnext.recipe": '{"steps": 40, "trainable": "to_out"}'})
    assert '\ncontrolnext.recipe:\n  steps = 40\n  trainable = "to_out"' in inspect_file(path)
    save_file(load_file(path), path, {"controlnext.recipe": "[" * 9000})
    assert "controlnext.recipe: [[[" in inspect_file(path)


@pytest.mark.comfy
def test_short_paths_touch_the_hosts_folders_alone(control_folder: Path) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.short_paths import short_paths

    models = control_folder.parent
    assert short_paths(f"{models}{os.sep}vae{os.sep}a b.pt: bad") == f"models/vae{os.sep}a b.pt: bad"
    two = f"'{control_folder}{os.sep}x' and {models}{os.sep}y"
    assert short_paths(two) == f"'models/controlnext{os.sep}x' and models/y"
    for whole in (f"/mnt{models}{os.sep}x", f"{models}2{os.sep}x", str(models)):
        assert short_paths(whole) == whole


@pytest.mark.comfy
@pytest.mark.parametrize(
    ("at", "values", "words"),
    [
        ("options", {"schedule": "0:1; 1:0"}, "schedule - schedule: '0:1; 1:0' is not a percent:strength pair"),
        ("xs", {"num_heads": "many"}, "num_heads - num_heads: 'many' is not a list of whole numbers"),
    ],
)
def test_a_bad_text_is_blamed_once_on_its_own_widget(
    server: ComfyServer, at: str, values: dict[str, str], words: str
) -> None:
    workflow: dict[str, Any] = {
        "xs": {"class_type": "ControlNetXSLoader", "inputs": {"control_name": "xs.safetensors", "norm_rule": "auto"}},
        "options": {"class_type": "ControlNeXtOptions", "inputs": {"control_net": ["xs", 0], "apply_to": "auto"}},
        "keep": {"class_type": "ControlNeXtSave", "inputs": {"control_net": ["options", 0], "filename_prefix": "x"}},
    }
    workflow[at]["inputs"] |= values
    answer = refusal(server, workflow)
    blamed = [error for error in answer["node_errors"][at]["errors"] if error["type"] == "custom_validation_failed"]
    assert [error["extra_info"]["input_name"] for error in blamed] == list(values)
    assert blamed[0]["details"].startswith(words)


def refusal(server: ComfyServer, workflow: dict[str, Any]) -> dict[str, Any]:
    """Answer of the host to a workflow that it refuses."""
    import json
    import urllib.error
    import urllib.request

    body = json.dumps({"prompt": workflow}).encode()
    request = urllib.request.Request(f"http://{server.address}/prompt", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)  # noqa: S310
    with refused.value as error:
        return json.loads(error.read())


@pytest.mark.comfy
def test_wrong_combos_beside_a_text_are_refused() -> None:
    from comfyui_controlnext.nodes.apply import ControlNeXtOptions
    from comfyui_controlnext.nodes.xs_loader import ControlNetXSLoader

    with pytest.raises(ValueError, match=r"apply_to: 'left' is not one of auto, both, positive, negative"):
        ControlNeXtOptions.execute(SimpleNamespace(set_cond_hint=None, get_control=None), "left")
    with pytest.raises(ValueError, match=r"norm_rule: 'mine' is not one of auto, official, diffusers"):
        ControlNetXSLoader.execute("xs.safetensors", "mine")


def test_train_without_a_recipe_lists_the_recipes_and_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["train"])
    told = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2
    assert "usage: run.py train [--comfyui PATH] [--cpu] CONFIG.toml [--SETTING VALUE ...]" in told
    names = [path.name for path in (ROOT / "controlnext_training" / "recipes").glob("*.toml")]
    assert len(names) > 15 and all(name in told for name in names)


def test_a_missing_recipe_is_named_without_errno(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothere\.toml: no such file") as failure:
        read_recipe(tmp_path / "nothere.toml")
    assert "Errno" not in str(failure.value)
    with pytest.raises(ConfigError) as failure:
        read_recipe(tmp_path)
    assert "Errno" not in str(failure.value)


def test_a_benchmark_shows_within_seconds_that_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "FIRST_SIGN", 0.2)
    code = "import time; time.sleep(2); raise SystemExit(3)"
    assert bench._watch("step", [sys.executable, "-c", code], dict(os.environ)) == 3
    told = capsys.readouterr().err.splitlines()
    assert 1 <= len(told) <= 4 and all(line.startswith("   step: running for ") for line in told)


def test_messages_of_the_core_name_no_key_of_the_page(tmp_path: Path) -> None:
    from comfyui_controlnext.controlnext_core.checkpoint import peek

    with pytest.raises(CheckpointError, match="no such file") as failure:
        peek(tmp_path / "gone.safetensors")
    assert "ress R" not in str(failure.value)
