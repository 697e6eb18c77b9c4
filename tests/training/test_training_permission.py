"""Refusal of training: the rule, the node in this process, and a graph queued on a real worker."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from comfyui_controlnext.controlnext_training.permission import refusal
from comfyui_controlnext.tools.comfy_client import PromptError

if TYPE_CHECKING:
    from comfyui_controlnext.tests.conftest import TinyModels


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({"CONTROLNEXT_NO_TRAINING": "1"}, "CONTROLNEXT_NO_TRAINING=1"),
        ({"CONTROLNEXT_NO_TRAINING": "yes"}, "CONTROLNEXT_NO_TRAINING=yes"),
        ({"COMFYUI_IS_WORKER": "1"}, "CONTROLNEXT_NO_TRAINING=0"),
        ({"COMFYUI_IS_WORKER": "1", "CONTROLNEXT_NO_TRAINING": " "}, "COMFYUI_IS_WORKER"),
    ],
)
def test_a_worker_does_not_train_and_says_what_to_set(environment: dict[str, str], names: str) -> None:
    assert names in (refusal(environment) or "")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"CONTROLNEXT_NO_TRAINING": ""},
        {"CONTROLNEXT_NO_TRAINING": "0"},
        {"COMFYUI_IS_WORKER": "0"},
        {"COMFYUI_IS_WORKER": "1", "CONTROLNEXT_NO_TRAINING": "0"},
    ],
    ids=str,
)
def test_other_hosts_train(environment: dict[str, str]) -> None:
    assert refusal(environment) is None


@pytest.mark.comfy
def test_the_node_refuses_before_it_reads_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from comfyui_controlnext.controlnext_training.config import ConfigError
    from comfyui_controlnext.controlnext_training.nodes.trainer import ControlNeXtTrain

    assert ControlNeXtTrain.validate_inputs(variant="sd15", config="") is True
    monkeypatch.setenv("CONTROLNEXT_NO_TRAINING", "1")
    assert "CONTROLNEXT_NO_TRAINING=1" in str(ControlNeXtTrain.validate_inputs(variant="sd15", config="not TOML ["))
    names = ("clone", "model", "model_options", "encode", "decode", "settings", "open")
    hollow = SimpleNamespace(**dict.fromkeys(names))  # whatever is read of it raises another error
    with pytest.raises(ConfigError, match="CONTROLNEXT_NO_TRAINING=1"):
        ControlNeXtTrain.execute(hollow, hollow, hollow, "sd15", 1, 1, 1e-4, 1e-4, 0, "worker")


@pytest.mark.comfy
def test_a_worker_refuses_a_graph_that_trains_and_runs_one_that_does_not(
    host: Path, tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal comes with the queueing: nothing of the graph runs, and no file of a run appears."""
    from comfyui_controlnext.tests.training.test_training_nodes import graph, plain_graph
    from comfyui_controlnext.tools.comfy_server import ComfyServer

    monkeypatch.setenv("COMFYUI_IS_WORKER", "1")
    arguments = ["--cpu", "--disable-api-nodes"]
    with ComfyServer.start(
        host, tmp_path / "worker", models=tiny.models, arguments=arguments, log=tmp_path / "worker.log"
    ) as worker:
        with pytest.raises(PromptError, match="COMFYUI_IS_WORKER") as raised:
            worker.queue(graph(tiny, "pictures"))
        assert list(raised.value.node_errors) == ["train"]
        assert worker.get("/history") == {}
        assert len(worker.run(plain_graph(tiny)).outputs["save"]["latents"]) == 1
    assert not (tmp_path / "worker" / "output" / "controlnext_training").exists()
