"""The trainer in the graph, on a real server: train, cancel, go on, and use what was trained in the same graph."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.checkpoint import peek
from comfyui_controlnext.controlnext_training.synthetic import write_folder
from comfyui_controlnext.tests.sampling_fixtures import CELLS
from comfyui_controlnext.tools.comfy_client import PromptError
from safetensors.torch import load as read_tensors
from torch import Tensor

if TYPE_CHECKING:
    from comfyui_controlnext.tests.conftest import TinyModels
    from comfyui_controlnext.tools.comfy_server import ComfyServer

pytestmark = pytest.mark.comfy
Workflow = dict[str, dict[str, Any]]
SIDE = 8 * CELLS


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture(scope="module")
def shapes(tiny: TinyModels) -> str:
    """A folder of drawn scenes below the server's input folder, with a space and a letter that is not ASCII."""
    name = "drawn sc\u00e8nes"
    write_folder(tiny.base / "input" / name, 8, SIDE, 0, "edges")
    return name


def graph(tiny: TinyModels, folder: str, **train: Any) -> Workflow:
    """Train on a folder, apply what was trained, sample, save the latent."""
    settings = {
        "variant": "sd15",
        "steps": 4,
        "batch_size": 2,
        "learning_rate": 1e-4,
        "control_learning_rate": 1e-3,
        "seed": 3,
        "output_name": "from the graph",
        "config": 'save_dtype = "fp32"\nvalidate_every = 2\nvalidation_steps = 2\nlog_every = 1\n',
        **train,
    }
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=tiny.names["checkpoint"]),
        "data": node("ControlDatasetFolder", folder=folder, hint="paired", resolution=SIDE),
        "train": node(
            "ControlNeXtTrain",
            model=["checkpoint", 0],
            vae=["checkpoint", 2],
            clip=["checkpoint", 1],
            dataset=["data", 0],
            **settings,
        ),
        "text": node("CLIPTextEncode", clip=["checkpoint", 1], text="a red circle"),
        "empty": node("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1),
        "picture": node("EmptyImage", width=SIDE, height=SIDE, batch_size=1, color=0xFFFFFF),
        "apply": node(
            "ControlNeXtApply",
            model=["train", 0],
            control_net=["train", 1],
            image=["picture", 0],
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
        ),
        "sample": sampler(["apply", 0]),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="latents/trained"),
        "path": node("PreviewAny", source=["train", 3]),
    }


def sampler(model: list[Any]) -> dict[str, Any]:
    settings = {"seed": 1, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    return node("KSampler", model=model, positive=["text", 0], negative=["text", 0], latent_image=["empty", 0], **settings)


def latents(server: ComfyServer, run: Any) -> Tensor:
    (entry,) = run.outputs["save"]["latents"]
    return read_tensors(server.image(entry))["latent_tensor"]


def test_a_control_is_trained_and_used_in_one_graph(server: ComfyServer, tiny: TinyModels, shapes: str) -> None:
    run = server.run(graph(tiny, shapes))
    path = Path(run.outputs["path"]["text"][0])
    assert path == tiny.models / "controlnext" / "from the graph.safetensors"
    metadata = peek(path).metadata
    assert metadata["controlnext.spec"] == "sd15" and metadata["controlnext.steps"] == "4"
    trained = latents(server, run)
    again = graph(tiny, shapes)
    again["train"] = node(
        "ControlNeXtLoader",
        model=["checkpoint", 0],
        control_name=path.name,
        weights_name="auto",
        weights_strength=1.0,
    )
    del again["path"], again["data"]
    assert torch.equal(latents(server, server.run(again)), trained)
    shown = run.outputs["train"]["images"]
    assert len(shown) == 2, "the loss curve and the validation grid"
    assert len(run.outputs["data"]["images"]) == 1, "the contact sheet of the dataset"
