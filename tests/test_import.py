"""What the import of the pack brings into the host's process."""

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
