"""Videos in windows and transformers that are cancelled, and servers killed amid a training: all ends as if nobody had.

Behind --long. CONTROLNEXT_CANCELS says how often each graph is cancelled (200), CONTROLNEXT_TRAINING_KILLS how often a
server is killed (5); with CONTROLNEXT_RESULTS, a folder, the figures are written there.
"""

# ruff: noqa: F811
from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.controlnext_training import state
from comfyui_controlnext.controlnext_training.journal import read
from comfyui_controlnext.tests.fixtures.sampling_fixtures import CELLS
from comfyui_controlnext.tests.host.hostile.test_faults import SEED, cancel_at_random, keep
from comfyui_controlnext.tests.host.hostile.test_server_faults import another, train_graph
from comfyui_controlnext.tests.host.test_api import Graph, Workflow, latents, node
from comfyui_controlnext.tests.host.test_api import graph as graph  # noqa: F401  # fixtures
from comfyui_controlnext.tests.host.test_api import hint as hint  # noqa: F401
from comfyui_controlnext.tests.host.test_transformer_queue import files_of, graph_of
from comfyui_controlnext.tools import tiny_models

if TYPE_CHECKING:
    from comfyui_controlnext.tests.conftest import TinyModels
    from comfyui_controlnext.tools.comfy_server import ComfyServer

pytestmark = [pytest.mark.comfy, pytest.mark.long]
TRAINING_KILLS = int(os.environ.get("CONTROLNEXT_TRAINING_KILLS", "5"))
SIDE, FRAMES = 8 * CELLS, 7
STEPS, EVERY = 24, 2


def windows_graph(hint: str, seed: int) -> Workflow:
    """Seven frames in windows of four that share one, behind a control for SVD."""
    wires = {"clip_vision": ["checkpoint", 1], "init_image": ["hint", 0], "vae": ["checkpoint", 2]}
    clip = {"width": SIDE, "height": SIDE, "video_frames": FRAMES, "motion_bucket_id": 127, "fps": 6}
    names = {"control_name": "cancelled_svd.safetensors", "weights_name": "none", "weights_strength": 1.0}
    settings = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    parts = {"length": 4, "overlap": 1, "schedule": "standard_static", "fuse": "pyramid", "repeat_first_hint": True}
    sampler = {"seed": seed, "steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "karras", "denoise": 1.0}
    sources = {"positive": ["start", 0], "negative": ["start", 1], "latent_image": ["start", 2]}
    return {
        "checkpoint": node("ImageOnlyCheckpointLoader", ckpt_name="cancelled_svd.ckpt"),
        "hint": node("LoadImage", image=hint),
        "poses": node(
            "ControlNeXtSampleInputs", kind="pose_clip", width=SIDE, height=SIDE, scene="house", frames=FRAMES
        ),
        "start": node("SVD_img2vid_Conditioning", augmentation_level=0.0, **clip, **wires),
        "load": node("ControlNeXtLoader", model=["checkpoint", 0], variant="svd_v2", **names),
        "apply": node("ControlNeXtApply", model=["load", 0], control_net=["load", 1], image=["poses", 0], **settings),
        "windows": node("ControlNeXtVideoWindows", model=["apply", 0], **parts),
        "sample": node("KSampler", model=["windows", 0], **sampler, **sources),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="latents/windows"),
    }


def transformer_graph(hint: str, seed: int) -> Workflow:
    """SD3 through the door that the seed chooses."""
    workflow = graph_of("sd3", hint, ("stock", "ours")[seed % 2])
    workflow["sample"]["inputs"] |= {"seed": seed, "steps": 4}
    return workflow


@pytest.mark.parametrize(("name", "make"), [("windows", windows_graph), ("transformer", transformer_graph)])
def test_cancels_of_clips_and_transformers_change_nothing(
    server: ComfyServer,
    tiny: TinyModels,
    graph: Graph,
    hint: str,
    pinned_host: bool,
    name: str,
    make: Callable[[str, int], Workflow],
) -> None:
    """The cancelled graph and one of another base give the pictures of before."""
    if name == "windows":
        tiny_models.make_svd(tiny.models / "checkpoints" / "cancelled_svd.ckpt")
        tiny_models.make_controlnext(tiny.models / "controlnext" / "cancelled_svd.safetensors", "gen2", torch.float16)
    else:
        files_of(tiny.models, "sd3", pinned_host)
    expected, own = latents(server, graph("stock", seed=61)), latents(server, make(hint, 61))
    assert own.isfinite().all() and not torch.equal(own, latents(server, make(hint, 62)))
    cancel_at_random(server, lambda seed: make(hint, seed), f"cancels_{name}")
    assert torch.equal(latents(server, make(hint, 61)), own)
    assert torch.equal(latents(server, graph("stock", seed=61)), expected)


def long_training(graph: Graph, name: str) -> Workflow:
    workflow = train_graph(graph, 71)
    config = f'save_every = {EVERY}\nlog_every = 1\nvalidate_every = 0\nsave_dtype = "fp32"\nema_decay = 0.9'
    workflow["train"]["inputs"] |= {"steps": STEPS, "config": config, "output_name": name, "resume": True}
    return workflow


def last_step(run: Path) -> int:
    """Step of the last state that a run has saved; each that has its name is whole."""
    states = list(run.glob("state-*"))
    assert all(state._read(path) is not None for path in states), "a state has its name only when it is whole"
    found = state.latest(run) if run.exists() else None
    return 0 if found is None else found.step


def test_a_server_killed_amid_a_training_goes_on_to_the_bit_identical_end(
    host: Path, server: ComfyServer, tiny: TinyModels, graph: Graph
) -> None:
    """Killed at random moments of one run; each next server goes on from the last state, the last one to the end."""
    runs = tiny.base / "output" / "controlnext_training"
    started = time.monotonic()
    server.run(long_training(graph, "undisturbed"))
    length, moments, saved, amid = time.monotonic() - started, random.Random(SEED), [0], 0
    for _ in range(TRAINING_KILLS):
        doomed = another(host, tiny)
        try:
            doomed.queue(long_training(graph, "killed"))
            time.sleep(moments.uniform(0.2, 0.7) * length)
            amid += bool(doomed.get("/queue")["queue_running"])
        finally:
            doomed.process.kill()
            doomed.process.communicate()  # waits, and closes the pipes
        assert not [path for path in tiny.models.rglob("*.tmp")]
        saved.append(last_step(runs / "killed"))
        logged = max(read(runs / "killed", "step", "loss"), default=0) if (runs / "killed").exists() else 0
        assert saved[-1] >= saved[-2] and logged - saved[-1] <= EVERY, "no more is lost than since the last save"
    keep("training_kills", {"kills": TRAINING_KILLS, "amid a prompt": amid, "steps saved": saved[1:], "seed": SEED})
    assert amid > 0 and saved[-1] > 0
    with another(host, tiny) as running:
        running.run(long_training(graph, "killed"))
        assert any(f"resumed at step {saved[-1]} from" in line for line in running.log_lines())
    ours, theirs = (
        checkpoint.load(tiny.models / "controlnext" / f"{name}.safetensors") for name in ("killed", "undisturbed")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert read(runs / "killed", "step", "loss") == read(runs / "undisturbed", "step", "loss")
