"""Log of a run as JSON lines and TensorBoard events, and the protocol of its observer (console or node)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..controlnext_core import encodable
from .state import LOG

if TYPE_CHECKING:
    from PIL.Image import Image

logger = encodable.logger(__name__)


class Observer(Protocol):
    """Observer of a run: receives its progress and decides when it stops."""

    def say(self, text: str) -> None:
        """Show a line to the user."""

    def progress(self, step: int, steps: int, text: str) -> None:
        """Show progress of a phase: step of steps, and a line of text."""

    def picture(self, image: Image) -> None:
        """Show the grid of a validation's pictures."""

    def curve(self, draw: Callable[[], Image]) -> None:
        """Offer the updated loss curve; `draw` takes a fraction of a second."""

    def stopping(self) -> bool:
        """True: the run has to save and end. False: it continues."""


class Journal:
    """Log file of a run, written only by rank 0."""

    def __init__(self, folder: Path, writes: bool, tensorboard: bool) -> None:
        self.path = folder / LOG
        self.writes = writes
        self.events = _tensorboard(folder) if tensorboard and writes else None
        self.started = time.time()
        if writes:
            with log_write_errors(self.path):
                _end_cut_line(self.path)

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append one line: the event, the number of steps before it, and further values."""
        if not self.writes:
            return
        line = {"event": event, "step": step, "seconds": round(time.time() - self.started, 3), **values}
        with log_write_errors(self.path):
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(_plain(line), ensure_ascii=False) + "\n")
        if self.events is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.events.add_scalar(f"{event}/{name}", value, step)

    def close(self) -> None:
        if self.events is not None:
            self.events.close()


@contextlib.contextmanager
def log_write_errors(path: Path) -> Iterator[None]:
    """Context in which an OSError (a full disk) is logged and does not end the run."""
    try:
        yield
    except OSError as error:
        logger.warning("%s: could not be written (%s). Training continues; free some disk space.", path, error)


def read(folder: Path, event: str, key: str) -> dict[int, float]:
    """Values by step, from the lines of one event; of a step that was run twice, the later value."""
    path = folder / LOG
    found = {}
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
        except ValueError:  # truncated by a crash
            continue
        if values.get("event") == event and isinstance(values.get(key), (int, float)):
            found[int(values["step"])] = float(values[key])
    return dict(sorted(found.items()))


def _end_cut_line(path: Path) -> None:
    """Remove a line that a crash has truncated, so that every line of the log is JSON."""
    content = path.read_bytes() if path.is_file() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Values with NaN and infinity as None, since JSON has none."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("tensorboard is not installed: only %s is written. Run `pip install tensorboard`.", LOG)
        return None
    return SummaryWriter(str(folder / "tensorboard"))
