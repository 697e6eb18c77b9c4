"""Meters of training steps: time and peak memory."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import torch

WARM_UP = 1
"""Number of steps that are not counted."""


@dataclass
class Times:
    """Times at which steps ended, by the wall clock and by the processor's."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def note(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter())
        self.processor.append(time.process_time())

    def of_steps(self) -> dict[str, list[float]]:
        """Seconds of each step after the warm-up."""
        return {
            name: [after - before for before, after in zip(ends, ends[1:], strict=False)][WARM_UP:]
            for name, ends in (("wall", self.wall), ("processor", self.processor))
        }


class Peak:
    """Peak memory within a `with` block: of the GPU, or of this process."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.highest, self.on = device, 0, True

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def _watch(self) -> None:
        import psutil

        process = psutil.Process()
        while self.on:
            self.highest = max(self.highest, process.memory_info().rss)
            time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        self.on = False
        if self.device.type == "cuda":
            self.highest = torch.cuda.max_memory_allocated(self.device)
