"""Modules that the pack's import loads into the host's process."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfyui_controlnext.benchmarks.bench_import import measure


@pytest.mark.comfy
def test_the_pack_imports_nothing_that_the_host_has_not(host: Path) -> None:
    """cv2, diffusers, kornia and the like are imported when they are used, if at all."""
    _, _, count, foreign = measure(host)
    assert foreign == "-"
    assert int(count) >= 5


@pytest.mark.comfy
def test_training_can_be_switched_off(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for value in ("1", "0"):
        monkeypatch.setenv("CONTROLNEXT_TRAINING", value)
        counts.append(int(measure(host)[2]))
    assert counts[0] - counts[1] == 3
