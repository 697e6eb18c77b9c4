"""Parts shared by all stages: saved state, journal, average of weights, and pauses."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..environment import ROOT
from ..tiny_models.storage import write_atomically
from .muon import Muon
from .packing import unpack

FOLDER = ROOT / ".cache" / "demo_weights"
SAVE_EVERY = 180.0  # seconds
SAY_EVERY = 25  # steps
WARMUP, FALL = 30, 0.35  # steps of the rise of a slice's learning rate, and share of its time for the decay
PAUSE_VARIABLE = "CONTROLNEXT_PAUSE_FILE"  # name of a file; while it exists, training waits


class StageRun:
    """Run of one stage: its folder, journal (JSON lines) and state. Files are written atomically."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        self.name, self.folder = name, (folder or FOLDER) / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.state_file = self.folder / "state.pt"
        self._saved = time.monotonic()

    def say(self, **facts: Any) -> None:
        """Write one line to the journal and to the screen."""
        line = json.dumps({"at": round(time.time(), 1), "stage": self.name, **facts})
        print(line, flush=True)
        with (self.folder / "journal.jsonl").open("a", encoding="utf-8") as journal:
            journal.write(line + "\n")

    def load(self) -> dict[str, Any] | None:
        """Last saved state, or None."""
        if not self.state_file.is_file():
            return None
        return torch.load(self.state_file, map_location="cpu", weights_only=True)

    def save(self, state: Mapping[str, Any]) -> None:
        write_atomically(self.state_file, lambda file: torch.save(dict(state), file))
        self._saved = time.monotonic()

    def is_time_to_save(self) -> bool:
        return time.monotonic() - self._saved > SAVE_EVERY


def wait_while_paused() -> float:
    """Sleep while the file named by PAUSE_VARIABLE exists; returns the seconds slept."""
    name, slept = os.environ.get(PAUSE_VARIABLE), 0.0
    while name and Path(name).exists():
        time.sleep(2.0)
        slept += 2.0
    return slept


def unpaused_steps(start: int, stop: int) -> Iterator[tuple[int, float]]:
    """Yield (step, seconds of the steps before it in this process), waiting while paused."""
    clock = time.monotonic()
    for step in range(start, stop):
        clock += wait_while_paused()
        yield step, time.monotonic() - clock


def cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: a linear rise, then half a cosine down to a hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Average:
    """Exponential moving average of a module's parameters, fast at first: decay = min(decay, (1 + n) / (10 + n))."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.weights = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        self.count += 1
        for name, value in module.named_parameters():
            self.weights[name].lerp_(value, 1 - decay)

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "weights": self.weights}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.count, self.weights = int(state["count"]), dict(state["weights"])


class Slice:
    """Slice of a training, with a fixed duration: the network, its optimizer, and their progress.

    The learning rate falls to zero at the end, and the next slice continues from its weights.
    """

    def __init__(self, stage: StageRun, model: nn.Module, optimizer: Muon, decay: float) -> None:
        """decay: of the average of the weights."""
        self.stage, self.model, self.optimizer, self.decay = stage, model, optimizer, decay
        self.step, self.spent, self.number, self.first = 0, 0.0, 0, 0

    def go_on(self, seconds: float, packed: Path) -> None:
        """Restore the last state, else the weights of `packed` where that file exists, else begin.

        A slice that was stopped before `seconds` is resumed; after a complete one another begins.
        """
        state = self.stage.load()
        if state is None:
            if packed.is_file():
                found = unpack(load_file(packed))
                self.model.load_state_dict({name: value.float() for name, value in found.items()}, strict=False)
            self.average = Average(self.model, self.decay)
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.spent, self.number, self.first = (state[key] for key in ("step", "spent", "number", "first"))
        self.average = Average(self.model, self.decay)
        if self.spent < seconds:
            self.average.restore(state["average"])
        else:
            self.spent, self.number, self.first = 0.0, self.number + 1, self.step

    def steps(self, seconds: float, loss: Callable[[], Tensor]) -> Iterator[int]:
        """Train to the end of the slice; yields the number of steps after each."""
        self.stage.say(event="start", step=self.step, slice=self.number)
        total, clock, began = 0.0, time.monotonic(), self.spent
        while self.spent < seconds:
            clock += wait_while_paused()
            error = loss()
            error.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step(rate_at(self.spent / seconds, self.step - self.first))
            self.optimizer.zero_grad()
            self.average.update(self.model)
            total, self.step = total + error.item(), self.step + 1
            self.spent = began + time.monotonic() - clock
            if self.step % SAY_EVERY == 0:
                self.stage.say(step=self.step, loss=round(total / SAY_EVERY, 5), seconds=round(self.spent, 1))
                total = 0.0
            if self.stage.is_time_to_save() or self.spent >= seconds:
                self._save()
            yield self.step

    def _save(self) -> None:
        kept: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        kept |= {"average": self.average.state(), "step": self.step, "spent": self.spent, "number": self.number}
        self.stage.save({**kept, "first": self.first})


def rate_at(share: float, step: int) -> float:
    """Factor of the learning rates; share: elapsed share of the slice's time.

    A fast rise, a plateau, a decay in the last FALL.
    """
    return min(1.0, (step + 1) / WARMUP, max(0.02, (1 - share) / FALL))


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, average: Average, step: int) -> dict[str, Any]:
    """State from which a stage resumes."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average.state(),
        "step": step,
    }


def picture_grid(pictures: Tensor, path: Path, columns: int = 8) -> Path:
    """Write pictures (N, H, W, 3) in [0, 1] as one PNG, `columns` in a row; the last row is filled with white."""
    from PIL import Image

    missing = -len(pictures) % columns
    pictures = torch.cat([pictures, torch.ones(missing, *pictures.shape[1:])])
    rows = [torch.cat(list(row), dim=1) for row in pictures.split(columns)]
    array = (torch.cat(rows).clamp(0, 1) * 255).round().byte().numpy()
    return write_atomically(path, lambda file: Image.fromarray(array).save(file, "PNG"))
