"""Results of a run: the trained file, pictures, and figures as text."""

from __future__ import annotations

import contextlib
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..controlnext_core import checkpoint
from ..controlnext_core.control_files import DTYPES
from ..controlnext_core.metadata import PREFIX, RECIPE_KEY
from . import journal as journals
from .config import TrainConfig
from .distributed import ProcessGroup
from .journal import Journal, Observer
from .plots import loss_curve
from .state import where_it_ends

if TYPE_CHECKING:
    from PIL.Image import Image

    from .base_model.controlled import Controlled
    from .validation import Validation

NAME_FILE = "run.txt"
CURVE = "loss.png"
WORSE = 1e-3
"""Relative difference of losses above which a control counts as worse than none, beyond rounding and noise."""
NO_EFFECT = 1e-4
"""Relative difference of losses with and without a control, below which it counts as without effect."""
RUN_KEY = f"{PREFIX}run"
"""Metadata key of a trained file: identity of the run that made it."""


@dataclass(frozen=True)
class RunFiles:
    """Paths and identity of one run."""

    folder: Path
    """Folder of states, log and pictures."""
    cache: Path
    """Folder of encoded samples, shared by all runs."""
    target: Path
    """Path of the trained file, without suffix."""
    base: str
    """Identity of the base model."""
    base_name: str = ""
    """Name of the base model for messages."""


def finished_file(
    controlled: Controlled, config: TrainConfig, files: RunFiles, losses: list[float], group: ProcessGroup
) -> Path:
    """Write the trained file, read it back, and return its path. A file of another run is never replaced."""
    path = None
    if group.is_main:
        facts = _facts(config, files, losses)
        stem = free_target(files, config)
        try:
            path = controlled.control.save(
                stem, controlled.differences, config.layout, DTYPES[config.save_dtype], facts
            )
            controlled.control.check(checkpoint.peek(path))
        except checkpoint.CheckpointError as error:
            raise checkpoint.CheckpointError(
                f"{error} The training itself is done and kept: {where_it_ends(files.folder)} Run again with resume on "
                "to write the file."
            ) from error
    (path, *_) = group.gather(path)
    assert path is not None
    return path


def free_target(files: RunFiles, config: TrainConfig) -> Path:
    """Path `target`, or target_2, ... where a file of that name belongs to another run."""
    stem, number = files.target, 1
    while not _is_free(stem, files):
        number += 1
        stem = files.target.with_name(f"{files.target.name}_{number}")
    return stem


def _is_free(stem: Path, files: RunFiles) -> bool:
    path = stem.with_name(f"{stem.name}.safetensors")
    held = [path] if path.exists() else sorted(stem.glob("*.safetensors")) if stem.is_dir() else []
    if not held:
        return not stem.exists()
    return any(_made_by(path) == _run_name(files) for path in held)


def _made_by(path: Path) -> str | None:
    try:
        return checkpoint.peek(path).metadata.get(RUN_KEY)
    except checkpoint.CheckpointError:
        return None


def _run_name(files: RunFiles) -> str:
    """Identity of the run, read from its folder."""
    return (files.folder / NAME_FILE).read_text("utf-8").strip()


def name_run(files: RunFiles) -> None:
    """Give a new run a unique name."""
    path = files.folder / NAME_FILE
    if not path.exists() or not path.read_text("utf-8").strip():
        path.write_text(secrets.token_hex(8), "utf-8")


def _facts(config: TrainConfig, files: RunFiles, losses: list[float]) -> dict[str, str]:
    last = losses[-100:]
    return {
        RUN_KEY: _run_name(files),
        f"{PREFIX}steps": str(config.steps),
        f"{PREFIX}loss": f"{sum(last) / max(1, len(last)):.6f}",
        f"{PREFIX}base": f"{files.base_name} {files.base}".strip(),
        RECIPE_KEY: config.to_shared_json(),
        "modelspec.date": time.strftime("%Y-%m-%d"),
    }


def show_validation(found: Validation, step: int, files: RunFiles, journal: Journal, observer: Observer) -> None:
    """Write the figures and pictures of a validation and pass them to the observer."""
    figures = {
        "loss": found.loss,
        "loss_without": found.loss_without,
        "effect": found.effect,
        "fidelity": found.fidelity,
        "fidelity_without": found.fidelity_without,
        "distance": found.distance,
        "distance_without": found.distance_without,
    }
    journal.write("validation", step, **{name: value for name, value in figures.items() if value is not None})
    text = f"validation after {step} steps: loss {found.loss:.4f} (without control {found.loss_without:.4f})"
    if found.fidelity is not None and found.fidelity_without is not None:
        text += f", follows the hint {found.fidelity:.2f} (without {found.fidelity_without:.2f})"
    observer.say(text)
    if found.effect < NO_EFFECT:
        observer.say(
            "warning: the control has no effect yet: with and without it the loss is the same. If that stays so, "
            "raise control_learning_rate or gain, and look whether the hints are empty."
        )
    elif found.loss > found.loss_without * (1 + WORSE):
        observer.say(
            "warning: the control is worse than without: the loss with it is higher. In the first steps that passes. "
            "If it stays so, look in the validation pictures whether hints belong to their pictures, and lower "
            "control_learning_rate or gain."
        )
    if found.grid is not None:
        path = files.folder / f"validation-{step:08d}.png"
        with journals.log_write_errors(path):
            found.grid.save(path)
        observer.picture(found.short or found.grid)
    with journals.log_write_errors(files.folder / CURVE):
        show_curve(files)


def curve_of(files: RunFiles) -> Image:
    """Loss curve of a run, from its log."""
    steps = journals.read(files.folder, "step", "loss")
    validated = journals.read(files.folder, "validation", "loss")
    without = journals.read(files.folder, "validation", "loss_without")
    return loss_curve(list(steps), list(steps.values()), list(validated.items()), without=list(without.items()))


def show_curve(files: RunFiles) -> Path:
    """Draw loss.png from the log; returns its path."""
    path = files.folder / CURVE
    curve_of(files).save(path)
    return path


def duration(seconds: float) -> str:
    """Duration in words, such as 12 s, 3 min or 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class StepClock:
    """Clock of the mean seconds per step since the last reading."""

    def __init__(self, step: int) -> None:
        self.restart(step)

    def restart(self, step: int) -> None:
        """Restart the clock at step `step`."""
        self.step, self.started = step, time.monotonic()

    def read(self, step: int) -> float:
        """Mean seconds per step since the last reading or restart."""
        seconds = (time.monotonic() - self.started) / (step - self.step)
        self.restart(step)
        return seconds


STATUS = Path("/proc/self/status")
"""Linux file with the peak memory of this process (VmHWM); writing 5 to clear_refs beside it resets the peak."""


def _highest() -> int:
    """Peak memory of this process in bytes; 0 where the system does not report it."""
    with contextlib.suppress(OSError):
        for line in STATUS.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0


class Meter:
    """Meter of time and peak memory since its creation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):
                STATUS.with_name("clear_refs").write_text("5")
        self.before = _highest()
        self.started = time.perf_counter()

    def read(self) -> tuple[float, int]:
        """Time and peak memory: (seconds, peak bytes), of a CUDA device, or of this process for all other devices.

        The peak of a process is known on Linux; elsewhere the current memory is returned. Some containers cannot reset
        the peak: there the reading counts only if it exceeds the value at the start.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter() - self.started, torch.cuda.max_memory_allocated(self.device)
        import psutil

        seconds, held = time.perf_counter() - self.started, int(psutil.Process().memory_info().rss)
        highest = _highest()
        return seconds, highest if highest > self.before else held
