"""Servers under low-memory flags, beside each other, and killed: every picture is that of an undisturbed server.

Behind --long, as each starts servers of its own. CONTROLNEXT_KILLS says how often one is killed (50),
CONTROLNEXT_CANCELS how often a ControlNet-XS and a training are cancelled (200); with CONTROLNEXT_RESULTS, a folder,
the figures are written there.
"""

# ruff: noqa: F811
from __future__ import annotations

import concurrent.futures
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfyui_controlnext.tests.host.hostile.test_faults import SEED, cancel_at_random, keep
from comfyui_controlnext.tests.host.test_api import Graph, Workflow, latents, node
from comfyui_controlnext.tests.host.test_api import graph as graph  # noqa: F401  # fixtures
from comfyui_controlnext.tests.host.test_api import hint as hint  # noqa: F401
from comfyui_controlnext.tools import tiny_models
from comfyui_controlnext.tools.comfy_client import ComfyClient
from comfyui_controlnext.tools.comfy_server import ComfyServer

if TYPE_CHECKING:
    from comfyui_controlnext.tests.conftest import TinyModels

pytestmark = [pytest.mark.comfy, pytest.mark.long]
KILLS = int(os.environ.get("CONTROLNEXT_KILLS", "50"))
FLAGS = {
    "cache-none": ["--cache-none"],
    "cache-lru": ["--cache-lru", "3"],
    "smart memory off": ["--disable-smart-memory"],
    "files read whole": ["--disable-mmap"],
}
"""The host's flags for little memory that go with --cpu; --lowvram and --novram do not."""
CLIENTS, PROMPTS = 4, 5


def another(host: Path, tiny: TinyModels, *arguments: str) -> ComfyServer:
    """Further server on the session's models and folders."""
    log = tiny.base / "another.log"
    return ComfyServer.start(host, tiny.base, arguments=["--cpu", "--disable-api-nodes", *arguments], log=log)


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_flags_for_little_memory_change_no_bit(
    host: Path, server: ComfyServer, tiny: TinyModels, graph: Graph, flags: list[str]
) -> None:
    expected = [latents(server, graph(door, seed=31)) for door in ("stock", "ours")]
    with another(host, tiny, *flags) as low:
        for door, picture in zip(("stock", "ours"), expected, strict=True):
            assert torch.equal(latents(low, graph(door, seed=31)), picture)
            assert torch.equal(latents(low, graph(door, seed=31, text="a cat")), picture)
            assert not torch.equal(latents(low, graph(door, seed=32)), picture)


def test_two_servers_on_one_folder_serve_four_clients(
    host: Path, server: ComfyServer, tiny: TinyModels, graph: Graph
) -> None:
    seeds = range(600, 600 + CLIENTS * PROMPTS)
    expected = {seed: latents(server, graph(("stock", "ours")[seed % 2], seed=seed)) for seed in seeds}

    def client(running: ComfyServer, own: range) -> list[bool]:
        mine: Any = ComfyClient(running.address)
        return [torch.equal(latents(mine, graph(("ours", "stock")[s % 2], seed=s)), expected[s]) for s in own]

    with another(host, tiny) as beside, concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(client, (server, beside)[i % 2], seeds[i::CLIENTS]) for i in range(CLIENTS)]
        same = [one for future in running for one in future.result()]
    assert len(same) == CLIENTS * PROMPTS and all(same)


def test_a_server_killed_while_it_samples_leaves_all_whole(
    host: Path, server: ComfyServer, tiny: TinyModels, graph: Graph
) -> None:
    """Every latent that is there is whole, no unfinished file is left, and the next server gives the same picture."""
    moments, expected = random.Random(SEED), latents(server, graph("stock", seed=41))
    files = {path: path.read_bytes() for path in tiny.models.rglob("*") if path.is_file() and path.stat().st_size < 1e8}
    ended = {"killed in a prompt": 0, "idle": 0}
    for number in range(KILLS):
        doomed = another(host, tiny)
        try:
            doomed.queue(graph(("stock", "ours")[number % 2], seed=10_000 + number))
            time.sleep(moments.uniform(0.0, 1.5))
            busy = bool(doomed.get("/queue")["queue_running"])
            ended["killed in a prompt" if busy else "idle"] += 1
        finally:
            doomed.process.kill()
            doomed.process.communicate()  # waits, and closes the pipes
        assert not [path for path in tiny.base.rglob("*.tmp")]
    keep("server_kills", {"kills": KILLS, "seed": SEED, **ended})
    assert ended["killed in a prompt"] > 0
    assert {path: path.read_bytes() for path in files} == files, "models are as they were"
    with another(host, tiny) as running:
        assert torch.equal(latents(running, graph("stock", seed=41)), expected)


def xs_graph(graph: Graph, seed: int) -> Workflow:
    """Graph `graph` with a ControlNet-XS through the stock door."""
    workflow = graph("stock", seed=seed, weights_name="none")
    workflow["load"] = node("ControlNetXSLoader", control_name="cancelled_xs.safetensors")
    workflow["apply"]["inputs"]["control_net"] = ["load", 0]
    workflow["sample"]["inputs"]["model"] = ["checkpoint", 0]
    return workflow


def train_graph(graph: Graph, seed: int) -> Workflow:
    """Training graph of four steps on the hint's picture, with a text node that waits for it."""
    kept = {name: part for name, part in graph("none").items() if name in ("checkpoint", "hint")}
    config = "validate_every = 2\nvalidation_steps = 2\nvalidation_samples = 1"
    settings = {"steps": 4, "batch_size": 1, "learning_rate": 1e-4, "control_learning_rate": 1e-3, "seed": seed}
    wires = {"model": ["checkpoint", 0], "vae": ["checkpoint", 2], "clip": ["checkpoint", 1], "dataset": ["data", 0]}
    names = {"variant": "sd15", "output_name": f"cancelled {seed}", "config": config, "resume": False}
    return {
        **kept,
        "data": node("ControlDatasetImages", images=["hint", 0], hints=["hint", 0]),
        "train": node("ControlNeXtTrain", **settings, **wires, **names),
        "path": node("PreviewAny", source=["train", 3]),
    }


@pytest.mark.parametrize(("name", "make"), [("xs", xs_graph), ("training", train_graph)])
def test_cancels_of_other_kinds_change_nothing(
    server: ComfyServer, tiny: TinyModels, graph: Graph, name: str, make: Callable[[Graph, int], Workflow]
) -> None:
    tiny_models.make_controlnet_xs(tiny.models / "controlnext" / "cancelled_xs.safetensors")
    expected = latents(server, graph("stock", seed=51))
    if name == "xs":
        expected_xs = latents(server, xs_graph(graph, 51))
    cancel_at_random(server, lambda seed: make(graph, seed), f"cancels_{name}")
    assert torch.equal(latents(server, graph("stock", seed=51)), expected)
    if name == "xs":
        assert torch.equal(latents(server, xs_graph(graph, 51)), expected_xs)
