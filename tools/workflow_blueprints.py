"""Subgraph blueprints, which ComfyUI serves from `subgraphs/` and the page lists among the nodes.

A blueprint is a `Workflow` whose unconnected ends are the sockets and widgets of one node. Standard library only.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .workflow_graph import Node, ObjectInfo, Output, Workflow, page_format, split_inputs, widget_value

INPUT_NODE, OUTPUT_NODE = -10, -20  # the page's numbers
EDGE_WIDTH, EDGE_GAP, SLOT = 120, 80, 20
LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")


@dataclass(frozen=True)
class Blueprint:
    """Blueprint of a subgraph. inner: its nodes; inputs: name -> the input of an inner node that it sets; outputs:
    likewise.
    """

    inner: Workflow
    description: str
    inputs: Mapping[str, tuple[Node, str]]
    outputs: Mapping[str, Output]


def blueprint_format(blueprint: Blueprint, object_info: ObjectInfo) -> dict[str, Any]:
    """Graph of the single node whose definition is the subgraph, in the page's format for blueprints."""
    inner = page_format(blueprint.inner, object_info)
    nodes = {node["id"]: node for node in inner["nodes"]}
    links = [dict(zip(LINK, link, strict=True)) for link in inner["links"]]
    inputs = _inputs(blueprint, nodes, links, object_info)
    outputs = _outputs(blueprint, nodes, links)
    number = _identifier(blueprint, "subgraph")
    edges = _edges(inner["nodes"], len(inputs), len(outputs))
    subgraph = {
        "id": number,
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": len(nodes), "lastLinkId": len(links), "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": blueprint.inner.title,
        **edges,
        "inputs": inputs,
        "outputs": outputs,
        "widgets": [],
        "nodes": inner["nodes"],
        "groups": [],
        "links": links,
        "extra": {},
        "category": "ControlNeXt",
        "description": blueprint.description,
    }
    outer = _outer(blueprint, number, inputs, outputs, object_info)
    facts = {"revision": 0, "last_node_id": 1, "last_link_id": 0, "nodes": [outer], "links": [], "groups": []}
    described = {"BlueprintDescription": blueprint.description}
    return {
        "id": _identifier(blueprint, "graph"),
        **facts,
        "definitions": {"subgraphs": [subgraph]},
        "config": {},
        "extra": described,
        "version": 0.4,
    }


def _identifier(blueprint: Blueprint, part: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"controlnext/subgraphs/{blueprint.inner.name}/{part}"))


def _inputs(
    blueprint: Blueprint, nodes: Mapping[int, dict[str, Any]], links: list[dict[str, Any]], object_info: ObjectInfo
) -> list[dict[str, Any]]:
    """Inputs of the subgraph; adds their links, and to a node the socket of a widget that becomes an input."""
    made: list[dict[str, Any]] = []
    for place, (name, (node, field)) in enumerate(blueprint.inputs.items()):
        page = nodes[node.id]
        widgets = split_inputs(object_info[node.type])[1]
        if field in widgets:
            page["inputs"].append({"name": field, "type": widgets[field][0], "widget": {"name": field}, "link": None})
        (slot,) = (slot for slot, entry in enumerate(page["inputs"]) if entry["name"] == field)
        entry = page["inputs"][slot]
        entry["link"] = len(links) + 1
        wire = (entry["link"], INPUT_NODE, place, node.id, slot, entry["type"])
        links.append(dict(zip(LINK, wire, strict=True)))
        made.append(_socket(blueprint, name, entry["type"], entry["link"]))
    return made


def _outputs(
    blueprint: Blueprint, nodes: Mapping[int, dict[str, Any]], links: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for place, (name, output) in enumerate(blueprint.outputs.items()):
        (slot, entry), *_ = (
            (slot, e) for slot, e in enumerate(nodes[output.node.id]["outputs"]) if e["name"] == output.name
        )
        link = len(links) + 1
        entry["links"] = [*(entry["links"] or []), link]
        wire = (link, output.node.id, slot, OUTPUT_NODE, place, entry["type"])
        links.append(dict(zip(LINK, wire, strict=True)))
        made.append(_socket(blueprint, name, entry["type"], link))
    return made


def _socket(blueprint: Blueprint, name: str, kind: str, link: int) -> dict[str, Any]:
    return {"id": _identifier(blueprint, f"{kind} {name}"), "name": name, "type": kind, "linkIds": [link]}


def _edges(nodes: list[dict[str, Any]], inputs: int, outputs: int) -> dict[str, Any]:
    """Two nodes that represent the subgraph's sockets, left and right of its nodes."""
    right = max(node["pos"][0] + node["size"][0] for node in nodes)
    sides = (
        ("inputNode", INPUT_NODE, -EDGE_WIDTH - EDGE_GAP, inputs),
        ("outputNode", OUTPUT_NODE, right + EDGE_GAP, outputs),
    )
    return {
        name: {"id": number, "bounding": [left, 0, EDGE_WIDTH, SLOT * (count + 2)]}
        for name, number, left, count in sides
    }


def _outer(
    blueprint: Blueprint,
    number: str,
    inputs: list[dict[str, Any]],
    outputs: list[dict[str, Any]],
    object_info: ObjectInfo,
) -> dict[str, Any]:
    """Outer node of the blueprint."""
    sockets: list[dict[str, Any]] = []
    values: list[Any] = []
    for entry in inputs:
        node, field = blueprint.inputs[entry["name"]]
        widgets = split_inputs(object_info[node.type])[1]
        socket = {"name": entry["name"], "type": entry["type"], "link": None}
        if field in widgets:
            socket["widget"] = {"name": entry["name"]}
            values.append(widget_value(node, field, *widgets[field][:2]))
        sockets.append(socket)
    return {
        "id": 1,
        "type": number,
        "pos": [0, 0],
        "size": [360, 240],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": sockets,
        "outputs": [{"name": entry["name"], "type": entry["type"], "links": None} for entry in outputs],
        "properties": {},
        "widgets_values": values,
        "title": blueprint.inner.title,
    }
