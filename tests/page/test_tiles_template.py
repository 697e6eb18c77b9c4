"""Example graph of tiles: each tile uses its part of the hint, in one batch and one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from comfyui_controlnext.tests.page.test_workflows import SIZE, pictures, published, saved, shown, tiny_run

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer

__all__ = ["pictures", "published"]


def with_another_hint(workflow: dict[str, Any]) -> dict[str, Any]:
    """Workflow of tiles with a white square only in the last tile of the hint; latents do not change."""
    (cut,) = (key for key, node in workflow.items() if node["class_type"] == "ControlNeXtSplitTiles")
    (batches,) = (key for key, node in workflow.items() if node["class_type"] == "RebatchImages")
    (applied,) = (key for key, node in workflow.items() if node["class_type"] == "ControlNeXtApply")
    place = {"x": SIZE, "y": SIZE, "resize_source": False}
    whole = workflow[cut]["inputs"]["image"]
    white = {"width": SIZE // 2, "height": SIZE // 2, "batch_size": 1, "color": 0xFFFFFF}
    changed = {"destination": whole, "source": ["white", 0]} | place
    return workflow | {
        "white": {"class_type": "EmptyImage", "inputs": white},
        "changed": {"class_type": "ImageCompositeMasked", "inputs": changed},
        "cut": {**workflow[cut], "inputs": workflow[cut]["inputs"] | {"image": ["changed", 0]}},
        "batches": {**workflow[batches], "inputs": workflow[batches]["inputs"] | {"images": ["cut", 0]}},
        applied: {**workflow[applied], "inputs": workflow[applied]["inputs"] | {"image": ["batches", 0]}},
    }


@pytest.mark.comfy
@pytest.mark.parametrize("together", [1, 4])
def test_each_tile_has_its_own_part_of_the_hint(
    server: ComfyServer, published: dict[str, str], pictures: None, together: int
) -> None:
    """Four tiles of 64 in a side of 96, in one batch or one after the other: the ramp of the last one begins at 40."""
    workflow = tiny_run("demo_tiles", published)
    for node in workflow.values():
        if node["class_type"] == "RebatchImages":
            node["inputs"]["batch_size"] = together
        if node["class_type"] == "KSampler":
            node["inputs"]["seed"] += together  # else the host keeps what it has of the run of the template
    one, two = (shown(saved(server, graph))[0][0] for graph in (workflow, with_another_hint(workflow)))
    changed = (np.asarray(one) != np.asarray(two)).any(-1)
    begin = SIZE // 2 + 8
    assert not changed[:begin].any() and not changed[:, :begin].any(), "other tiles are drawn as before"
    assert changed[SIZE:, SIZE:].mean() > 0.5
