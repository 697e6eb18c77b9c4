"""Command `python run.py train` as a user runs it: training, stopping, resuming, and error messages."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.controlnext_training import journal, state
from comfyui_controlnext.controlnext_training.config import TrainConfig
from comfyui_controlnext.controlnext_training.config_files import as_toml, read_recipe
from comfyui_controlnext.controlnext_training.synthetic import write_folder
from comfyui_controlnext.tools import train_command as tool

if TYPE_CHECKING:
    from comfyui_controlnext.tests.conftest import TinyModels

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "run.py"
TINY = ROOT / "controlnext_training" / "recipes" / "tiny.toml"
NEW_GROUP = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
SEVERAL = """
import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code
    print("ended with", status, flush=True)
"""
"""Program that executes several command lines, so that torch and the host are imported once."""
LIMIT = 1200  # seconds of one training; the tiny recipe takes over 300 on slow or shared cores


def command(host: Path, *arguments: str) -> list[str]:
    return [str(RUN), "train", "--comfyui", str(host), "--cpu", *arguments]


def start(host: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start `run.py train` in a separate process; its output is one stream, line by line."""
    return start_python(*command(host, *arguments))


def start_python(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "PYTHONWARNINGS": "ignore"},
        creationflags=NEW_GROUP,
    )


def train(host: Path, *arguments: str) -> tuple[int, str]:
    """Exit status, and all printed text."""
    return ended(start(host, *arguments))


def ended(started: subprocess.Popen[str]) -> tuple[int, str]:
    with started as process:
        try:
            printed, _ = process.communicate(timeout=LIMIT)
        finally:
            process.kill()  # no effect on one that has ended; one past the limit must not outlive its test
    return process.returncode, printed


def lines_of(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    watchdog = threading.Timer(LIMIT, process.kill)
    watchdog.start()
    try:
        with process.stdout:
            yield from process.stdout
    finally:
        watchdog.cancel()


def press_ctrl_c(process: subprocess.Popen[str]) -> None:
    process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT))


@pytest.fixture
def recipe(tmp_path: Path, tiny: TinyModels) -> Path:
    """Recipe of a short run on files, in a folder with spaces and letters that are not ASCII."""
    folder = tmp_path / "m\u00fd r\u00e9cipes \u732b"
    write_folder(folder / "drawn sc\u00e8nes", 3, 64, 0, "edges")
    config = TrainConfig(
        variant="xs",
        base=str(tiny.models / "checkpoints" / tiny.names["checkpoint"]),
        data=("drawn sc\u00e8nes",),
        output_name="c\u00f4ntrol 1",
        resolution=64,
        steps=6,
        save_every=100,
        validate_every=0,
        log_every=1,
        control_learning_rate=1e-3,
        precision="fp32",
        runs_folder="runs",
        output_folder="out put",
    )
    path = folder / "sh\u00f6rt.toml"
    path.write_text(as_toml(config), "utf-8")
    return path


@pytest.mark.comfy
def test_ctrl_c_saves_and_the_same_command_goes_on(host: Path, recipe: Path) -> None:
    steps = 40  # a busy machine may take its time to deliver the signal
    recipe.write_text(recipe.read_text("utf-8").replace("steps = 6\n", f"steps = {steps}\n"), "utf-8")
    process, seen = start(host, str(recipe)), []
    for line in lines_of(process):
        seen.append(line)
        if line.startswith(f"step 2/{steps}"):
            press_ctrl_c(process)
    printed = "".join(seen)
    assert process.wait() == 130, printed
    run = recipe.parent / "runs" / "c\u00f4ntrol 1"
    saved = state.latest(run)
    assert saved is not None and 2 <= saved.step < steps, printed
    assert "stopping after this step, to save" in printed
    assert f"stopped after {saved.step} steps; saved in {saved.folder}" in printed and "Traceback" not in printed

    status, printed = train(host, str(recipe))
    assert status == 0, printed
    path = recipe.parent / "out put" / "c\u00f4ntrol 1.safetensors"
    assert f"resumed at step {saved.step} from" in printed and printed.rstrip().endswith(str(path))
    assert checkpoint.peek(path).metadata["controlnext.steps"] == str(steps)
    text = (run / "log.jsonl").read_text("utf-8")
    events = [json.loads(line) for line in text.splitlines()]
    assert [event["event"] for event in events if event["event"] in ("start", "resume", "finished")] == [
        "start",
        "resume",
        "finished",
    ]
    assert list(journal.read(run, "step", "loss")) == list(range(1, steps + 1))
    folder = str(recipe.parent / "drawn sc\u00e8nes")
    assert read_recipe(run / "config.toml") == {**read_recipe(recipe), "data": (folder,)}, "what it was started with"


@pytest.mark.comfy
def test_what_is_wrong_is_said_in_a_sentence(host: Path, recipe: Path) -> None:
    wrong = (
        (["--lerning-rate", "1"], "lerning_rate: is not a setting. Did you mean learning_rate?"),
        (["--steps", "0"], "steps: 0 is out of range"),
        (["--data", "nowhere"], "nowhere"),
        (["--base", "nothing.safetensors"], "base: neither"),
        (["--base", "damaged.safetensors"], "damaged.safetensors: cannot be read"),
        (["--base", "other.safetensors"], "other.safetensors is not a model that ComfyUI knows"),
        (["--base", "page.ckpt"], "is a page of the web (HTML)"),
        (["--optimizer", "prodigy"], "needs the package prodigyopt"),
        (["--variant", "sd15", "--trainable", "re:nothing_of_this"], "selects none of the"),
        (["--variant", "sdxl"], "is a SDXL control (sdxl), but the connected model is SD1.5"),
        (["--comfyui", "x"], "stands before CONFIG.toml"),
        (["steps=5"], "Write settings as --steps 1000"),
    )
    recipe.with_name("damaged.safetensors").write_bytes(b"not a model")
    checkpoint.save(recipe.with_name("other.safetensors"), {"a": torch.zeros(2)}, {})
    recipe.with_name("page.ckpt").write_bytes(b"\n<!DOCTYPE html><html>")
    lines = [command(host, str(recipe), *arguments) for arguments, _ in wrong]
    status, printed = ended(start_python("-c", SEVERAL, json.dumps(lines)))
    assert status == 0 and "Traceback" not in printed, printed
    *parts, rest = printed.split("ended with 1\n")
    assert len(parts) == len(wrong) and "ended with" not in "".join(parts) + rest, printed
    for part, (arguments, says) in zip(parts, wrong, strict=True):
        assert says in part, (arguments, part)
    assert "encoding" not in printed, "it is said before work begins"


@pytest.mark.comfy
def test_a_wrong_key_of_a_recipe_is_said_with_its_file_and_what_may_be_meant(host: Path, recipe: Path) -> None:
    recipe.write_text("stepz = 3\n", "utf-8")
    status, printed = train(host, str(recipe))
    assert status == 1 and f"{recipe}: stepz: is not a setting. Did you mean steps?" in printed, printed
    status, printed = train(host, str(recipe.with_name("other.toml")))
    assert status == 1 and "other.toml" in printed and "Traceback" not in printed, printed


def test_help_after_the_recipe_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.settings(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in printed


def test_the_first_options_need_the_standard_library_only() -> None:
    for arguments in (["train", "--help"], ["train"]):
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(RUN), *arguments],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=60,
            check=False,
        )
        assert "CONFIG.toml" in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.returncode == (0 if "--help" in arguments else 2)


def test_torch_is_not_there_before_its_threads_are_told_to_sleep() -> None:
    code = (
        f"import runpy, sys; runpy.run_path({str(ROOT / '_alias.py')!r})\n"
        "import comfyui_controlnext.tools.train_command; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.comfy
def test_relative_paths_are_seen_from_the_recipe_and_drawn_data_is_no_path() -> None:
    from comfyui_controlnext.controlnext_training import command

    config = TrainConfig(data=("a", "synthetic:edges:3"), validation_data=("b",), init_control="c.safetensors")
    seen = command.seen_from(Path("there"), config)
    assert seen.data == (str(Path("there") / "a"), "synthetic:edges:3")
    assert (seen.validation_data, seen.init_control) == (
        (str(Path("there") / "b"),),
        str(Path("there") / "c.safetensors"),
    )


@pytest.mark.comfy
def test_the_recipe_of_a_transformer_ends_with_a_file_that_the_loader_takes(host: Path, tmp_path: Path) -> None:
    """Fewer steps of it, with its one validation."""
    folders = ["--runs-folder", str(tmp_path / "runs"), "--output-folder", str(tmp_path / "out")]
    fewer = ["--steps", "4", "--batch-size", "2", "--validate-every", "4", "--validation-samples", "1"]
    status, printed = train(host, str(TINY.with_name("tiny_transformer.toml")), *folders, *fewer)
    assert status == 0, printed
    (loss,) = journal.read(tmp_path / "runs" / "tiny_transformer", "validation", "loss").values()
    path = tmp_path / "out" / "tiny_transformer.safetensors"
    metadata = checkpoint.peek(path).metadata
    assert loss > 0 and (metadata["controlnext.spec"], metadata["controlnext.rank"]) == ("sd3", "16")
    assert sum(name.startswith("base.") for name in checkpoint.peek(path).shapes) == 4


@pytest.mark.comfy
def test_the_tiny_recipe_learns_to_follow_the_hint(host: Path, tmp_path: Path) -> None:
    """The recipe unchanged but for the folder that it writes to."""
    folders = ["--runs-folder", str(tmp_path / "runs"), "--output-folder", str(tmp_path / "out")]
    status, printed = train(host, str(TINY), *folders)
    assert status == 0, printed

    def seen(figure: str) -> list[float]:
        return list(journal.read(tmp_path / "runs" / "tiny", "validation", figure).values())

    assert seen("loss")[-1] < seen("loss")[0] < seen("loss_without")[-1], printed
    assert seen("fidelity")[-1] > seen("fidelity_without")[-1] + 0.1, printed
    assert re.search(r"finished after \d+ steps", printed)
    assert torch.isfinite(
        torch.cat([t.flatten() for t in checkpoint.load(tmp_path / "out" / "tiny.safetensors").values()])
    ).all()
