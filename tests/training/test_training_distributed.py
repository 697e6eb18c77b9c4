"""Distributed training on one CPU: the same run as one process with a larger batch, and only rank 0 writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfyui_controlnext.controlnext_training import journal, state
from comfyui_controlnext.controlnext_training.config import ConfigError, TrainConfig
from comfyui_controlnext.controlnext_training.config_files import as_toml
from comfyui_controlnext.tests.fixtures.data_fixtures import coordinates, encoded, write
from comfyui_controlnext.tests.fixtures.training_fixtures import same_nested
from comfyui_controlnext.tools.comfy_server import free_port
from torch import Tensor
from torch.distributed import TCPStore

if TYPE_CHECKING:
    from comfyui_controlnext.tests.conftest import TinyModels

PROCESS = Path(__file__).parents[1] / "fixtures" / "training_process.py"
STEPS = 4

# Two processes add the halves of a gradient in another order than one process adds its whole. AdamW divides by the
# gradient's own size, so where a gradient is almost nothing the difference would show in the weights; EPS is above it.
# Measured: 9e-8 in weights, which move by 2e-3, and 1e-7 in losses.
WEIGHTS, LOSSES, EPS = 1e-6, 1e-6, 1e-4


def recipe_in(folder: Path, tiny: TinyModels, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "variant": "xs",
        "base": str(tiny.models / "checkpoints" / tiny.names["checkpoint"]),
        "data": ("synthetic:edges:6",),
        "resolution": 64,
        "steps": STEPS,
        "save_every": 2,
        "keep_states": 9,
        "validate_every": 0,
        "log_every": 1,
        "control_learning_rate": 1e-3,
        "adam_eps": EPS,
        "precision": "fp32",
        "save_dtype": "fp32",
        "runs_folder": "runs",
        "output_folder": "out",
        "cache_folder": str(tiny.base / "training cache"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.toml"
    path.write_text(as_toml(TrainConfig(**(settings | changes))), "utf-8")
    return path


@contextmanager
def meeting(processes: int) -> Iterator[dict[str, str]]:
    """Environment in which this many processes find each other, as `torchrun` makes it.

    The store where they meet is in this process and chooses its port itself: a port that is merely free may be taken by
    the time that a process has imported torch. They talk over loopback, whatever the name of the machine stands for.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    interfaces = [] if os.name == "nt" else [name for _, name in socket.if_nameindex()]
    loopback = next((name for name in interfaces if name in ("lo", "lo0")), None)
    yield {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        **({} if loopback is None else {"GLOO_SOCKET_IFNAME": loopback}),
    }
    del store  # it lives until the processes have ended


def train(host: Path, recipe: Path, processes: int = 1, stop_rank: int | None = None) -> list[int]:
    """Exit statuses by rank. stop_rank: the process that requests a stop after two steps."""
    with meeting(processes) as together:
        return _train(host, recipe, together if processes > 1 else {}, processes, stop_rank)


def _train(host: Path, recipe: Path, together: dict[str, str], processes: int, stop_rank: int | None) -> list[int]:
    started = []
    for rank in range(processes):
        own = recipe.with_name(f"{recipe.stem}-{rank}.toml")  # what it prints goes beside it
        own.write_text(recipe.read_text("utf-8"), "utf-8")
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        stop = {"STOP_AFTER": "2"} if rank == stop_rank else {}
        quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        environment = {**os.environ, **together, **ranks, **stop, **quiet}
        command = [sys.executable, str(PROCESS), str(host), str(own)]
        started.append(subprocess.Popen(command, cwd=recipe.parent, env=environment))
    return [process.wait(timeout=900) for process in started]


def printed(recipe: Path, rank: int = 0) -> str:
    return recipe.with_name(f"{recipe.stem}-{rank}.out").read_text("utf-8")


def state_of(folder: Path, step: int = STEPS) -> state.State:
    path = folder / "runs" / "control" / f"state-{step:08d}"
    return state.State(path, json.loads((path / "state.json").read_text("utf-8")))


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of two sets of tensors."""
    assert one.keys() == other.keys() and one
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.fixture(scope="module")
def two(host: Path, tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of two processes, each with batches of one."""
    folder = tmp_path_factory.mktemp("two")
    recipe = recipe_in(folder, tiny)
    assert train(host, recipe, 2) == [0, 0], printed(recipe) + printed(recipe, 1)
    return folder


@pytest.mark.comfy
def test_two_processes_are_one_with_twice_the_batch_and_one_of_them_writes(
    host: Path, tiny: TinyModels, two: Path, tmp_path: Path
) -> None:
    recipe = recipe_in(tmp_path, tiny, batch_size=2)
    assert train(host, recipe) == [0], printed(recipe)
    assert apart(state_of(two).tensors("weights"), state_of(tmp_path).tensors("weights")) <= WEIGHTS
    assert apart(state_of(two).tensors("losses"), state_of(tmp_path).tensors("losses")) <= LOSSES
    lines = (two / "runs" / "control" / journal.LOG).read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines if '"step",' in line] == [1, 2, 3, 4], "one line per step"
    assert "finished after 4 steps" in printed(two / "recipe.toml")
    assert printed(two / "recipe.toml", 1) == "", "the second says nothing"
    assert [path.name for path in (two / "out").iterdir()] == ["control.safetensors"]


@pytest.mark.comfy
def test_one_that_is_asked_to_stop_stops_all_and_fewer_go_on_with_an_optimizer_that_was_split(
    host: Path, tiny: TinyModels, two: Path, tmp_path: Path
) -> None:
    recipe = recipe_in(tmp_path, tiny, zero=True, save_every=100)
    assert train(host, recipe, 2, stop_rank=1) == [130, 130], printed(recipe) + printed(recipe, 1)
    saved = state.latest(tmp_path / "runs" / "control")
    assert saved is not None and saved.step == 2
    assert apart(saved.tensors("weights"), state_of(two, 2).tensors("weights")) == 0, "split or not"
    assert same_nested(saved.optimizer(), state_of(two, 2).optimizer())
    assert train(host, recipe_in(tmp_path, tiny, batch_size=2)) == [0], printed(recipe)
    assert "resumed at step 2" in printed(recipe) and "processes 2 -> 1" in printed(recipe)
    assert apart(state_of(two).tensors("weights"), state_of(tmp_path).tensors("weights")) <= WEIGHTS


@pytest.mark.comfy
@pytest.mark.long
def test_torchrun_starts_the_documented_command(host: Path, tiny: TinyModels, two: Path, tmp_path: Path) -> None:
    recipe, run = recipe_in(tmp_path, tiny), PROCESS.parents[2] / "run.py"
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), str(run)]
    done = subprocess.run(
        [sys.executable, *command, "train", "--comfyui", str(host), "--cpu", str(recipe)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().splitlines()[-1] == str(tmp_path / "out" / "control.safetensors")
    assert apart(state_of(tmp_path).tensors("weights"), state_of(two).tensors("weights")) == 0
    assert same_nested(state_of(tmp_path).optimizer(), state_of(two).optimizer())


def test_splitting_is_for_an_optimizer_that_can_be_split() -> None:
    with pytest.raises(ConfigError, match="zero: is for adamw"):
        TrainConfig(zero=True, optimizer="prodigy")
    assert not torch.distributed.is_initialized()


COUNT = """
import runpy, sys
runpy.run_path(sys.argv[1])
from comfyui_controlnext.controlnext_training.data import open_dataset
from comfyui_controlnext.controlnext_training.distributed import join_group, together
from pathlib import Path
from comfyui_controlnext.controlnext_training.data.tree import Blob
read, real = [], Blob.read
Blob.read = lambda blob: read.append(blob.name) or real(blob)
from comfyui_controlnext.controlnext_training.data.rows import Cell
cell = Cell.read
Cell.read = lambda blob: read.append(blob.name) or cell(blob)
with join_group() as group:
    try:
        data = together(group, lambda: open_dataset(sys.argv[2], resolution=64, index=Path(sys.argv[3])))
        print(len(read), len(data), data.fingerprint)
    except ValueError as error:
        print("failed:", error)
"""


def opened_by_two(folder: Path, index: Path) -> list[str]:
    """Output line of each of two processes that open a folder together."""
    alias = str(PROCESS.parents[2] / "_alias.py")
    with meeting(2) as together:
        started = [
            subprocess.Popen(
                [sys.executable, "-c", COUNT, alias, str(folder), str(index)],
                env={**os.environ, **together, "RANK": rank, "LOCAL_RANK": rank},
                cwd=index.parent,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
            for rank in "01"
        ]
        return [process.communicate(timeout=120)[0].strip() for process in started]


def test_two_processes_read_each_file_of_a_folder_once_in_all(tmp_path: Path) -> None:
    for number in range(250):
        for kind in ("images", "hints"):
            write(tmp_path / "data" / kind / f"{number}.png", coordinates(16, 16, number))
    one, other = (line.split() for line in opened_by_two(tmp_path / "data", tmp_path / "index.json"))
    assert [one[0], other[0]] == ["500", "0"], "files read by each"
    assert one[1:] == other[1:] and one[1] == "250"


def test_two_processes_turn_a_parquet_file_once_and_read_each_picture_once(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
    pictures = [encoded(coordinates(16, 16, number)) for number in range(40)]
    held = {"image": pictures, "hint": pictures, "text": ["x"] * len(pictures)}
    datasets.Dataset.from_dict(held).to_parquet(str(tmp_path / "a.parquet"))
    one, other = (line.split() for line in opened_by_two(tmp_path / "a.parquet", tmp_path / "index.json"))
    assert [one[0], other[0]] == ["80", "0"] and one[1:] == other[1:] and one[1] == "40"
    assert len(list((tmp_path / "arrow").rglob("*.arrow"))) == 1


def test_a_folder_that_one_process_cannot_open_ends_both(tmp_path: Path) -> None:
    assert all("failed:" in line and "nowhere" in line for line in opened_by_two(tmp_path / "nowhere", tmp_path / "i"))
