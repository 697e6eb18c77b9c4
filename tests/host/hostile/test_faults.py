"""Faults and long runs in a real server: cancels at random moments, files that change under a prompt, many prompts.

Behind --long, as each takes minutes to an hour. CONTROLNEXT_PROMPTS and CONTROLNEXT_CANCELS say how many (1,000, 200);
with CONTROLNEXT_RESULTS, a folder, the figures are written there.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfyui_controlnext.tests.host.test_api import Graph, Workflow, latents
from comfyui_controlnext.tests.host.test_api import graph as graph  # noqa: F401  # fixtures
from comfyui_controlnext.tests.host.test_api import hint as hint  # noqa: F401
from comfyui_controlnext.tools import tiny_models
from comfyui_controlnext.tools.comfy_client import ComfyError

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer

pytestmark = [pytest.mark.comfy, pytest.mark.long]
PROMPTS = int(os.environ.get("CONTROLNEXT_PROMPTS", "1000"))
CANCELS = int(os.environ.get("CONTROLNEXT_CANCELS", "200"))
SEED = 26
MIB = 1 << 20


def keep(name: str, found: dict[str, Any]) -> None:
    if folder := os.environ.get("CONTROLNEXT_RESULTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, f"{name}.json").write_text(json.dumps(found), "utf-8")


def memory(server: ComfyServer) -> float:
    """Memory of the server in MiB, after its allocator's reserve is returned."""
    return server.get("/controlnext_probe?memory")["memory"] / MIB


def slope(values: list[float]) -> float:
    """Slope of a line through equally spaced values, by least squares."""
    middle = (len(values) - 1) / 2
    mean = sum(values) / len(values)
    return sum((i - middle) * (v - mean) for i, v in enumerate(values)) / sum(
        (i - middle) ** 2 for i in range(len(values))
    )


def growth(server: ComfyServer, prompt: Callable[[int], Any], count: int) -> list[float]:
    """Memory in MiB after each twentieth part of `count` prompts."""
    found = []
    for number in range(count):
        prompt(number)
        if (number + 1) % max(1, count // 20) == 0:
            found.append(memory(server))
    return found


def test_many_prompts_hold_no_more_memory_than_those_without_a_control(server: ComfyServer, graph: Graph) -> None:  # noqa: F811
    """Slope of resident memory after a fifth of the prompts, less that of as many prompts without a control."""
    first = latents(server, graph("ours", seed=1))

    def controlled(number: int) -> None:
        door, strength = ("ours", "stock")[number % 2], (1.0, 0.7, 0.0)[number % 3]
        latents(server, graph(door, seed=1000 + number, weights_strength=strength, text=f"a cat {number % 7}"))

    def plain(number: int) -> None:
        latents(server, graph("none", seed=50_000 + number, weights_name="none", text=f"a cat {number % 7}"))

    series = {"plain": growth(server, plain, PROMPTS), "controlled": growth(server, controlled, PROMPTS)}
    step = 100 / max(1, PROMPTS // 20)
    per_hundred = {name: slope(values[len(values) // 5 :]) * step for name, values in series.items()}
    keep("long_run", {"prompts": PROMPTS, "MiB per 100 prompts": per_hundred, "MiB": series})
    assert torch.equal(latents(server, graph("ours", seed=1)), first)
    assert per_hundred["controlled"] - max(0.0, per_hundred["plain"]) < 1 + 2000 / PROMPTS


def cancel_at_random(server: ComfyServer, make: Callable[[int], Workflow], name: str) -> None:
    """CANCELS prompts, each interrupted at a moment that is drawn from as long as one takes; at least one in time."""
    server.run(make(1_000))
    started = time.monotonic()
    server.run(make(1_001))
    length, ended, moments = time.monotonic() - started, {"cancelled": 0, "finished": 0}, random.Random(SEED)
    for number in range(CANCELS):
        timer = threading.Timer(moments.random() * length, lambda: server.request("/interrupt", b"{}"))
        timer.start()
        try:
            server.run(make(2_000 + number))
            ended["finished"] += 1
        except ComfyError as error:
            assert "interrupted" in str(error), error
            ended["cancelled"] += 1
        finally:
            timer.join()
    keep(name, {"cancels": CANCELS, "seed": SEED, **ended, "seconds of a prompt": round(length, 2)})
    assert ended["cancelled"] > 0


def test_cancels_at_random_moments_change_nothing(server: ComfyServer, graph: Graph) -> None:  # noqa: F811
    expected = latents(server, graph("stock", seed=2))
    cancel_at_random(server, lambda seed: graph(("stock", "ours")[seed % 2], seed=seed), "cancels")
    assert torch.equal(latents(server, graph("stock", seed=2)), expected)


def test_files_that_change_under_a_prompt_change_nothing_of_it(server: ComfyServer, graph: Graph, tiny: Any) -> None:  # noqa: F811
    """Cut short, written over and removed while prompts with them run; what was put back is loaded again."""
    folder = tiny.models / "controlnext" / "changing"
    sound = folder.with_name("sound")
    for name in ("controlnet", "unet"):
        make = tiny_models.make_controlnext if name == "controlnet" else tiny_models.make_unet_difference
        make(sound / f"{name}.safetensors", *(["gen2"] if name == "controlnet" else []))
    shutil.copytree(sound, folder)
    name = str(Path("changing") / "controlnet.safetensors")
    expected = latents(server, graph("stock", control_name=name, seed=4))

    def damage(path: Path, kind: int) -> None:
        time.sleep(0.3)
        if kind == 0:
            os.truncate(path, 100)
        elif kind == 1:
            with open(path, "r+b") as file:
                file.write(bytes(path.stat().st_size))
        else:
            path.unlink()

    for number in range(12):
        path = folder / ("controlnet.safetensors", "unet.safetensors")[number % 2]
        thread = threading.Thread(target=damage, args=(path, number % 3))
        thread.start()
        try:
            latents(server, graph("stock", control_name=name, seed=100 + number))
        except ComfyError as error:  # the file was damaged before it was read
            assert "safetensors" in str(error)
        thread.join()
        shutil.copyfile(sound / path.name, path)
    assert torch.equal(latents(server, graph("stock", control_name=name, seed=4)), expected)
