"""Killed training processes resume, and end as an uninterrupted run."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.controlnext_training import state
from comfyui_controlnext.controlnext_training.config import TrainConfig
from comfyui_controlnext.controlnext_training.config_files import as_toml
from comfyui_controlnext.controlnext_training.journal import read
from comfyui_controlnext.tests.fixtures.training_fixtures import same_nested
from torch import Tensor

if TYPE_CHECKING:
    from comfyui_controlnext.tests.conftest import TinyModels

PROCESS = Path(__file__).parents[1] / "fixtures" / "training_process.py"


class Processes:
    """Runs in separate processes: forked off one whose imports are done, or started where forking is not possible."""

    def __init__(self, host: Path, folder: Path) -> None:
        self.command = [sys.executable, str(PROCESS), str(host)]
        self.settings: dict[str, Any] = {
            "cwd": folder,
            "env": {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            "stdout": subprocess.PIPE,
            "stdin": subprocess.PIPE,
            "text": True,
        }
        self.server = subprocess.Popen(self.command, **self.settings) if hasattr(os, "fork") else None
        self.process: subprocess.Popen[str] | None = None
        self.pid = 0

    def start(self, recipe: Path) -> None:
        if self.server is None:
            self.process = subprocess.Popen([*self.command, str(recipe)], **self.settings)
            return
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(f"{recipe}\n")
        self.server.stdin.flush()
        self.pid = int(self.server.stdout.readline().split()[1])

    def kill(self) -> None:
        """Kill the process at once: SIGKILL, or the equivalent on Windows."""
        if self.process is not None:
            self.process.kill()
            return
        import signal

        with contextlib.suppress(ProcessLookupError):  # it was quicker
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        if self.process is not None:
            self.process.communicate()
            return self.process.returncode
        assert self.server is not None and self.server.stdout is not None
        return int(self.server.stdout.readline().split()[1])

    def close(self) -> None:
        if self.server is not None:
            self.server.communicate()


@pytest.fixture(scope="module")
def processes(host: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    running = Processes(host, tmp_path_factory.mktemp("processes"))
    yield running
    running.close()


STEPS, EVERY = 14, 2


BASES = {"xs": "checkpoint", "sd3": "transformer"}
"""Variant -> the small model that it is trained on."""


def recipe_in(folder: Path, tiny: TinyModels, variant: str = "xs") -> Path:
    """Recipe of a short run, with fast steps and saves slow enough for some kills to come while a state is written."""
    config = TrainConfig(
        variant=variant,
        base=str(tiny.models / "checkpoints" / tiny.names[BASES[variant]]),
        data=("synthetic:edges:5",),
        resolution=64,
        steps=STEPS,
        save_every=EVERY,
        validate_every=0,
        log_every=1,
        learning_rate=1e-4,
        control_learning_rate=1e-3,
        ema_decay=0.9,
        precision="fp32",
        save_dtype="fp32",
        runs_folder="runs",
        output_folder="out",
        cache_folder=str(tiny.base / "training cache"),
    )
    folder.mkdir()
    path = folder / "recipe.toml"
    path.write_text(as_toml(config), "utf-8")
    return path


def weights_in(folder: Path) -> dict[str, Tensor]:
    return checkpoint.load(folder / "out" / "control.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def uninterrupted(
    processes: Processes, tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, float]:
    """Folder of an uninterrupted run, and its seconds."""
    return undisturbed(processes, tiny, tmp_path_factory.mktemp("uninterrupted") / "run", "xs")


def undisturbed(processes: Processes, tiny: TinyModels, folder: Path, variant: str) -> tuple[Path, float]:
    """Uninterrupted run: its folder, and its seconds."""
    processes.start(recipe_in(folder, tiny, variant))
    started = time.monotonic()
    assert processes.wait() == 0, (folder / "recipe.out").read_text("utf-8")
    return folder, time.monotonic() - started


def killed_again_and_again(
    processes: Processes, tiny: TinyModels, folder: Path, seconds: float, kills: int, seed: int, variant: str = "xs"
) -> list[int]:
    """Kill a run at random moments, check the remaining files each time, let it end; returns the steps saved at each
    kill.

    seconds: duration of a run; one that has its last state already may be killed while it writes the trained file.
    """
    recipe, moments, saved = recipe_in(folder, tiny, variant), random.Random(seed), [0]
    run = folder / "runs" / "control"
    for _ in range(kills):
        processes.start(recipe)
        time.sleep(moments.uniform(0.0, seconds / 2))
        processes.kill()
        processes.wait()
        whole = [path for path in run.glob("state-*") if state._read(path) is not None] if run.exists() else []
        assert len(whole) == len(list(run.glob("state-*"))), "a state has its name only when it is whole"
        found = state.latest(run)
        logged = max(read(run, "step", "loss"), default=0) if run.exists() else 0
        step = 0 if found is None else found.step
        assert step >= saved[-1] and logged - step <= EVERY, "no more is lost than the steps since the last save"
        assert found is None or len(found.tensors("weights")) and len(found.tensors("losses")["loss"]) == step
        assert not (folder / "out" / "control.safetensors").exists() or weights_in(folder)
        saved.append(step)
    processes.start(recipe)
    assert processes.wait() == 0, (folder / "recipe.out").read_text("utf-8")
    assert f"resumed at step {saved[-1]} from" in (folder / "recipe.out").read_text("utf-8") or not saved[-1]
    return saved[1:]


def ends_as(folder: Path, uninterrupted: Path) -> None:
    assert same(weights_in(folder), weights_in(uninterrupted))
    ours, theirs = (state.latest(place / "runs" / "control") for place in (folder, uninterrupted))
    assert ours is not None and theirs is not None and ours.step == theirs.step == STEPS
    assert same_nested(ours.optimizer(), theirs.optimizer())
    for part in ("weights", "ema", "losses"):
        assert same(ours.tensors(part), theirs.tensors(part)), part
    logs = [read(place / "runs" / "control", "step", "loss") for place in (folder, uninterrupted)]
    assert logs[0] == logs[1] and len(logs[0]) == STEPS
    left = {path.name for path in (folder / "runs" / "control").iterdir()}
    assert not any(name.startswith(state.UNFINISHED) for name in left)
    assert [path.name for path in (folder / "runs").iterdir() if path.is_dir()] == ["control"], "nothing was set aside"


@pytest.mark.comfy
def test_a_run_killed_at_any_moment_goes_on_to_the_bit_identical_end(
    processes: Processes, tiny: TinyModels, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    folder = tmp_path / "killed r\u00fcn"
    killed_again_and_again(processes, tiny, folder, uninterrupted[1], kills=3, seed=1)
    ends_as(folder, uninterrupted[0])


@pytest.mark.comfy
@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 12))
def test_fifty_kills_lose_at_most_the_steps_since_the_last_save(
    processes: Processes, tiny: TinyModels, uninterrupted: tuple[Path, float], tmp_path: Path, seed: int
) -> None:
    saved = killed_again_and_again(processes, tiny, tmp_path / "killed", uninterrupted[1], kills=5, seed=seed)
    ends_as(tmp_path / "killed", uninterrupted[0])
    assert len(saved) == 5


@pytest.mark.comfy
@pytest.mark.long
def test_a_run_on_a_transformer_killed_at_any_moment_goes_on_to_the_bit_identical_end(
    processes: Processes, tiny: TinyModels, tmp_path: Path
) -> None:
    whole, seconds = undisturbed(processes, tiny, tmp_path / "whole", "sd3")
    saved = killed_again_and_again(processes, tiny, tmp_path / "killed", seconds, kills=5, seed=6, variant="sd3")
    ends_as(tmp_path / "killed", whole)
    assert len(saved) == 5
