"""Load ControlNeXt and Inspect: listed files, chosen weights, and re-execution of a node."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.checkpoint import CheckpointError
from comfyui_controlnext.tests.fixtures.lazy_layers import EITHER_WAY
from comfyui_controlnext.tests.fixtures.sampling_fixtures import Studio
from comfyui_controlnext.tools.tiny_models import make_controlnext, make_unet_difference
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.comfy, EITHER_WAY]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """Both control folders of a models directory, registered as the pack does."""
    import folder_paths
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.folders import register_folder

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    paths = {name: tmp_path / name for name in ("controlnext", "controlnet")}
    table = {
        **folder_paths.folder_names_and_paths,
        "controlnet": ([str(paths["controlnet"])], {".safetensors", ".pth"}),
    }
    table.pop("controlnext", None)
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    register_folder()
    for path in paths.values():
        path.mkdir()
    yield paths


def load(studio: Studio, name: str, weights: str = "auto", **options: Any) -> Any:
    """Call the loader node with its widgets' names."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.folders import control_path

    return studio.load(control_path(name), weights, **options)


def fingerprint(control_name: str, weights_name: str = "auto") -> str:
    from comfyui_controlnext.nodes.loaders import ControlNeXtLoader

    return ControlNeXtLoader.fingerprint_inputs(control_name=control_name, weights_name=weights_name, model=None)


def patched(loaded: Any) -> int:
    """Number of the model's patched weights."""
    return len(loaded.model.patches)


@pytest.mark.parametrize("linked", [True, False])
def test_a_file_named_through_a_link_is_loaded_once_and_not_in_every_run(
    linked: bool, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Host's table of changed nodes, for each node of the pack that reads a file."""
    import execution
    from comfy_execution.graph import DynamicPrompt
    from comfyui_controlnext import controlnext_training, nodes

    import nodes as host_nodes

    ours = {**nodes.NODE_CLASS_MAPPINGS, **controlnext_training.NODE_CLASS_MAPPINGS}
    reading = {name: node for name, node in ours.items() if "fingerprint_inputs" in node.__dict__}
    assert {"ControlNeXtLoader", "ControlNetXSLoader", "ControlNeXtUNetLoader", "ControlNeXtInspect"} < reading.keys()
    for name, node in reading.items():
        own = list(inspect.signature(node.fingerprint_inputs).parameters)
        inputs = {given: ["other", 0] if linked else "no such file" for given in own if len(given) > 1}
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(host_nodes.NODE_CLASS_MAPPINGS, name, node)
            prompt = DynamicPrompt({"one": {"class_type": name, "inputs": inputs}})
            (found,) = asyncio.run(execution.IsChangedCache("id", prompt, None).get("one"))
        assert (found == "linked") == linked, (name, found)
    assert not caplog.records


def test_both_folders_are_listed_ours_first_weight_files_only(folders: dict[str, Path]) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.folders import control_names, control_path

    for folder, name in (("controlnext", "b.safetensors"), ("controlnet", "b.safetensors"), ("controlnet", "c.pth")):
        make_controlnext(folders[folder] / name, "gen2")
    (folders["controlnext"] / "sub").mkdir()
    for name in ("readme.md", "sub/preview.png", "sub/a.bin", "sub/umlaut \u00e4.sft"):
        (folders["controlnext"] / name).touch()
    names = control_names()
    inner = [os.path.join("sub", "a.bin"), os.path.join("sub", "umlaut \u00e4.sft")]
    assert sorted(names) == sorted(["b.safetensors", *inner, "c.pth"])
    assert control_path("b.safetensors") == folders["controlnext"] / "b.safetensors"
    assert control_path("c.pth") == folders["controlnet"] / "c.pth"


def test_registering_again_changes_nothing(folders: dict[str, Path]) -> None:
    import folder_paths
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.folders import register_folder

    before = repr(folder_paths.folder_names_and_paths["controlnext"][0])
    register_folder()
    assert repr(folder_paths.folder_names_and_paths["controlnext"][0]) == before


def test_auto_takes_the_only_unet_file_beside_the_control(studio: Studio, folders: dict[str, Path]) -> None:
    here, there = folders["controlnext"] / "here", folders["controlnext"] / "there"
    make_controlnext(here / "controlnet.safetensors", "gen2")
    make_unet_difference(there / "unet.safetensors")
    name = os.path.join("here", "controlnet.safetensors")
    alone = load(studio, name)
    assert patched(alone) == 0 and "none (0 files" in alone.report  # never from another folder
    make_unet_difference(here / "unet_depth.safetensors")
    one = load(studio, name)
    assert patched(one) > 0 and "unet_depth.safetensors, the only one beside the control" in one.report
    make_unet_difference(here / "unet2.safetensors")
    two = load(studio, name)
    assert patched(two) == 0 and "none (2 files" in two.report


def test_none_and_a_named_file_are_as_chosen(studio: Studio, folders: dict[str, Path]) -> None:
    make_controlnext(folders["controlnext"] / "controlnet.safetensors", "gen2")
    make_unet_difference(folders["controlnext"] / "unet.safetensors")
    make_unet_difference(folders["controlnext"] / "other" / "cross.safetensors", rule="attn2_to_out")
    everything = load(studio, "controlnet.safetensors")
    assert patched(load(studio, "controlnet.safetensors", "none")) == 0
    named = load(studio, "controlnet.safetensors", os.path.join("other", "cross.safetensors"))
    assert 0 < patched(named) < patched(everything)
    assert "cross.safetensors, as chosen" in named.report


def with_metadata(path: Path, **metadata: str) -> None:
    """Save a file of tensors again, with `controlnext.*` metadata."""
    save_file(load_file(path), path, {f"controlnext.{key}": value for key, value in metadata.items()})


def test_auto_takes_the_file_that_the_controls_metadata_names(studio: Studio, folders: dict[str, Path]) -> None:
    control = make_controlnext(folders["controlnext"] / "controlnet.safetensors", "gen2")
    with_metadata(control, weights_file="mine.safetensors")
    make_unet_difference(folders["controlnext"] / "unet.safetensors")
    with pytest.raises(CheckpointError, match=r"controlnet\.safetensors: names mine\.safetensors .*not beside it"):
        load(studio, "controlnet.safetensors")
    make_unet_difference(folders["controlnext"] / "mine.safetensors", rule="attn2_to_out")
    assert "mine.safetensors, named by the control file" in load(studio, "controlnet.safetensors").report
    with_metadata(control, weights_file="../../secret/mine.safetensors")  # a name, never a way out of the folder
    assert "mine.safetensors, named by" in load(studio, "controlnet.safetensors").report


def test_auto_prefers_what_is_bundled_in_the_control(studio: Studio, folders: dict[str, Path]) -> None:
    folder = folders["controlnext"]
    encoder = load_file(make_controlnext(folder / "plain.safetensors", "gen2"))
    weights = load_file(make_unet_difference(folder / "unet.safetensors", rule="attn2_to_out"))
    tensors = {f"controlnext.{k}": v for k, v in encoder.items()} | {f"unet.{k}": v for k, v in weights.items()}
    save_file(tensors, folder / "bundle.safetensors")
    loaded = load(studio, "bundle.safetensors")
    assert patched(loaded) == len(weights) and f"{len(weights)} tensors bundled" in loaded.report
    assert patched(load(studio, "bundle.safetensors", "none")) == 0


def test_the_variant_can_be_stated_and_must_fit(studio: Studio, folders: dict[str, Path]) -> None:
    make_controlnext(folders["controlnext"] / "controlnet.safetensors", "gen2")
    assert load(studio, "controlnet.safetensors", variant="sd15").control.net.spec.name == "sd15"
    with pytest.raises(CheckpointError, match=r"controlnet\.safetensors: .*variant=sdxl_july needs other weights"):
        load(studio, "controlnet.safetensors", variant="sdxl_july")
    with pytest.raises(CheckpointError, match=r"is a control for SDXL .*connected model is SD1\.5"):
        load(studio, "controlnet.safetensors", variant="sdxl")


def test_a_trained_gain_takes_effect(studio: Studio, folders: dict[str, Path]) -> None:
    from comfyui_controlnext.tests.fixtures.sampling_fixtures import picture

    control = make_controlnext(folders["controlnext"] / "controlnet.safetensors", "gen2")
    before = load(studio, "controlnet.safetensors")
    expected = studio.sample(studio.ours(before.model, before.control, picture(), 0.5))
    with_metadata(control, spec="sd15", gain="0.5")
    after = load(studio, "controlnet.safetensors")
    assert torch.equal(studio.sample(studio.ours(after.model, after.control, picture(), 1.0)), expected)


def test_the_loader_runs_again_when_a_file_or_the_choice_changes(folders: dict[str, Path]) -> None:
    folder = folders["controlnext"]
    control = make_controlnext(folder / "controlnet.safetensors", "gen2")
    seen = [fingerprint("controlnet.safetensors")]
    assert fingerprint("controlnet.safetensors") == seen[0]

    def changed() -> bool:
        seen.append(fingerprint("controlnet.safetensors"))
        return seen.count(seen[-1]) == 1

    weights = make_unet_difference(folder / "unet.safetensors")
    assert changed()  # weights appeared
    os.utime(weights, ns=(1, 1))
    assert changed()  # weights changed
    os.utime(control, ns=(1, 1))
    assert changed()  # encoder changed
    make_unet_difference(folder / "unet2.safetensors")
    assert changed()  # no longer the only one
    with_metadata(control, weights_file="unet2.safetensors")
    os.utime(control, ns=(1, 1))
    assert changed()  # named
    assert fingerprint("controlnet.safetensors", "none") not in seen
    assert fingerprint("controlnet.safetensors", "unet.safetensors") not in seen


@pytest.mark.parametrize("content", [None, b"", b"no weights"])
def test_a_fingerprint_of_a_bad_file_leaves_the_error_to_the_node(
    studio: Studio, folders: dict[str, Path], content: bytes | None
) -> None:
    if content is not None:
        (folders["controlnext"] / "bad.safetensors").write_bytes(content)
    assert "bad.safetensors" in fingerprint("bad.safetensors")
    with pytest.raises(CheckpointError, match=r"bad\.safetensors: "):
        load(studio, "bad.safetensors")


def test_inspect_says_what_a_file_is(folders: dict[str, Path]) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.inspecting import inspect_file

    folder = folders["controlnext"]
    path = make_controlnext(folder / "controlnet.safetensors", "gen2", dtype=torch.float16)
    text = inspect_file(path)
    for words in ("3,526,400 parameters", "F16", "320 channels out", f"{path.stat().st_size:,} bytes", "none (0 files"):
        assert words in text, words
    for spec, base in (("sd15", "SD1.5"), ("sdxl", "SDXL"), ("svd_v2", "SVD")):
        assert f"{spec} = " in text and f"base {base}" in text
    assert "the connected model decides" in text
    make_unet_difference(folder / "unet.safetensors")
    with_metadata(path, spec="sdxl", gain="0.25", sources="encoder: mine")
    text = inspect_file(path)
    for words in ("unet.safetensors, the only one beside", "trained gain: 0.25", "controlnext.sources: encoder: mine"):
        assert words in text, words
    assert "SVD" not in text and "decides" not in text
    with pytest.raises(CheckpointError, match=r"unet\.safetensors: holds UNet weights and no encoder"):
        inspect_file(folder / "unet.safetensors")
