"""Workflow described once, written twice: as a graph for the page and in the API's format.

Which inputs are widgets, their order and the outputs come from a running host's description of its nodes
(/object_info), so that a description names inputs and outputs only. Positions follow from the groups
(`workflow_layout`), and so do the lanes of wires (`workflow_wires`). Standard library only.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .workflow_layout import ARRANGEMENT, NOTE, WIDTH, Column, Member, place, size_of
from .workflow_wires import SLOT, as_reroutes, boxes_of, group_box, route, wires_of

ObjectInfo = Mapping[str, Mapping[str, Any]]
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
OPTIONAL_SHAPE = 7  # how the page draws the dot of an input that may stay empty

NOTE_COLOR, NOTE_BACKGROUND = "#332d20", "#4a4230"
OLD_WIDGET = 24  # height of a widget in the older renderer, for the wires that end at one


@dataclass(frozen=True)
class Model:
    """Published file, reported by the page where it is missing. folder: below models/; name: as in its widget."""

    folder: str
    name: str
    url: str

    def entry(self) -> dict[str, str]:
        """Model as an entry of the page's JSON."""
        return {"name": self.name, "url": self.url, "directory": self.folder}


@dataclass(frozen=True)
class Output:
    """Output of a node, used as an input of a later one."""

    node: "Node"
    name: str


@dataclass
class Node:
    """Node of a workflow; `node["MODEL"]` is its output of that name. stack: the first (0) or
    second (1) of its group.
    """

    id: int
    type: str
    group: int
    inputs: dict[str, Any]
    title: str | None = None
    models: tuple[Model, ...] = ()
    stack: int | None = None

    def __getitem__(self, name: str) -> Output:
        return Output(self, name)


@dataclass
class Workflow:
    """Workflow of nodes in groups. name: an identifier; title: its name on the page and of its file; groups: their
    titles.
    """

    name: str
    title: str
    groups: tuple[str, ...]
    nodes: list[Node] = field(default_factory=list)
    arrangement: tuple[Column, ...] = ARRANGEMENT

    def add(
        self, group: int, type: str, title: str | None = None, models: tuple[Model, ...] = (), **inputs: Any
    ) -> Node:
        """Add a node to a group; give every input that differs from the node's default."""
        node = Node(len(self.nodes) + 1, type, group, inputs, title, models)
        self.nodes.append(node)
        return node

    def note(self, group: int, title: str, text: str, height: int) -> Node:
        """Add a note. title: its subject; text: Markdown, with names in bold: code is hard to read on notes."""
        return self.add(group, NOTE, title, text=text.strip(), height=height)


def split_inputs(info: Mapping[str, Any]) -> tuple[dict[str, tuple[Any, ...]], dict[str, tuple[Any, ...]]]:
    """Sockets and widgets of a node in the page's order: {name: (type, options, optional)}."""
    sockets: dict[str, tuple[Any, ...]] = {}
    widgets: dict[str, tuple[Any, ...]] = {}
    for part in ("required", "optional"):
        for name, (kind, *rest) in info["input"].get(part, {}).items():
            options = rest[0] if rest else {}
            kind, options = ("COMBO", {"options": kind, **options}) if isinstance(kind, list) else (kind, options)
            is_widget = kind in WIDGET_TYPES and not options.get("forceInput")
            (widgets if is_widget else sockets)[name] = (kind, options, part == "optional")
    return sockets, widgets


def widget_value(node: Node, name: str, kind: str, options: Mapping[str, Any]) -> Any:
    """Value of a widget: as described, else (or where a wire is connected) the host's default."""
    if name in node.inputs and not isinstance(node.inputs[name], Output):
        return node.inputs[name]
    if "default" in options:
        return options["default"]
    if kind == "COMBO":
        raise KeyError(f"{node.type}.{name}: has no default; the description must say which")
    return {"STRING": "", "BOOLEAN": False}.get(kind, 0)


def output_index(output: Output, object_info: ObjectInfo) -> int:
    """Index of an output. Raises KeyError naming the existing ones."""
    names = list(object_info[output.node.type]["output_name"])
    if output.name not in names:
        raise KeyError(f"{output.node.type} has no output {output.name!r}; it has {names}")
    return names.index(output.name)


def api_format(workflow: Workflow, object_info: ObjectInfo) -> dict[str, Any]:
    """Graph in the format of POST /prompt: {node id: {"class_type", "inputs", "_meta"}}."""
    prompt: dict[str, Any] = {}
    for node in workflow.nodes:
        if node.type == NOTE:
            continue
        info = object_info[node.type]
        sockets, widgets = split_inputs(info)
        unknown = node.inputs.keys() - sockets.keys() - widgets.keys()
        if unknown:
            raise KeyError(f"{node.type} has no input {sorted(unknown)}; it has {[*sockets, *widgets]}")
        inputs: dict[str, Any] = {
            name: widget_value(node, name, kind, options) for name, (kind, options, _) in widgets.items()
        }
        for name in (*_wired(node, widgets), *(name for name in sockets if name in node.inputs)):
            output = node.inputs[name]
            inputs[name] = [str(output.node.id), output_index(output, object_info)]
        title = node.title or info["display_name"] or node.type
        prompt[str(node.id)] = {"inputs": inputs, "class_type": node.type, "_meta": {"title": title}}
    return prompt


def _wired(node: Node, widgets: Mapping[str, Any]) -> list[str]:
    """Names of the widgets whose value comes from a wire."""
    return [name for name in widgets if isinstance(node.inputs.get(name), Output)]


def page_format(workflow: Workflow, object_info: ObjectInfo) -> dict[str, Any]:
    """Graph in the page's format (workflow schema 0.4)."""
    nodes = {node.id: _page_node(node, object_info) for node in workflow.nodes}
    links: list[list[Any]] = []
    for node in workflow.nodes:
        for slot, entry in enumerate(nodes[node.id]["inputs"]):
            output = node.inputs.get(entry["name"])
            if isinstance(output, Output):
                origin_slot = output_index(output, object_info)
                links.append([len(links) + 1, output.node.id, origin_slot, node.id, slot, entry["type"]])
                entry["link"] = len(links)
                origin = nodes[output.node.id]["outputs"][origin_slot]
                origin["links"] = [*(origin["links"] or []), len(links)]
    graph = {"nodes": list(nodes.values()), "links": links, "groups": _place(workflow, nodes)}
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"controlnext/{workflow.name}")),
        "revision": 0,
        "last_node_id": len(workflow.nodes),
        "last_link_id": len(links),
        **graph,
        "config": {},
        "extra": _lanes(graph, _widget_heights(workflow, object_info)),
        "version": 0.4,
    }


def _page_node(node: Node, object_info: ObjectInfo) -> dict[str, Any]:
    """Page node without links and position."""
    made: dict[str, Any] = {"id": node.id, "type": node.type, "pos": [0, 0], "size": [0, 0], "flags": {}}
    made |= {"order": node.id - 1, "mode": 0, "inputs": [], "outputs": [], "properties": {}}
    if node.title:
        made["title"] = node.title
    if node.type == NOTE:
        return made | {
            "size": [WIDTH, node.inputs["height"]],
            "widgets_values": [node.inputs["text"]],
            "color": NOTE_COLOR,
            "bgcolor": NOTE_BACKGROUND,
        }
    info = object_info[node.type]
    sockets, widgets = split_inputs(info)
    made["inputs"] = [_input(name, kind, optional) for name, (kind, _, optional) in sockets.items()]
    for name in _wired(node, widgets):
        made["inputs"].append(_input(name, widgets[name][0], widgets[name][2]) | {"widget": {"name": name}})
    values: list[Any] = []
    for name, (kind, options, _) in widgets.items():
        values.append(widget_value(node, name, kind, options))
        if options.get("control_after_generate"):
            values.append("fixed")
        if options.get("image_upload") or options.get("video_upload"):
            values.append("image")
    made["outputs"] = [
        {"name": name, "type": kind, "links": None}
        for name, kind in zip(info["output_name"], info["output"], strict=True)
    ]
    made["properties"] = {"Node name for S&R": node.type}
    if node.models:
        made["properties"]["models"] = [model.entry() for model in node.models]
    made["widgets_values"] = values
    rows = max(len(sockets), len(info["output"]))
    hidden = sum(bool(options.get("advanced")) for _, options, _ in widgets.values())
    footers = info["python_module"].startswith("custom_nodes.") + bool(node.models) + bool(hidden)
    made["size"] = size_of(node.type, rows, len(values) - hidden, footers)
    return made


def _input(name: str, kind: str, optional: bool) -> dict[str, Any]:
    shape = {"shape": OPTIONAL_SHAPE} if optional else {}
    return {"name": name, **shape, "type": kind, "link": None}


def _place(workflow: Workflow, nodes: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Set positions of the page nodes; returns the groups."""
    wires = [(value.node, node) for node in workflow.nodes for value in node.inputs.values() if is_output(value)]
    feeding = {origin.id for origin, node in wires if origin.group == node.group}
    members = [Member(nodes[node.id], node.group, node.stack, node.id in feeding) for node in workflow.nodes]
    return place(workflow.groups, workflow.arrangement, members)


def is_output(value: Any) -> bool:
    """True: a wire is connected to the input. False: it has a value."""
    return isinstance(value, Output)


def _widget_heights(workflow: Workflow, object_info: ObjectInfo) -> dict[tuple[int, str], float]:
    """Offsets of wires into widgets below the top of a node, by the node's number and the widget's name."""
    found: dict[tuple[int, str], float] = {}
    for node in workflow.nodes:
        if node.type != NOTE:
            info = object_info[node.type]
            sockets, widgets = split_inputs(info)
            above = SLOT * max(len(sockets), len(info["output"])) + OLD_WIDGET // 2
            found |= {(node.id, name): above + OLD_WIDGET * place for place, name in enumerate(widgets)}
    return found


def _lanes(graph: Mapping[str, Any], widget_heights: Mapping[tuple[int, str], float]) -> dict[str, Any]:
    """Reroute points for the wires that would pass behind a node or through a group of others."""
    wires = wires_of(graph, widget_heights)
    return as_reroutes(wires, route(wires, boxes_of(graph), [group_box(group) for group in graph["groups"]]))
