"""Train Control on hosts that drop outputs and run nodes again: it finds its finished run and gives
the same results.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.checkpoint import load
from comfyui_controlnext.tests.training.test_training_nodes import graph, latents, node, server_log, shapes
from torch import Tensor

if TYPE_CHECKING:
    from comfyui_controlnext.tests.conftest import TinyModels
    from comfyui_controlnext.tools.comfy_server import ComfyServer

__all__ = ["shapes"]  # a fixture
pytestmark = pytest.mark.comfy
STEPS = 4


def outputs(server: ComfyServer, workflow: dict[str, Any]) -> tuple[Path, list[float], Tensor, dict[str, Tensor]]:
    """Path, losses, latent of the trained model and control, and tensors of the file, from one queue run."""
    run = server.run(workflow)
    path = Path(run.outputs["path"]["text"][0])
    losses = json.loads(run.outputs["losses"]["text"][0])["loss"]
    return path, losses, latents(server, run), load(path)


def assert_trains_once(server: ComfyServer, workflow: dict[str, Any], between: Any = lambda: None) -> None:
    """Queue a graph twice: assert that the second run trains nothing, and that every output is the same."""
    workflow["losses"] = node("PreviewAny", source=["train", 2])
    start = len(server.log_lines())
    path, losses, latent, tensors = outputs(server, workflow)
    assert "one step takes" in server_log(server, start) and len(losses) == STEPS
    between()
    start = len(server.log_lines())
    again = outputs(server, workflow)
    log = server_log(server, start)
    assert f"resumed at step {STEPS} from" in log, "the node ran again"
    assert "one step takes" not in log and f"step {STEPS}/{STEPS}" not in log
    assert again[0] == path and again[1] == losses and torch.equal(again[2], latent)
    assert again[3].keys() == tensors.keys() and all(torch.equal(again[3][name], tensors[name]) for name in tensors)
    assert not path.with_name(f"{path.stem}_2.safetensors").exists()


def test_a_node_whose_outputs_were_dropped_finds_its_finished_run(
    server: ComfyServer, tiny: TinyModels, shapes: str
) -> None:
    def drop() -> None:
        for _ in range(2):  # the host's thread misses a request that comes just before it goes to sleep
            server.free()
            time.sleep(1.0)  # it does so when it next looks at its queue

    assert_trains_once(server, graph(tiny, shapes, output_name="again", steps=STEPS), drop)


@pytest.mark.long
@pytest.mark.parametrize("caching", [["--cache-none"], ["--cache-ram", "1000"]])
def test_a_server_that_keeps_no_outputs_trains_once(
    host: Path, tiny: TinyModels, shapes: str, tmp_path: Path, caching: list[str]
) -> None:
    """A threshold of 1000 GB of free memory drops every output as soon as it may."""
    from comfyui_controlnext.tools.comfy_server import ComfyServer

    shutil.copytree(tiny.base / "input" / shapes, tmp_path / "input" / shapes)
    arguments = ["--cpu", "--disable-api-nodes", *caching]
    started = ComfyServer.start(host, tmp_path, models=tiny.models, arguments=arguments, log=tmp_path / "server.log")
    with started as running:
        assert_trains_once(running, graph(tiny, shapes, output_name="again", steps=STEPS))
