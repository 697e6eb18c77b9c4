"""Saved states of a run: folders that are complete or absent.

A state is written under another name and renamed when everything is on the disk, so a run that is killed at any moment
leaves its last state unchanged.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..controlnext_core import checkpoint

PREFIX = "state-"
FACTS = "state.json"
OPTIMIZER = "optimizer.pt"
"""File of the optimizer's `state_dict`, in the format of torch.save."""
UNFINISHED = ".unfinished-"
LOG = "log.jsonl"
BEGINNINGS = ("config.toml", "run.txt")
"""Names of a run's files, besides its log, that exist from its start."""


@dataclass(frozen=True)
class State:
    """Saved state of a run."""

    folder: Path
    facts: dict[str, Any]
    """Values given to `save` as `facts`, and `step`."""

    @property
    def step(self) -> int:
        return int(self.facts["step"])

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Tensors of one part of the state; {} where the state lacks it. Raises CheckpointError."""
        path = self.folder / f"{part}.safetensors"
        return checkpoint.load(path) if part in self.facts["parts"] else {}

    def optimizer(self) -> dict[str, Any]:
        """State of the optimizer (`state_dict`), on the CPU. Raises CheckpointError."""
        path = self.folder / OPTIMIZER
        if not path.exists():  # a state of version 0.1.0: tensors here, and the rest as JSON
            return dict(_unpacked(self.tensors("optimizer"), self.facts["optimizer"]))
        try:
            return dict(torch.load(path, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise checkpoint.CheckpointError(
                f"{path}: cannot be read ({error}). Delete {self.folder} and run again: the run resumes from the "
                "previous state."
            ) from error


def _unpacked(tensors: Mapping[str, Tensor], packed: Any) -> Any:
    """Value of an optimizer's state in the format of version 0.1.0: {kind: content} where JSON has no such kind."""
    if isinstance(packed, list):
        return [_unpacked(tensors, item) for item in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "float":
        return float(value)
    if kind == "tuple":
        return tuple(_unpacked(tensors, item) for item in value)
    return {_unpacked(tensors, key): _unpacked(tensors, item) for key, item in value}


def save(
    run: Path,
    step: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    optimizer: Mapping[str, Any],
    facts: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the state after `step` steps into the run's folder, then delete all but the newest `keep` complete ones.

    parts: name -> tensors; optimizer: its `state_dict`; facts: values for JSON. Raises CheckpointError where the disk
    is full or the folder cannot be written; earlier states are then unchanged.
    """
    final = run / f"{PREFIX}{step:08d}"
    if _read(final) is not None:
        return final
    temporary = run / f"{UNFINISHED}{os.getpid()}-{final.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        held = {name: tensors for name, tensors in parts.items() if tensors}
        for name, tensors in held.items():
            checkpoint.save(temporary / f"{name}.safetensors", tensors, {})
        sizes = {name: (temporary / f"{name}.safetensors").stat().st_size for name in held}
        with open(temporary / OPTIMIZER, "wb") as file:
            torch.save(dict(optimizer), file)
            _to_disk(file)
        facts = {**facts, "optimizer_bytes": (temporary / OPTIMIZER).stat().st_size}
        _write(temporary / FACTS, json.dumps({**facts, "step": step, "parts": sizes}, ensure_ascii=False, indent=1))
        _sync_folder(temporary)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one, or none
        os.replace(temporary, final)
        _sync_folder(run)
    except (OSError, RuntimeError, checkpoint.CheckpointError) as error:  # RuntimeError: of torch.save
        reason = error.__cause__ or error  # for a part that could not be written: the system's message
        raise checkpoint.CheckpointError(
            f"{final}: could not be saved ({reason}). {where_it_ends(run)} Free some disk space or set another "
            "runs_folder (and move the run there), then run again with resume on."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _clear(run, keep)
    return final


def latest(run: Path) -> State | None:
    """Newest complete state of a run; damaged ones are skipped."""
    for folder in _folders(run):
        facts = _read(folder)
        if facts is not None:
            return State(folder, facts)
    return None


def where_it_ends(run: Path) -> str:
    """Sentence that names the last saved state."""
    state = latest(run)
    return f"The last saved state is {state.folder}." if state else "No state was saved yet."


def clear_unfinished(run: Path) -> None:
    """Remove unfinished states of an earlier process. Only the process with the run's lock may call this."""
    for folder in run.glob(f"{UNFINISHED}*"):
        shutil.rmtree(folder, ignore_errors=True)


def set_aside(run: Path) -> Path | None:
    """Rename the folder of an earlier run, so that a new one may start; returns its new path, None without an earlier
    run.

    A run that ended before its first state has left no work: its folder is used again.
    """
    if not run.exists() or _is_bare(run):
        return None
    number = 1
    while (aside := run.with_name(f"{run.name} ({number})")).exists():
        number += 1
    os.replace(run, aside)
    return aside


def _is_bare(run: Path) -> bool:
    """True: a folder has only the first files of a run and no work: no state, no picture, no end in its log.

    False: it has some.
    """
    names = {path.name for path in run.iterdir() if not path.name.startswith(UNFINISHED)}
    log = run / LOG
    return names <= {LOG, *BEGINNINGS} and not (log.is_file() and '"finished"' in log.read_text("utf-8", "replace"))


def _folders(run: Path) -> list[Path]:
    """Folders of states, newest first."""
    numbered = (path for path in run.glob(f"{PREFIX}*") if path.is_dir() and path.name[len(PREFIX) :].isdecimal())
    return sorted(numbered, key=lambda path: int(path.name[len(PREFIX) :]), reverse=True)


def _clear(run: Path, keep: int) -> None:
    """Delete damaged states, and complete ones but for the newest `keep`."""
    whole = [folder for folder in _folders(run) if _read(folder) is not None]
    for folder in _folders(run):
        if folder not in whole[:keep]:
            _delete(folder)


def _read(folder: Path) -> dict[str, Any] | None:
    """Facts of a complete state, or None. Checks sizes and headers, not every byte."""
    try:
        facts = json.loads((folder / FACTS).read_text("utf-8"))
        int(facts["step"])
        for name, size in facts["parts"].items():
            path = folder / f"{name}.safetensors"
            if path.stat().st_size != size:
                return None
            checkpoint.peek(path)
        if (size := facts.get("optimizer_bytes")) is not None and (folder / OPTIMIZER).stat().st_size != size:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # CheckpointError is a ValueError
        return None
    return dict(facts)


def _delete(folder: Path) -> None:
    """Remove a state; a partly removed one no longer counts as a state."""
    gone = folder.with_name(f"{UNFINISHED}{folder.name}")
    with contextlib.suppress(OSError):  # another program has it open: next time
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        _to_disk(file)


def _to_disk(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Flush the rename to the disk, where folders can be opened."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
