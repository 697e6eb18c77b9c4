"""Long run of a real server over several bases: hints, sizes, LoRAs, controls and doors change from prompt to prompt.

Behind --long. CONTROLNEXT_PROMPTS says how many prompts have a control (1,000); as many without one run before them.
With CONTROLNEXT_RESULTS, a folder, the figures are written there.
"""

# ruff: noqa: F811
from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING

import pytest
import torch
from comfyui_controlnext.tests.fixtures.sampling_fixtures import CELLS, picture
from comfyui_controlnext.tests.host.hostile.test_faults import PROMPTS, keep, memory, slope
from comfyui_controlnext.tests.host.hostile.test_graph_faults import windows_graph
from comfyui_controlnext.tests.host.hostile.test_server_faults import xs_graph
from comfyui_controlnext.tests.host.test_api import Graph, Workflow, latents, node
from comfyui_controlnext.tests.host.test_api import graph as graph  # noqa: F401  # fixtures
from comfyui_controlnext.tests.host.test_api import hint as hint  # noqa: F401
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
    """Prompts of the run by number, with a control and without one."""

    def __init__(self, graph: Graph, hints: list[str], names: dict[str, str]) -> None:
        self.graph, self.hints, self.names = graph, hints, names

    def kind(self, number: int) -> str:
        return "windows" if number % WINDOWS_EVERY == 0 else KINDS[1 + number % 3]

    def __call__(self, number: int, control: bool) -> Workflow:
        kind, self.graph.hint = self.kind(number), self.hints[number % len(self.hints)]
        door = ("ours", "stock")[number % 2] if control else "none"
        if kind == "windows":
            workflow = windows_graph(self.graph.hint, number)
            workflow["apply"]["inputs"]["strength"] = (1.0, 0.6)[number % 2]
            if not control:
                workflow["windows"]["inputs"]["model"] = ["checkpoint", 0]
                del workflow["load"], workflow["apply"]
            return workflow
        if kind == "sd3":
            workflow = graph_of("sd3", self.graph.hint, door, **({} if control else {"weights_name": "none"}))
        elif kind == "xs" and control:
            workflow = xs_graph(self.graph, number)
        else:
            strength = {"weights_strength": (1.0, 0.7, 0.0)[number % 3]} if control else {"weights_name": "none"}
            workflow = self.graph(door, text=f"a cat {number % 7}", **strength)
        workflow["sample"]["inputs"]["seed"] = number
        workflow["empty"]["inputs"] |= {"width": 8 * CELLS + 64 * (number % 2), "height": 8 * CELLS + 64 * (number % 3)}
        if kind != "sd3":
            self._with_lora_and_stock_control(workflow, number)
        return workflow

    def _with_lora_and_stock_control(self, workflow: Workflow, number: int) -> None:
        """Add a LoRA to every other prompt, and a stock ControlNet to every third one."""
        if number % 4 < 2:
            lora = {"lora_name": self.names["lora"], "strength_model": 0.5 + number % 3 / 4}
            for part in workflow.values():
                part["inputs"] |= {"model": ["lora", 0]} if part["inputs"].get("model") == ["checkpoint", 0] else {}
            workflow["lora"] = node("LoraLoaderModelOnly", model=["checkpoint", 0], **lora)
        if number % 5 < 2:
            given = workflow["sample"]["inputs"]
            sources = {"positive": given["positive"], "negative": given["negative"], "image": ["hint", 0]}
            settings = {"strength": 0.5, "start_percent": 0.0, "end_percent": 1.0}
            workflow["stock"] = node("ControlNetLoader", control_net_name=self.names["stock_control"])
            workflow["both"] = node("ControlNetApplyAdvanced", control_net=["stock", 0], **sources, **settings)
            given |= {"positive": ["both", 0], "negative": ["both", 1]}


def unloaded(server: ComfyServer) -> float:
    """Memory of the server in MiB without models and results: bases of several sizes take turns."""
    for _ in range(2):  # the host's thread misses a request that comes just before it goes to sleep
        server.free()
        time.sleep(1.5)
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
    server: ComfyServer, tiny: TinyModels, graph: Graph, hint: str, pinned_host: bool
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
    prompts, shown = Prompts(graph, hints, tiny.names), range(WINDOWS_EVERY, WINDOWS_EVERY + 4)
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
