"""Values of a wrong type in every input of every node of the pack, over the API: refused by the
host, or with the name.
"""

# ruff: noqa: F811
from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.comfy_adapter.input_kinds import KINDS
from comfyui_controlnext.tests.host.test_api import Graph, Workflow, latents, node
from comfyui_controlnext.tests.host.test_api import graph as graph  # noqa: F401  # fixtures
from comfyui_controlnext.tests.host.test_api import hint as hint  # noqa: F401
from comfyui_controlnext.tools.comfy_client import ComfyError

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer

pytestmark = pytest.mark.comfy
LINKS = {
    "MODEL": ["checkpoint", 0],
    "CLIP": ["checkpoint", 1],
    "VAE": ["checkpoint", 2],
    "IMAGE": ["hint", 0],
    "MASK": ["hint", 1],
    "CONTROL_NET": ["load", 1],
    "CONTROL_DATASET": ["dataset", 0],
    "TILE_LAYOUT": ["tiles", 1],
}
"""Type -> an output of that type in the graph."""
NO_SOURCE = ("CLIP_VISION", "POSE_KEYPOINT")
"""Types that no node of a small graph gives."""
WRONG_LINKS = (["checkpoint", 7], ["checkpoint", -9], ["checkpoint", "0"], ["absent", 0], [["checkpoint"], 0], [1])
WRONG_VALUES = (3, "3", None, {}, {"__value__": [1, 2]}, True, [], "nan", 1e400, "\ud800", "x" * 10_000)
SHORT_RUN = {"steps": 1, "config": "validate_every = 0", "resume": False}
"""Inputs that limit the duration of valid prompts."""
QUICK_VALUES = (3, ["checkpoint", 7])
RAW = ("AttributeError", "TypeError", "KeyError", "IndexError", "AssertionError", "RuntimeError", "UnicodeEncodeError")


def wires(graph: Graph) -> Workflow:
    """Nodes that give a value of each type."""
    kept = {name: part for name, part in graph("none").items() if name in ("checkpoint", "hint", "load")}
    return {
        **kept,
        "dataset": node("ControlDatasetImages", images=["hint", 0], hints=["hint", 0]),
        "tiles": node("ControlNeXtSplitTiles", image=["hint", 0], width=64, height=64, overlap=8),
    }


def our_nodes(server: ComfyServer) -> dict[str, Any]:
    """Descriptions of this pack's nodes by id, from the host."""
    info = server.get("/object_info")
    return {name: about for name, about in info.items() if about["category"].startswith("ControlNeXt")}


def inputs_of(about: dict[str, Any], names: dict[str, str]) -> dict[str, tuple[str, Any]]:
    """Inputs as (type, a valid value), where there is one."""
    found = {}
    for name, (kind, *more) in {**about["input"]["required"], **about["input"].get("optional", {})}.items():
        options = more[0] if more else {}
        chosen = kind if isinstance(kind, list) else options.get("options", [""])
        default = names["control"] if name == "control_name" else options.get("default", next(iter(chosen), ""))
        sound = LINKS.get(kind, default) if isinstance(kind, str) else default
        found[name] = ("COMBO" if isinstance(kind, list) else kind, sound)
    return found


def sent(server: ComfyServer, workflow: Workflow) -> dict[str, Any] | None:
    """Record of a prompt on the host; None where it was refused."""
    try:
        prompt = server.queue(workflow)
    except ComfyError:
        return None
    until = time.monotonic() + 300
    while (record := server.history(prompt)) is None:
        assert time.monotonic() < until, "the host's thread for prompts has ended"
        time.sleep(0.01)
    return record


def failure(record: dict[str, Any]) -> dict[str, Any] | None:
    """Error with which a prompt ended; None for success."""
    said = [about for kind, about in record["status"]["messages"] if kind == "execution_error"]
    return said[0] if said else None


def said_of(record: dict[str, Any] | None) -> str | None:
    """Message of the error with which a prompt ended, if any."""
    error = failure(record) if record else None
    return error["exception_message"] if error else None


def prompt_of(graph: Graph, name: str, inputs: dict[str, Any]) -> Workflow:
    """Prompt that runs one node with these inputs."""
    shown = node("PreviewAny", source=["tried", 0])
    return {**wires(graph), "tried": node(name, **inputs), "shown": shown}


def problems(
    server: ComfyServer,
    graph: Graph,
    names: dict[str, str],
    values: tuple[Any, ...],
    kinds: tuple[str, ...],
) -> Iterator[str]:
    """Faults in the results of all prompts with one of `values` in an input of one of `kinds`."""
    for name, about in our_nodes(server).items():
        inputs = inputs_of(about, names)
        sound = {key: value for key, (kind, value) in inputs.items() if kind not in NO_SOURCE}
        sound |= {key: value for key, value in SHORT_RUN.items() if key in inputs}
        sound |= {key: "" for key, (kind, _) in inputs.items() if kind == "POSE_KEYPOINT"}
        optional = about["input"].get("optional", {})
        without = said_of(sent(server, prompt_of(graph, name, sound)))  # of a node that wants another graph
        for key, (kind, _) in inputs.items():
            for value in values if kind in kinds else ():
                if value is None and key in optional and kind in LINKS:
                    continue  # nothing is connected
                record = sent(server, prompt_of(graph, name, {**sound, key: value}))
                if record is None:
                    continue
                error = failure(record)
                what = f"{name}.{key} = {ascii(value)[:40]}"
                if error is None and kind in LINKS and value != LINKS[kind]:
                    yield f"{what}: was taken"
                elif error is not None and any(raw in error["exception_type"] for raw in RAW):
                    yield f"{what}: {error['exception_type']}: {error['exception_message'][:200]}"
                elif error is None or kind not in KINDS or kind == "COMBO" or error["exception_message"] == without:
                    continue
                elif key not in error["exception_message"]:
                    yield f"{what}: does not name it: {error['exception_message'][:200]}"


def test_wrong_values_in_place_of_links_are_named_and_the_server_lives(
    server: ComfyServer,
    graph: Graph,
    tiny: Any,
) -> None:
    before = latents(server, graph("ours", seed=6))
    kinds = (*LINKS, *NO_SOURCE)
    assert not (found := list(problems(server, graph, tiny.names, QUICK_VALUES, kinds))), "\n".join(found)
    assert torch.equal(latents(server, graph("ours", seed=6)), before)


@pytest.mark.long
def test_every_wrong_value_in_every_input_is_refused_or_read(server: ComfyServer, graph: Graph, tiny: Any) -> None:
    before = latents(server, graph("ours", seed=7))
    kinds = (*LINKS, *NO_SOURCE, "INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
    values = (*WRONG_LINKS, *LINKS.values(), *WRONG_VALUES)
    found = [text for text in problems(server, graph, tiny.names, values, kinds)]
    assert not found, "\n".join(found)
    assert torch.equal(latents(server, graph("ours", seed=7)), before)
