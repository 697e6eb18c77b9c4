"""Observer of a run on its node: progress bar, a line of text, the loss curve, and the grid of the last validation."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import comfy.model_management
from comfy.utils import ProgressBar

from ...controlnext_core.comfy_adapter.feedback import tell

if TYPE_CHECKING:
    from PIL.Image import Image

PREVIEW_SIDE = 1024
"""Longest side in pixels of the picture that is sent during a run."""
SHARE, SECONDS = 0.05, 2.0
"""Limits on drawing the curve: largest share of the run's time, and fewest seconds between two drawings."""


class NodeObserver:
    """Observer that shows a run on its node; Cancel makes the run save and end."""

    def __init__(self, node_id: str | None) -> None:
        self.node_id = node_id
        self.bar: ProgressBar | None = None
        self.shown: Image | None = None
        """Grid of the last validation."""
        self.drawn: Image | None = None
        """Loss curve."""
        self.next_curve = 0.0

    def say(self, text: str) -> None:
        tell(text, self.node_id)

    def progress(self, step: int, steps: int, text: str) -> None:
        if self.bar is None or self.bar.total != steps:
            self.bar = ProgressBar(steps, node_id=self.node_id)
        tell(text, self.node_id)
        live = self.live()
        if not self.stopping():  # the host's bar raises at once where the run would save first
            self.bar.update_absolute(step, steps, None if live is None else ("JPEG", live, PREVIEW_SIDE))

    def picture(self, image: Image) -> None:
        self.shown = image
        self.next_curve = 0.0  # it has a new point

    def curve(self, draw: Callable[[], Image]) -> None:
        before = time.monotonic()
        if before >= self.next_curve:
            self.drawn = draw()
            now = time.monotonic()
            self.next_curve = now + max(SECONDS, (now - before) / SHARE)

    def stopping(self) -> bool:
        return bool(comfy.model_management.processing_interrupted())

    def live(self) -> Image | None:
        """Picture with the curve above the grid, at the width of the wider one; one of them, or None, where the rest is
        missing.
        """
        parts = [part for part in (self.drawn, self.shown) if part is not None]
        return stacked(parts) if parts else None


def stacked(parts: list[Image]) -> Image:
    """Pictures stacked vertically, all as wide as the widest."""
    from PIL import Image

    width = max(part.width for part in parts)
    sized = [part.resize((width, round(part.height * width / part.width)), Image.Resampling.LANCZOS) for part in parts]
    sheet = Image.new("RGB", (width, sum(part.height for part in sized)), "white")
    top = 0
    for part in sized:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet
