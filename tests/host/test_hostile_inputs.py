"""Hostile inputs: each is refused with a message, quickly, and without other effects."""

from __future__ import annotations

import io
import os
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from comfyui_controlnext.controlnext_core import encodable, file_names
from comfyui_controlnext.controlnext_core.checkpoint import CheckpointError, Header, listed, save
from comfyui_controlnext.controlnext_core.finite import check_weights, peak
from comfyui_controlnext.controlnext_core.metadata import read_metadata
from comfyui_controlnext.controlnext_training.config import ConfigError, TrainConfig
from comfyui_controlnext.controlnext_training.config_files import MAX_RECIPE, checked, parse_recipe, read_recipe
from comfyui_controlnext.controlnext_training.data import pictures, tree
from comfyui_controlnext.controlnext_training.data.index import Index, examine
from comfyui_controlnext.controlnext_training.data.samples import DatasetError
from comfyui_controlnext.controlnext_training.data.sources import entries, open_tree
from comfyui_controlnext.controlnext_training.data.tensors import TensorDataset
from comfyui_controlnext.controlnext_training.data.tree import Blob, open_regular, read_shard
from comfyui_controlnext.tests.fixtures.data_fixtures import coordinates, encoded
from comfyui_controlnext.tools.tiny_models import make_controlnext, make_unet_difference
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from comfyui_controlnext.tests.fixtures.sampling_fixtures import Studio


def png() -> bytes:
    """Small picture as a PNG."""
    return encoded(coordinates(64, 72))


PIPES = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")

# -- weights that are no numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float64])
def test_a_weight_that_is_not_finite_is_named(bad: float, dtype: torch.dtype) -> None:
    weights = {"good": torch.ones(9, dtype=dtype), "empty": torch.ones(0, dtype=dtype)}
    check_weights(weights, "a.safetensors")
    damaged = torch.ones(9)
    damaged[4] = bad
    with pytest.raises(CheckpointError, match=r"a\.safetensors: 'mid\.weight' holds NaN or infinite values"):
        check_weights(weights | {"mid.weight": damaged.to(dtype)}, "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.int64, torch.uint8])
def test_weights_of_other_kinds_of_numbers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(CheckpointError, match="'w' is of the number format .*weights are floating point"):
        check_weights({"w": torch.ones(2).to(dtype)}, "a.safetensors")


def test_the_peak_is_the_largest_magnitude() -> None:
    assert peak(torch.tensor([1.0, -3.0, 2.0])) == 3.0 and peak(torch.zeros(0)) == 0.0
    assert np.isnan(peak(torch.tensor([1.0, float("nan")])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("signs", [(1.0,), (-1.0,), (1.0, -1.0)])
def test_the_peak_from_bits_is_that_of_torch(dtype: torch.dtype, signs: tuple[float, ...]) -> None:
    """Exactly, for numbers of either sign, subnormal ones, strided views and the values that are no numbers."""
    made = torch.rand(40, 30, generator=torch.Generator().manual_seed(5), dtype=torch.float64).mul_(1e3).add_(1e-3)
    made *= torch.tensor(signs, dtype=torch.float64).repeat(30)[:30]
    for weights in (made, made.t()[3:], made * 1e-7, made * 0):
        weights = weights.to(dtype)
        assert peak(weights) == weights.double().abs().max().item()
        for bad in (float("inf"), -float("inf")):
            spoilt = weights.double().clone()
            spoilt[5, 5] = bad
            assert peak(spoilt.to(dtype)) == float("inf")
            spoilt[6, 6] = float("nan")
            assert np.isnan(peak(spoilt.to(dtype))) and np.isnan(peak((-spoilt).to(dtype)))


@pytest.mark.comfy
@pytest.mark.parametrize("value", [float("nan"), True])
def test_a_damaged_encoder_is_refused_before_anything_is_sampled(tmp_path: Path, studio: Studio, value: Any) -> None:
    path = make_controlnext(tmp_path / "controlnet.safetensors", "gen2")
    tensors = load_file(path)
    name = "mid_convs.1.weight"
    tensors[name] = torch.full(tensors[name].shape, value)
    save_file(tensors, path)
    with pytest.raises(
        CheckpointError, match=rf"controlnet\.safetensors: '{name}' (holds NaN|is of the number format)"
    ):
        studio.load(str(path))


@pytest.mark.comfy
def test_unet_weights_of_truth_values_are_refused(tmp_path: Path, studio: Studio) -> None:
    make_controlnext(tmp_path / "controlnet.safetensors", "gen2")
    tensors = load_file(make_unet_difference(tmp_path / "unet.safetensors"))
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name].bool()}, tmp_path / "unet.safetensors")
    with pytest.raises(CheckpointError, match="is of the number format bool"):
        studio.load(str(tmp_path / "controlnet.safetensors"), "auto", weights_kind="difference")


# -- texts of a file -----------------------------------------------------------------------------------------------

LONG = "x" * 3_000_000


def test_messages_repeat_the_start_of_a_text_alone() -> None:
    assert encodable.cut("short") == "short"
    assert encodable.cut(LONG) == "x" * 200 + "... (3,000,000 letters)"
    assert len(listed("missing", [LONG] * 9)) < 1300
    with pytest.raises(CheckpointError) as caught:
        read_metadata(Header(Path("a"), {}, {}, {"controlnext.spec": LONG}))
    assert len(str(caught.value)) < 700 and str(caught.value).endswith("or save the file again.")


@pytest.mark.comfy
def test_inspect_shows_the_start_of_long_metadata(tmp_path: Path) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.inspecting import MAX_KEYS, inspect_file

    path = make_controlnext(tmp_path / "controlnet.safetensors", "gen2")
    many = {f"key{i:05}": LONG[:5000] for i in range(2000)}
    text = inspect_file(save(path, load_file(path), {**many, "a": LONG}))
    assert len(text) < 20_000 and "x... (3,000,000 letters)" in text and f"and {2001 - MAX_KEYS:,} keys more" in text


# -- recipes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a." * 30_000 + "b = 1", "nests more than 64 tables"),
        ("x = {" + "a." * 20_000 + "b = 1}", "nests more than 64 tables"),
        ("\n".join(f"k{i}.a = 1" for i in range(20_000)), "letters long. A recipe has no more than 65,536"),
        ("x = " + "[" * 30_000, "is nested too deep"),
        ("x = " + "{a = " * 10_000, "is nested too deep"),
        ("steps = " + "9" * 5000, "is not TOML"),
        ("steps = 0x" + "f" * 5000, "steps: is a number of more than 64 bits"),
        ("gain = 0x" + "f" * 5000, "gain: is a number of more than 64 bits"),
        ('output_name = "a\\u0000b"', "output_name: .* has a character that texts cannot have"),
        ('output_name = "' + "a" * 9000 + '"', "output_name: is a text of 9,000 letters"),
        ("k" * 5000 + " = 1", r"k\.\.\. \(5,000 letters\): is not a setting"),
        ("steps = 1\n[a]\nsteps = 2", "steps: stands there twice"),
        ("blocks = 3", "blocks: 3 is not a text"),
    ],
)
def test_a_recipe_that_is_none_is_refused_at_once(text: str, words: str) -> None:
    started = time.process_time()
    with pytest.raises(ConfigError, match=words) as caught:
        parse_recipe(text)
    assert time.process_time() - started < 2 and len(str(caught.value)) < 600


def test_texts_that_no_system_takes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has a character that texts cannot have"):
        checked("output_name", "a\ud800")
    with pytest.raises(ConfigError, match="blocks: .* is not understood"):
        TrainConfig(blocks="input." + "9" * 5000)
    (tmp_path / "big.toml").write_bytes(b"#" * (5 * MAX_RECIPE))
    with pytest.raises(ConfigError, match=r"big\.toml: is 327,680 bytes long, and is not a recipe"):
        read_recipe(tmp_path / "big.toml")


def test_the_limits_leave_sound_recipes_alone() -> None:
    dots = "# " + "." * 300 + "\n"
    text = dots + 'data = ["' + '", "'.join(f"./folder.{i}/a.tar" for i in range(300)) + '"]\n'
    assert len(parse_recipe(text)["data"]) == 300


# -- names of files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["cache", "Cache", "unet", "UNet_mine", "CON", "nul.txt", "a.", "a ", " a", "a\0b", "a\ud800"]
)
def test_names_that_collide_or_that_a_system_refuses_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="output_name: .*(Choose another|Use letters|Remove it)"):
        TrainConfig(output_name=name)
    assert file_names.problem_of_prefix(f"controlnext/{name}")


@pytest.mark.parametrize("name", ["x" * 151, "ä" * 101, "x" * 100_000])
def test_names_that_are_too_long_are_refused_in_few_words(name: str) -> None:
    problem = file_names.problem_of_control(name)
    assert "is too long" in problem and len(problem) < 250


@pytest.mark.parametrize("name", ["control", "my control", "edges-v1.2", "\u753b\u50cf", "cached", "sunet", "a.b"])
def test_sound_names_are_taken(name: str) -> None:
    assert file_names.problem_of_control(name) == "" == file_names.problem_of_prefix(f"controlnext/%year%/{name}")
    assert file_names.problem_of_prefix(f"{name}/") == ""


def test_a_prefix_of_thousands_of_folders_is_refused() -> None:
    assert "has 2,000 folders" in file_names.problem_of_prefix("a/" * 2000 + "x")
    assert "is the name of a device" in file_names.problem_of_prefix("a/con/x")


@pytest.mark.comfy
def test_a_prefix_is_checked_before_a_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.saving import free_stem

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    for prefix in ("controlnext/unet", "a/\0/x", "a/" * 2000 + "x", "aux/x"):
        with pytest.raises(CheckpointError, match="filename_prefix: "):
            free_stem(prefix)
    assert list(tmp_path.iterdir()) == []
    assert free_stem("controlnext/fine").parent == tmp_path / "controlnext"


@pytest.mark.comfy
def test_auto_takes_no_control_for_the_unet_weights_of_another(tmp_path: Path, studio: Studio) -> None:
    make_controlnext(tmp_path / "controlnet.safetensors", "gen2")
    make_controlnext(tmp_path / "unet_but_a_control.safetensors", "gen2")
    assert "UNet weights: none" in studio.load(str(tmp_path / "controlnet.safetensors"), "auto").report
    make_unet_difference(tmp_path / "unet.safetensors")
    assert "unet.safetensors, the only one" in studio.load(str(tmp_path / "controlnet.safetensors"), "auto").report


# -- folders of data -----------------------------------------------------------------------------------------------


def found(folder: Path, roots: tuple[Path, ...] | None = None) -> tuple[list[str], str]:
    """Names of the pictures, and the broken files with their reasons."""
    opened, table = open_tree(folder, roots)
    names = [entry.image.name for entry in entries(opened, table, ".txt", paired=False)]
    return names, "\n".join(f"{path}: {why}" for path, why in opened.broken)


@PIPES
def test_pipes_devices_and_links_to_themselves_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(png())
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "up").symlink_to(tmp_path)
    for roots in (None, (tmp_path,)):
        names, broken = found(tmp_path, roots)
        assert names == ["good.png"]
        for name in ("pipe.png", "loop.png", "zero.png"):
            assert f"{name}: is not a regular file" in broken
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(OSError, match="is not a regular file"):
            open_regular(tmp_path / name)
        assert "is not a regular file" in str(examine(Blob(tmp_path / name, name)))


@PIPES
def test_a_row_outside_of_the_roots_says_the_same_whether_the_file_is_there(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "there.png").write_bytes(png())
    rows = [f'{{"file_name": "{tmp_path / name}"}}' for name in ("there.png", "wrong.png")]
    (inside / "metadata.jsonl").write_text("\n".join(rows))
    names, broken = found(inside, (inside,))
    lines = [line.partition(", row ")[2][3:] for line in broken.splitlines()]
    assert names == [] and len(lines) == 2
    assert lines[0].replace("there", "") == lines[1].replace("wrong", "") and "is outside of" in lines[0]


def test_one_bad_row_costs_that_row_alone(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n' + "[" * 100_000 + '\n{"file_name": "b.png"}\n')
    names, broken = found(tmp_path)
    assert names == ["a.png", "b.png"] and "row 2: is not JSON" in broken
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\nc.png," + "y" * 200_000 + "\nb.png,z\n")
    names, broken = found(tmp_path)
    assert names == ["a.png", "b.png"] and "row 2: cannot be read (field larger than" in broken


def test_a_shard_of_zeros_is_given_up_and_can_be_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = len(png())
        tar.addfile(member, io.BytesIO(png()))
    os.truncate(path, 300 << 20)  # sparse: it takes no room
    started = time.process_time()
    blobs, broken = read_shard(path)
    assert time.process_time() - started < 10
    assert [blob.name for blob in blobs] == ["a.png"] and "no file begins in 64 MiB" in broken[0].why

    def cancelled() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_shard(path, cancelled)
    monkeypatch.setattr(tree, "MAX_FILE", 1000)
    with pytest.raises(OSError, match="more than 1,000"):
        Blob(path, "x.tar").read()


def test_a_list_of_other_files_is_no_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "secret.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 64
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    assert not isinstance(examine(Blob(tmp_path / "secret.mp4", "secret.mp4")), str)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    assert "is not a readable video" in str(examine(Blob(tmp_path / "list.mp4", "list.mp4")))


def test_pictures_are_measured_within_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = pictures.Budget(100)
    inside, most, lock = [0], [0], threading.Lock()

    def decode(pixels: int) -> None:
        with budget.taking(pixels):
            with lock:
                inside[0] += pixels
                most[0] = max(most[0], inside[0])
            time.sleep(0.01)
            with lock:
                inside[0] -= pixels

    threads = [threading.Thread(target=decode, args=(pixels,)) for pixels in (40, 40, 40, 90, 500, 10) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most[0] == 500 and inside[0] == 0  # the one that is over the budget was alone
    assert pictures.size_of(png()) == pictures.decode(png()).size


def test_files_are_measured_in_whole_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(png())
    monkeypatch.setattr(pictures, "_to_floats", None)
    facts = Index().facts([Blob(tmp_path / "a.png", "a.png")])
    assert [fact.size for fact in facts.values() if not isinstance(fact, str)] == [pictures.size_of(png())]


@pytest.mark.parametrize("shape", [(0, 64, 64, 3), (1, 0, 64, 3), (1, 64, 0, 3)])
def test_hints_without_a_pixel_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DatasetError, match="hints: has the shape"):
        TensorDataset(torch.zeros(1, 64, 64, 3), torch.zeros(shape))


@pytest.mark.comfy
@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5000, "loop/x", "../.."])
def test_a_folder_that_no_system_has_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths
    from comfyui_controlnext.controlnext_training.nodes.datasets import ControlDatasetFolder, find_folder

    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    if sys.platform == "linux":
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match="folder: .* is not there, or not in") as caught:
        find_folder(name)
    assert len(str(caught.value)) < 1000
    ControlDatasetFolder.fingerprint_inputs(folder=name)
