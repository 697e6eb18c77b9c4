"""Saved states of a run: folders that are there whole or not at all.

A state is written under another name and renamed when everything is on the disk, so a run that is killed at any
moment leaves its last state as it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..controlnext_core import checkpoint

PREFIX = "state-"
FACTS = "state.json"
UNFINISHED = ".unfinished-"
LOG = "log.jsonl"
BEGINNINGS = ("config.toml", "run.txt")
"""Files of a run, besides its log, that are there from its start."""


@dataclass(frozen=True)
class State:
    """A saved state."""

    folder: Path
    facts: dict[str, Any]
    """What `save` was given, with `step`."""

    @property
    def step(self) -> int:
        return int(self.facts["step"])

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part, {} where the state has none. Raises CheckpointError."""
        path = self.folder / f"{part}.safetensors"
        return checkpoint.load(path) if part in self.facts["parts"] else {}


def save(run: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any], keep: int) -> Path:
    """Write the state after `step` steps into the run's folder, then delete all but the newest `keep` whole ones.

    parts: name -> tensors; facts: what JSON holds. Raises CheckpointError where the disk is full or the folder cannot
    be written; earlier states are then untouched.
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
        _write(temporary / FACTS, json.dumps({**facts, "step": step, "parts": sizes}, ensure_ascii=False, indent=1))
        _sync_folder(temporary)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one, or none
        os.replace(temporary, final)
        _sync_folder(run)
    except (OSError, checkpoint.CheckpointError) as error:
        reason = error.__cause__ or error  # of a part that could not be written: the system's own words
        raise checkpoint.CheckpointError(
            f"{final}: could not be saved ({reason}). {where_it_ends(run)} Free some disk space or set another "
            "runs_folder (and move the run there), then run again with resume on."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _clear(run, keep)
    return final


def latest(run: Path) -> State | None:
    """The newest whole state of a run; damaged ones are passed over."""
    for folder in _folders(run):
        facts = _read(folder)
        if facts is not None:
            return State(folder, facts)
    return None


def where_it_ends(run: Path) -> str:
    """The last saved state, in words."""
    state = latest(run)
    return f"The last saved state is {state.folder}." if state else "No state was saved yet."


def clear_unfinished(run: Path) -> None:
    """Remove what an earlier process left half written. Only for the process that owns the run."""
    for folder in run.glob(f"{UNFINISHED}*"):
        shutil.rmtree(folder, ignore_errors=True)


def set_aside(run: Path) -> Path | None:
    """Rename the folder of an earlier run, so that a new one may start; its new path, None where there was none.

    A run that ended before its first state has left nothing: its folder is used again.
    """
    if not run.exists() or _is_bare(run):
        return None
    number = 1
    while (aside := run.with_name(f"{run.name} ({number})")).exists():
        number += 1
    os.replace(run, aside)
    return aside


def _is_bare(run: Path) -> bool:
    """Whether a folder holds the beginnings of a run and no work: no state, no picture, no end in its log."""
    names = {path.name for path in run.iterdir() if not path.name.startswith(UNFINISHED)}
    log = run / LOG
    return names <= {LOG, *BEGINNINGS} and not (log.is_file() and '"finished"' in log.read_text("utf-8", "replace"))


def _folders(run: Path) -> list[Path]:
    """Newest first."""
    numbered = (path for path in run.glob(f"{PREFIX}*") if path.is_dir() and path.name[len(PREFIX) :].isdecimal())
    return sorted(numbered, key=lambda path: int(path.name[len(PREFIX) :]), reverse=True)


def _clear(run: Path, keep: int) -> None:
    """Delete damaged states, and whole ones but for the newest `keep`."""
    whole = [folder for folder in _folders(run) if _read(folder) is not None]
    for folder in _folders(run):
        if folder not in whole[:keep]:
            _delete(folder)


def _read(folder: Path) -> dict[str, Any] | None:
    """The facts of a whole state, or None. Looks at sizes and headers, not at every byte."""
    try:
        facts = json.loads((folder / FACTS).read_text("utf-8"))
        int(facts["step"])
        for name, size in facts["parts"].items():
            path = folder / f"{name}.safetensors"
            if path.stat().st_size != size:
                return None
            checkpoint.peek(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # CheckpointError is a ValueError
        return None
    return dict(facts)


def _delete(folder: Path) -> None:
    """Remove a state; half removed, it is no state any more."""
    gone = folder.with_name(f"{UNFINISHED}{folder.name}")
    with contextlib.suppress(OSError):  # somebody has it open: next time
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Have the rename reach the disk, where folders can be opened."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
