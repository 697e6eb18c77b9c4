"""A workflow described once, written twice: as a graph for the page and in the API's format.

Which inputs are widgets, their order and the outputs come from what a running host says of its nodes (/object_info),
so that a description names inputs and outputs only. Positions follow from columns: each column is a group on the
page, its nodes stacked from top to bottom. Standard library only.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ObjectInfo = Mapping[str, Mapping[str, Any]]
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
OPTIONAL_SHAPE = 7  # how the page draws the dot of an input that may stay empty

TITLE, SLOT, WIDGET = 30, 20, 24  # heights in the page's units
WIDTH = 300
GAP, PADDING, GROUP_TITLE = 40, 20, 50
SIZES = {  # of nodes that show text or pictures; all others follow from their slots
    "CLIPTextEncode": (380, 140),
    "ControlDatasetFolder": (380, 440),  # room for its sheet of pictures
    "ControlNeXtTrain": (420, 760),  # room for the loss curve and the validation pictures
    "ControlNeXtLoader": (380, 260),  # room for the report that appears when it has run
    "ControlNetXSLoader": (380, 190),
    "ControlNeXtSampleInputs": (300, 450),  # room for its picture
    "GetImageSize": (300, 130),
    "LossGraphNode": (420, 360),
    "LoadImage": (300, 320),
    "LoadVideo": (300, 620),  # as high as the page makes it for a portrait video
    "PreviewImage": (300, 260),
    "SaveAnimatedWEBP": (420, 460),
    "SaveImage": (420, 460),
    "SaveVideo": (420, 460),
}
NOTE, NOTE_COLOR, NOTE_BACKGROUND = "MarkdownNote", "#432", "#653"
GROUP_COLORS = ("#3f789e", "#b58b2a", "#8888aa", "#a1309b", "#88aa88")


@dataclass(frozen=True)
class Model:
    """A published file that the page reports where it is missing. folder: below models/; name: as its widget says."""

    folder: str
    name: str
    url: str

    def entry(self) -> dict[str, str]:
        """As the page reads it."""
        return {"name": self.name, "url": self.url, "directory": self.folder}


@dataclass(frozen=True)
class Output:
    """An output of a node, to be given as an input of a later one."""

    node: "Node"
    name: str


@dataclass
class Node:
    """One node; `node["MODEL"]` is its output of that name."""

    id: int
    type: str
    column: int
    inputs: dict[str, Any]
    title: str | None = None
    models: tuple[Model, ...] = ()

    def __getitem__(self, name: str) -> Output:
        return Output(self, name)


@dataclass
class Workflow:
    """Nodes in columns. name: an identifier; title: its name on the page and of its file; columns: their titles."""

    name: str
    title: str
    columns: tuple[str, ...]
    nodes: list[Node] = field(default_factory=list)

    def add(
        self, column: int, type: str, title: str | None = None, models: tuple[Model, ...] = (), **inputs: Any
    ) -> Node:
        """Add a node below those that its column has; give every input that differs from the node's default."""
        node = Node(len(self.nodes) + 1, type, column, inputs, title, models)
        self.nodes.append(node)
        return node

    def note(self, column: int, text: str, height: int) -> None:
        """Add a note. text: Markdown."""
        self.add(column, NOTE, "Note", text=text.strip(), height=height)


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
    """The value of a widget: as described, else (or where a wire goes in) the host's default."""
    if name in node.inputs and not isinstance(node.inputs[name], Output):
        return node.inputs[name]
    if "default" in options:
        return options["default"]
    if kind == "COMBO":
        raise KeyError(f"{node.type}.{name}: has no default; the description must say which")
    return {"STRING": "", "BOOLEAN": False}.get(kind, 0)


def output_index(output: Output, object_info: ObjectInfo) -> int:
    """Position of an output. Raises KeyError naming those that there are."""
    names = list(object_info[output.node.type]["output_name"])
    if output.name not in names:
        raise KeyError(f"{output.node.type} has no output {output.name!r}; it has {names}")
    return names.index(output.name)


def api_format(workflow: Workflow, object_info: ObjectInfo) -> dict[str, Any]:
    """Graph as POST /prompt takes it: {node id: {"class_type", "inputs", "_meta"}}."""
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
    """Widgets that get their value over a wire."""
    return [name for name in widgets if isinstance(node.inputs.get(name), Output)]


def page_format(workflow: Workflow, object_info: ObjectInfo) -> dict[str, Any]:
    """The graph as the page saves it (workflow schema 0.4)."""
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
    groups = _place(workflow, nodes)
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"controlnext/{workflow.name}")),
        "revision": 0,
        "last_node_id": len(workflow.nodes),
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _page_node(node: Node, object_info: ObjectInfo) -> dict[str, Any]:
    """One node without links and position."""
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
    height = SLOT * rows + (WIDGET * len(values) + 8 if values else 0) + 6
    made["size"] = list(SIZES.get(node.type, (WIDTH, height)))
    return made


def _input(name: str, kind: str, optional: bool) -> dict[str, Any]:
    shape = {"shape": OPTIONAL_SHAPE} if optional else {}
    return {"name": name, **shape, "type": kind, "link": None}


def _place(workflow: Workflow, nodes: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Set positions column by column; return one group per column."""
    groups: list[dict[str, Any]] = []
    left = 0
    for column, title in enumerate(workflow.columns):
        members = [nodes[node.id] for node in workflow.nodes if node.column == column]
        width = max(node["size"][0] for node in members)
        top = GROUP_TITLE
        for node in members:
            node["size"][0] = width
            node["pos"] = [left + PADDING, top + TITLE]
            top += TITLE + node["size"][1] + GAP
        bounding = [left, 0, width + 2 * PADDING, top - GAP + PADDING]
        color = GROUP_COLORS[column % len(GROUP_COLORS)]
        groups.append(
            {"id": column + 1, "title": title, "bounding": bounding, "color": color, "font_size": 24, "flags": {}}
        )
        left += width + 2 * PADDING + GAP
    return groups
