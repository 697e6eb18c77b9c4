"""Parts shared by all stages: saved state, journal, average of weights, and pauses."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..environment import ROOT
from ..tiny_models.storage import write_atomically

FOLDER = ROOT / ".cache" / "demo_weights"
SAVE_EVERY = 180.0  # seconds
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
