"""Long run of a real server over several bases: hints, sizes, LoRAs, controls and doors change from prompt to prompt.

Behind --long. CONTROLNEXT_PROMPTS says how many prompts have a control (1,000); as many without one run before them.
With CONTROLNEXT_RESULTS, a folder, the figures are written there.
"""

# ruff: noqa: F811
from __future__ import annotations

import io
import random
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pytest
import torch
from comfyui_controlnext.tests.fixtures.sampling_fixtures import CELLS, picture
from comfyui_controlnext.tests.host.hostile.test_faults import PROMPTS, keep, memory, slope
from comfyui_controlnext.tests.host.hostile.test_graph_faults import windows_graph
from comfyui_controlnext.tests.host.hostile.test_server_faults import xs_graph
from comfyui_controlnext.tests.host.test_api import Graph, Workflow, latents, node
from comfyui_controlnext.tests.host.test_api import hint as hint  # noqa: F401  # fixture
from comfyui_controlnext.tests.host.test_transformer_queue import files_of, graph_of
from comfyui_controlnext.tools import tiny_models
from PIL import Image

if TYPE_CHECKING:
    from comfyui_controlnext.tests.conftest import TinyModels
    from comfyui_controlnext.tools.comfy_server import ComfyServer

pytestmark = [pytest.mark.comfy, pytest.mark.long]
WINDOWS_EVERY = 25
"""Prompts between two clips in windows, which take ten times as long as the others."""
KINDS = ("windows", "sd15", "xs", "sd3")


class Prompts:
    """Prompts of the run by number, with a control and without one; a number's settings are drawn from it alone."""

    def __init__(self, names: Mapping[str, str], hints: Sequence[str]) -> None:
        self.names, self.hints = names, hints

    def kind(self, number: int) -> str:
        return "windows" if number % WINDOWS_EVERY == 0 else KINDS[1 + number % 3]

    def __call__(self, number: int, control: bool) -> Workflow:
        kind, drawn = self.kind(number), random.Random(number)
        hint, door, strength = drawn.choice(self.hints), drawn.choice(("ours", "stock")), drawn.choice((1.0, 0.7, 0.3))
        if kind == "windows":
            return self._windows(hint, number, strength if control else None)
        graph, given = Graph(self.names, hint), {"weights_strength": strength} if control else {"weights_name": "none"}
        door = door if control else "none"
        if kind == "sd3":
            workflow = graph_of("sd3", hint, door, **given)
        elif kind == "xs" and control:
            workflow = xs_graph(graph, number)
        else:
            workflow = graph(door, text=f"a cat {drawn.randrange(7)}", **given)
        workflow["sample"]["inputs"]["seed"] = number
        sides = {side: 8 * CELLS + 64 * drawn.randrange(3) for side in ("width", "height")}
        workflow["empty"]["inputs"] |= sides
        if kind != "sd3" and drawn.random() < 0.5:
            self._add_lora(workflow, drawn.uniform(0.5, 1.0))
        if kind != "sd3" and drawn.random() < 0.3:
            self._add_stock_control(workflow)
        return workflow

    def _windows(self, hint: str, number: int, strength: float | None) -> Workflow:
        """Clip in windows; strength: of the control, None without one."""
        workflow = windows_graph(hint, number)
        if strength is None:
            workflow["windows"]["inputs"]["model"] = ["checkpoint", 0]
            del workflow["load"], workflow["apply"]
        else:
            workflow["apply"]["inputs"]["strength"] = strength
        return workflow

    def _add_lora(self, workflow: Workflow, strength: float) -> None:
        for part in workflow.values():
            if part["inputs"].get("model") == ["checkpoint", 0]:
                part["inputs"]["model"] = ["lora", 0]
        lora = {"lora_name": self.names["lora"], "strength_model": strength}
        workflow["lora"] = node("LoraLoaderModelOnly", model=["checkpoint", 0], **lora)

    def _add_stock_control(self, workflow: Workflow) -> None:
        given = workflow["sample"]["inputs"]
        sources = {"positive": given["positive"], "negative": given["negative"], "image": ["hint", 0]}
        settings = {"strength": 0.5, "start_percent": 0.0, "end_percent": 1.0}
        workflow["stock"] = node("ControlNetLoader", control_net_name=self.names["stock_control"])
        workflow["both"] = node("ControlNetApplyAdvanced", control_net=["stock", 0], **sources, **settings)
        given |= {"positive": ["both", 0], "negative": ["both", 1]}


def unloaded(server: ComfyServer) -> float:
    """Memory of the server in MiB without models and results: bases of several sizes take turns."""
    for _ in range(2):  # the server may miss one
        server.free()
        time.sleep(1.0)
    return memory(server)


def growth_without_models(server: ComfyServer, prompts: Prompts, first: int, control: bool) -> list[float]:
    """Memory in MiB after each twentieth part of the prompts."""
    found = []
    for number in range(PROMPTS):
        latents(server, prompts(first + number, control))
        if (number + 1) % max(1, PROMPTS // 20) == 0:
            found.append(unloaded(server))
    return found


def test_a_mix_of_bases_and_controls_holds_no_more_memory_than_without_controls(
    server: ComfyServer, tiny: TinyModels, hint: str, pinned_host: bool
) -> None:
    """Slope of resident memory after a fifth of the prompts, less that of as many prompts without a control."""
    tiny_models.make_svd(tiny.models / "checkpoints" / "cancelled_svd.ckpt")
    tiny_models.make_controlnext(tiny.models / "controlnext" / "cancelled_svd.safetensors", "gen2", torch.float16)
    tiny_models.make_controlnet_xs(tiny.models / "controlnext" / "cancelled_xs.safetensors")
    files_of(tiny.models, "sd3", pinned_host)
    hints = [hint]
    for turned in (1, 2):
        stream = io.BytesIO()
        array = (picture()[0] * 255).byte().numpy()
        Image.fromarray(array).rotate(90 * turned).save(stream, "PNG")
        hints.append(server.upload_image(stream.getvalue(), f"turned {turned}.png"))
    prompts, shown = Prompts(tiny.names, hints), range(WINDOWS_EVERY, WINDOWS_EVERY + 4)
    assert {prompts.kind(number) for number in shown} == set(KINDS)
    first = [latents(server, prompts(number, True)) for number in shown]
    for number, one in zip(shown, first, strict=True):
        assert one.isfinite().all() and not torch.equal(one, latents(server, prompts(number, False)))
    series = {
        "plain": growth_without_models(server, prompts, 10_000, False),
        "controlled": growth_without_models(server, prompts, 20_000, True),
    }
    per_prompt = 20 / PROMPTS
    per_hundred = {name: 100 * slope(values[len(values) // 5 :]) * per_prompt for name, values in series.items()}
    keep("long_mix", {"prompts": PROMPTS, "MiB per 100 prompts": per_hundred, "MiB": series})
    for number, one in zip(shown, first, strict=True):
        assert torch.equal(latents(server, prompts(number, True)), one), prompts.kind(number)
    assert per_hundred["controlled"] - max(0.0, per_hundred["plain"]) < 1 + 2000 / PROMPTS
