"""Trainer node on a real server: train, cancel, resume, and use the result in the same graph."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.checkpoint import load, peek
from comfyui_controlnext.controlnext_training import state
from comfyui_controlnext.controlnext_training.synthetic import write_folder
from comfyui_controlnext.tests.fixtures.sampling_fixtures import CELLS
from comfyui_controlnext.tools.comfy_client import PromptError
from comfyui_controlnext.tools.tiny_models import make_svd
from safetensors.torch import load as read_tensors
from torch import Tensor

if TYPE_CHECKING:
    from comfyui_controlnext.tests.conftest import TinyModels
    from comfyui_controlnext.tools.comfy_server import ComfyServer

pytestmark = pytest.mark.comfy
Workflow = dict[str, dict[str, Any]]
SIDE = 8 * CELLS
ROOT = Path(__file__).resolve().parents[2]
CLIENT = ROOT / "controlnext_training" / "queue_training.py"


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture(scope="module")
def shapes(tiny: TinyModels) -> str:
    """Folder of drawn scenes below the server's input folder, with a space and a letter that is not ASCII."""
    name = "drawn sc\u00e8nes"
    write_folder(tiny.base / "input" / name, 8, SIDE, 0, "edges")
    return name


def graph(tiny: TinyModels, folder: str, **train: Any) -> Workflow:
    """Graph: train on a folder, apply the result, sample, save the latent."""
    settings = {
        "variant": "sd15",
        "steps": 4,
        "batch_size": 1,
        "learning_rate": 1e-4,
        "control_learning_rate": 1e-3,
        "seed": 3,
        "output_name": "from the graph",
        "config": 'save_dtype = "fp32"\nvalidate_every = 0\nvalidation_steps = 2\nlog_every = 1\n',
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
    return node(
        "KSampler", model=model, positive=["text", 0], negative=["text", 0], latent_image=["empty", 0], **settings
    )


def latents(server: ComfyServer, run: Any) -> Tensor:
    (entry,) = run.outputs["save"]["latents"]
    return read_tensors(server.image(entry))["latent_tensor"]


def test_a_control_is_trained_and_used_in_one_graph(server: ComfyServer, tiny: TinyModels, shapes: str) -> None:
    workflow = graph(tiny, shapes)
    workflow["train"]["inputs"]["config"] = (
        'save_dtype = "fp32"\nvalidate_every = 2\nvalidation_steps = 2\nvalidation_samples = 1'
    )
    run = server.run(workflow)
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


def test_a_control_for_a_transformer_is_trained_and_used_in_one_graph(
    server: ComfyServer, tiny: TinyModels, shapes: str
) -> None:
    """SD3 from one file: CLIP, VAE and MODEL of Load Checkpoint, as for the others."""
    workflow = graph(tiny, shapes, variant="sd3", output_name="transformer", learning_rate=1e-2)
    workflow["checkpoint"] = node("CheckpointLoaderSimple", ckpt_name=tiny.names["transformer"])
    workflow["train"]["inputs"]["config"] += "checkpointing = true\n"
    run = server.run(workflow)
    path = Path(run.outputs["path"]["text"][0])
    assert (peek(path).metadata["controlnext.spec"], peek(path).metadata["controlnext.rank"]) == ("sd3", "16")
    trained = latents(server, run)
    without = dict(workflow) | {"sample": sampler(["checkpoint", 0])}
    assert trained.shape[1] == 16 and not torch.equal(trained, latents(server, server.run(without)))


def server_log(server: ComfyServer, since: int) -> str:
    return "\n".join(server.log_lines()[since:])


def test_cancel_saves_and_the_same_graph_goes_on_to_the_same_end(
    server: ComfyServer, tiny: TinyModels, shapes: str
) -> None:
    through = Path(server.run(graph(tiny, shapes, output_name="through")).outputs["path"]["text"][0])
    workflow, before = graph(tiny, shapes, output_name="stopped"), len(server.log_lines())

    def cancel(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and data.get("node") == "train" and data["max"] == 4 and data["value"] == 2:
            server.interrupt()

    with pytest.raises(PromptError, match="interrupted at node train"):  # and not failed
        server.run(workflow, cancel)
    run_folder = tiny.base / "output" / "controlnext_training" / "stopped"
    saved = state.latest(run_folder)
    assert saved is not None and 2 <= saved.step < 4
    assert not (tiny.models / "controlnext" / "stopped.safetensors").exists()
    assert f"stopped after {saved.step} steps; saved in output/controlnext_training/stopped" in server_log(
        server, before
    )
    run = server.run(workflow)
    assert f"resumed at step {saved.step} from" in server_log(server, before)
    path = Path(run.outputs["path"]["text"][0])
    ours, theirs = load(path), load(through)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(run.outputs["save"]["latents"]) == 1, "the rest of the graph ran"


def plain_graph(tiny: TinyModels) -> Workflow:
    workflow = graph(tiny, "")
    workflow["sample"] = sampler(["checkpoint", 0])
    for name in ("train", "apply", "path", "data", "picture"):
        del workflow[name]
    return workflow


def held(server: ComfyServer, tensors: int, seconds: float = 40.0) -> tuple[int, int]:
    """Resident bytes, and bytes of tensors, of the server after it has freed its memory.

    It does so when it next checks its queue, which may take longer on a busy machine, and its thread misses a request
    that comes just before it goes to sleep: this asks every five seconds until it has no more than `tensors` bytes, at
    most for `seconds`.
    """
    end = time.monotonic() + seconds
    while True:
        server.free()
        again = min(end, time.monotonic() + 5)
        time.sleep(1.0)
        while True:
            probe = server.get("/controlnext_probe?memory")
            if probe["tensors"] <= tensors or time.monotonic() >= end:
                return probe["memory"], probe["tensors"]
            if time.monotonic() >= again:
                break
            time.sleep(0.5)


def test_the_server_is_after_a_training_what_it_was_before(server: ComfyServer, tiny: TinyModels, shapes: str) -> None:
    server.run(graph(tiny, shapes, output_name="first", steps=1))  # what is imported once and for all
    before, (memory, tensors) = latents(server, server.run(plain_graph(tiny))), held(server, 2**20)
    assert tensors <= 2**20, "models are let go of"
    figures = [memory]
    for name in ("second", "third", "fourth"):  # memory that is cut up once may grow once; what leaks grows each time
        server.run(graph(tiny, shapes, output_name=name, steps=2))
        after, tensors_after = held(server, tensors + 1024)
        assert tensors_after <= tensors + 1024
        figures.append(after)
        if after <= 1.02 * figures[-2]:
            break
    assert torch.equal(latents(server, server.run(plain_graph(tiny))), before)
    if sys.platform == "linux":  # elsewhere the allocator keeps what it was given
        assert figures[-1] <= 1.02 * figures[-2], [f"{bytes_ / 2**20:.0f} MiB" for bytes_ in figures]


def test_images_of_the_graph_are_a_dataset(server: ComfyServer, tiny: TinyModels, shapes: str) -> None:
    workflow = graph(tiny, shapes, output_name="from images", steps=1)
    workflow["data"] = node("ControlDatasetImages", images=["two", 0], hints=["two", 0], captions="one\ntwo")
    workflow["two"] = node("RepeatImageBatch", image=["picture", 0], amount=2)
    run = server.run(workflow)
    assert Path(run.outputs["path"]["text"][0]).name == "from images.safetensors"
    workflow["data"]["inputs"]["captions"] = "one\ntwo\nthree"
    with pytest.raises(PromptError, match="captions.*3.*2|3 captions"):
        server.run(workflow)


def test_a_controlnet_xs_is_trained_and_used(server: ComfyServer, tiny: TinyModels, shapes: str) -> None:
    run = server.run(graph(tiny, shapes, variant="xs", output_name="streams", steps=1))
    path = Path(run.outputs["path"]["text"][0])
    assert peek(path).metadata["modelspec.architecture"].endswith("/controlnet-xs")
    assert len(run.outputs["save"]["latents"]) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"config": "stepz = 3"}, "stepz: is not a setting. Did you mean steps?"),
        ({"config": "steps = many"}, "is not TOML"),
        ({"config": "steps = 0"}, "steps: 0 is out of range"),
        ({"config": 'runs_folder = "../elsewhere"'}, "runs_folder: '../elsewhere' is outside of"),
        ({"config": 'output_folder = "/tmp"'}, "output_folder: '/tmp' is outside of"),
        ({"config": 'init_control = "/etc/passwd"'}, "init_control: '/etc/passwd' is not in models/controlnext"),
        ({"variant": "sd16"}, "sd16"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(
    server: ComfyServer, tiny: TinyModels, shapes: str, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(PromptError, match=re.escape(says)) as raised:
        server.queue(graph(tiny, shapes, **changes))
    assert list(raised.value.node_errors) == ["train"]


def test_a_recipe_pasted_whole_is_understood(server: ComfyServer, tiny: TinyModels, shapes: str) -> None:
    recipe = ROOT / "controlnext_training" / "recipes" / "tiny.toml"
    text = re.sub(
        r"(?m)^(steps|warmup_steps|validate_every|output_name|batch_size) = .*$", "", recipe.read_text("utf-8")
    )
    run = server.run(graph(tiny, shapes, output_name="pasted", steps=1, config=text + "\nvalidate_every = 0\n"))
    assert Path(run.outputs["path"]["text"][0]).name == "pasted.safetensors"


def test_a_dataset_outside_of_the_input_folder_is_refused_with_a_remedy(
    server: ComfyServer, tiny: TinyModels, tmp_path: Path
) -> None:
    write_folder(tmp_path / "elsewhere", 2, SIDE, 0, "edges")
    for place in (str(tmp_path / "elsewhere"), "../models", "", "nothing here"):
        with pytest.raises(PromptError) as raised:
            server.run(graph(tiny, place))
        assert "input folder" in str(raised.value) and "CONTROLNEXT_DATA_ROOTS" in str(raised.value)


def test_a_listed_folder_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfyui_controlnext.controlnext_training.config import ConfigError
    from comfyui_controlnext.controlnext_training.nodes.datasets import find_folder

    folder = tmp_path / "list\u00e9d" / "set"
    folder.mkdir(parents=True)
    with pytest.raises(ConfigError, match="CONTROLNEXT_DATA_ROOTS"):
        find_folder(str(folder))
    monkeypatch.setenv("CONTROLNEXT_DATA_ROOTS", os.pathsep.join(["/nowhere", str(folder.parent)]))
    assert find_folder(str(folder)) == folder
    assert find_folder("set") == folder
    with pytest.raises(ConfigError):
        find_folder(str(folder / ".." / ".."))


@pytest.mark.long
def test_clips_train_a_video_control(server: ComfyServer, tiny: TinyModels) -> None:
    make_svd(tiny.models / "checkpoints" / "tiny_svd_to_train.ckpt")
    workflow = graph(tiny, "", variant="svd_v2", output_name="video", steps=1, batch_size=1)
    workflow["train"]["inputs"]["config"] += "clip_frames = 2\nclip_stride = 1\n"
    workflow["checkpoint"] = node("ImageOnlyCheckpointLoader", ckpt_name="tiny_svd_to_train.ckpt")
    workflow["train"]["inputs"] |= {"clip_vision": ["checkpoint", 1]}
    del workflow["train"]["inputs"]["clip"]
    workflow["data"] = node("ControlDatasetImages", images=["frames", 0], hints=["frames", 0])
    workflow["frames"] = node("RepeatImageBatch", image=["picture", 0], amount=4)
    for name in ("text", "empty", "apply", "sample", "save"):
        del workflow[name]
    run = server.run(workflow)
    path = Path(run.outputs["path"]["text"][0])
    assert peek(path).metadata["controlnext.spec"] == "svd_v2"


def follow(server: ComfyServer, workflow: Workflow, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Run the example client on a graph, in a separate process."""
    path = folder / "gr\u00e4ph.json"
    path.write_text(json.dumps(workflow), "utf-8")
    return subprocess.Popen(
        [sys.executable, str(CLIENT), str(path), "--server", server.address, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )


def test_the_example_client_trains_cancels_and_goes_on(
    server: ComfyServer, tiny: TinyModels, shapes: str, tmp_path: Path
) -> None:
    workflow = graph(tiny, shapes, variant="xs", output_name="by the client")
    process, seen = follow(server, workflow, tmp_path, "--set", "ControlNeXtTrain.steps=6"), []
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            seen.append(line)
            if line.startswith("step 2/6"):
                process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT))
    printed = "".join(seen)
    assert process.wait() == 130, printed
    assert "-- ControlNeXtTrain" in printed and "cancelling; the run saves first" in printed
    assert "stopped after" in printed and "Traceback" not in printed
    process = follow(server, workflow, tmp_path, "--set", "train.steps=6", "--set", "data.hint=paired")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert "resumed at step" in printed and "finished after 6 steps" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "train.variant=sd16"], "sd16"),
        (["--set", "trian.steps=3"], "the nodes are"),
        (["--set", "train.step=3"], "ControlNeXtTrain has no input step; did you mean steps?"),
        (["--server", "127.0.0.1:9"], "no ComfyUI answers at 127.0.0.1:9"),
    ],
)
def test_the_example_client_says_what_is_wrong(
    server: ComfyServer, tiny: TinyModels, shapes: str, tmp_path: Path, arguments: list[str], says: str
) -> None:
    process = follow(server, graph(tiny, shapes), tmp_path, *arguments)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and says in printed and "Traceback" not in printed, printed
