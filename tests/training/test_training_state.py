"""Saved states: complete or absent, after any failure while they are written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.controlnext_core.checkpoint import CheckpointError
from comfyui_controlnext.controlnext_training import results, state
from comfyui_controlnext.controlnext_training.config import ConfigError, TrainConfig
from comfyui_controlnext.controlnext_training.journal import Journal, read
from comfyui_controlnext.controlnext_training.results import RunFiles, free_target, name_run
from comfyui_controlnext.controlnext_training.run_lock import run_lock
from safetensors import SafetensorError
from torch import Tensor

if TYPE_CHECKING:
    pass

FULL = OSError(errno.ENOSPC, "No space left on device")


def parts(step: int) -> dict[str, dict[str, Tensor]]:
    return {"weights": {"a": torch.full((4, 3), float(step))}, "losses": {"loss": torch.arange(9).double()}}


def save(run: Path, *steps: int, keep: int = 10) -> None:
    run.mkdir(exist_ok=True)
    for step in steps:
        state.save(run, step, {**parts(step), "ema": {}}, {}, {"seed": 5}, keep)


def states(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


# -- a state ------------------------------------------------------------------------------------------------------


def test_the_newest_state_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    assert state.latest(tmp_path) is None
    save(tmp_path, 3, 12)
    found = state.latest(tmp_path)
    assert found is not None and (found.step, found.facts["seed"]) == (12, 5)
    for name, tensors in parts(12).items():
        assert all(torch.equal(tensor, found.tensors(name)[key]) for key, tensor in tensors.items())
    assert found.tensors("ema") == {}
    assert state.where_it_ends(tmp_path) == f"The last saved state is {tmp_path / 'state-00000012'}."


def test_the_newest_keep_states_stay(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 15, 20, keep=2)
    assert states(tmp_path) == ["state-00000015", "state-00000020"]
    save(tmp_path, 200_000_000, keep=1)  # more digits than the names are padded to
    assert states(tmp_path) == ["state-200000000"]


def damage_nothing_there(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()


def damage_cut_off(folder: Path) -> None:
    os.truncate(folder / "weights.safetensors", 20)


def damage_zeros(folder: Path) -> None:
    path = folder / "losses.safetensors"
    path.write_bytes(bytes(path.stat().st_size))


def damage_no_json(folder: Path) -> None:
    (folder / "state.json").write_text('{"step": 20, "parts', "utf-8")


def damage_other_json(folder: Path) -> None:
    (folder / "state.json").write_text("[1]", "utf-8")


DAMAGES = (damage_nothing_there, damage_cut_off, damage_zeros, damage_no_json, damage_other_json)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_state_is_passed_over_and_never_counts(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    save(tmp_path, 10, 20)
    damage(tmp_path / "state-00000020")
    found = state.latest(tmp_path)
    assert found is not None and found.step == 10
    save(tmp_path, 15, keep=1)  # were the damaged one counted, this would be deleted
    assert states(tmp_path) == ["state-00000015"]
    save(tmp_path, 20, keep=2)
    assert states(tmp_path) == ["state-00000015", "state-00000020"]


def test_what_is_no_state_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "state-of-the-art").mkdir()
    (tmp_path / "notes.txt").write_text("mine", "utf-8")
    save(tmp_path, 1, 2, keep=1)
    assert states(tmp_path) == ["notes.txt", "state-00000002", "state-of-the-art"]


def test_what_a_killed_process_left_half_written_is_cleared(tmp_path: Path) -> None:
    save(tmp_path, 1)
    half = tmp_path / ".unfinished-123-state-00000002"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    assert state.latest(tmp_path).step == 1  # type: ignore[union-attr]
    state.clear_unfinished(tmp_path)
    assert states(tmp_path) == ["state-00000001"]


# -- disks --------------------------------------------------------------------------------------------------------


def half_then(error: Exception) -> Callable[..., None]:
    """Stand-in for save_file that leaves half a file behind, as a full disk does."""

    def fail(tensors: Any, name: str, metadata: Any) -> None:
        Path(name).write_bytes(b"half")
        raise error

    return fail


def raising(error: Exception) -> Callable[..., None]:
    def fail(*args: Any, parents: bool = False) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("where", "how"),
    [
        ("comfyui_controlnext.controlnext_core.checkpoint.save_file", half_then(FULL)),
        ("comfyui_controlnext.controlnext_core.checkpoint.save_file", half_then(SafetensorError("I/O: No space left"))),
        ("os.fsync", raising(FULL)),
        ("os.replace", raising(FULL)),
        ("pathlib.Path.mkdir", raising(OSError(errno.EACCES, "no space left, or no permission"))),
    ],
)
def test_a_full_disk_leaves_the_last_state_and_the_message_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, how: Any
) -> None:
    save(tmp_path, 10)
    with monkeypatch.context() as patch:
        patch.setattr(where, how)
        with pytest.raises(CheckpointError) as raised:
            state.save(tmp_path, 20, parts(20), {}, {}, 1)
    message = str(raised.value)
    assert "state-00000020: could not be saved" in message and "no space left" in message.lower()
    assert f"The last saved state is {tmp_path / 'state-00000010'}." in message and "resume" in message
    assert states(tmp_path) == ["state-00000010"]
    save(tmp_path, 20, keep=1)
    assert states(tmp_path) == ["state-00000020"]


def test_a_folder_that_cannot_be_written_is_named_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", "utf-8")
    with (
        pytest.raises(ConfigError, match=r"runs_folder: .*file.* cannot be written"),
        run_lock(tmp_path / "file" / "r"),
    ):
        pass


def test_a_full_disk_ends_the_log_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "log.jsonl").mkdir()  # cannot be written, on every system
    Journal(tmp_path, True, False).write("step", 1, loss=0.5)
    assert "Training continues" in caplog.text


def test_the_log_goes_on_behind_a_line_that_was_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path, True, False)
    journal.write("step", 1, loss=0.5, gradient=float("nan"))
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write('{"event": "step", "step": 2, "loss": 0.4, "what": "\u00e9'.encode()[:-1])
    assert read(tmp_path, "step", "loss") == {1: 0.5}
    Journal(tmp_path, True, False).write("step", 2, loss=0.25)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 0.25)]
    assert lines[0]["gradient"] is None, "JSON has no NaN"
    Journal(tmp_path, False, False).write("step", 3, loss=0.1)
    assert read(tmp_path, "step", "loss") == {1: 0.5, 2: 0.25}, "only the first process writes"


# -- runs and files of other runs ---------------------------------------------------------------------------------


def test_an_old_run_is_set_aside_and_never_replaced(tmp_path: Path) -> None:
    run = tmp_path / "r\u00fcn"
    assert state.set_aside(run) is None
    save(run, 1)
    assert state.set_aside(run) == tmp_path / "r\u00fcn (1)"
    save(run, 2)
    assert state.set_aside(run) == tmp_path / "r\u00fcn (2)"
    assert not run.exists() and states(tmp_path / "r\u00fcn (1)") == ["state-00000001"]


@pytest.mark.parametrize(("event", "bare"), [("step", True), ("finished", False)])
def test_the_folder_of_a_run_that_came_to_nothing_is_used_again(tmp_path: Path, event: str, bare: bool) -> None:
    run = tmp_path / "run"
    (run / ".unfinished-1-state-00000001").mkdir(parents=True)
    for name in ("config.toml", "run.txt"):
        (run / name).write_text("x", "utf-8")
    Journal(run, True, False).write(event, 1)
    assert (state.set_aside(run) is None) == bare
    assert run.exists() == bare


def test_one_process_trains_a_run_at_a_time(tmp_path: Path) -> None:
    with run_lock(tmp_path / "a"):
        with pytest.raises(ConfigError, match="in progress in another process.*output_name"), run_lock(tmp_path / "a"):
            pass
        with run_lock(tmp_path / "b"):
            pass
    with run_lock(tmp_path / "a"):
        pass


def run_called(folder: Path, name: str) -> RunFiles:
    run = RunFiles(folder / "runs" / name, folder, folder / "out" / "control", "base")
    run.folder.mkdir(parents=True)
    name_run(run)
    return run


@pytest.mark.parametrize("file", ["control.safetensors", "control/controlnet.safetensors"])
def test_the_trained_file_of_another_run_is_never_replaced(tmp_path: Path, file: str) -> None:
    first, second = run_called(tmp_path, "first"), run_called(tmp_path, "second")
    out, config = tmp_path / "out", TrainConfig()
    assert free_target(first, config) == out / "control"
    own = (first.folder / "run.txt").read_text("utf-8")
    checkpoint.save(out / file, {"a": torch.zeros(1)}, {results.RUN_KEY: own})
    name_run(first)  # when it is resumed
    assert free_target(first, config) == out / "control"
    assert free_target(second, config) == out / "control_2"
    (out / "control_2.safetensors").write_bytes(b"of somebody else, and no weights")
    assert free_target(second, config) == out / "control_3"


def test_files_can_be_read_by_those_who_can_read_others(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"")
    saved = checkpoint.save(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {})
    assert saved.stat().st_mode == (tmp_path / "other").stat().st_mode
