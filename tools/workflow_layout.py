"""Positions of nodes and groups on the page: columns of groups, each group with one or two stacks of nodes.

Heights are those of Nodes 2.0, the page's newer renderer, which draws nodes up to 80 units taller than the older one,
so both have enough space. Units are the page's. Standard library only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .workflow_wires import TITLE

NOTE = "MarkdownNote"
WIDTH = 280
WIDTHS = {  # of nodes with names of files, and of the trainer
    "CLIPLoader": 340,
    "CheckpointLoaderSimple": 310,
    "ControlDatasetFolder": 320,
    "ControlNeXtLoader": 455,
    "ControlNeXtTrain": 380,
    "ControlNeXtUNetLoader": 320,
    "ControlNetXSLoader": 350,
    "SaveAnimatedWEBP": 300,
    "SaveImage": 320,
    "SaveVideo": 300,
    "UNETLoader": 340,
    "VAELoader": 340,
}
HEIGHTS = {  # of nodes that show text or pictures; all others follow from their slots
    "CLIPTextEncode": 104,
    "CheckpointLoaderSimple": 134,  # with the footer of a missing file
    "ControlDatasetFolder": 400,  # room for its sheet of pictures
    "ControlNeXtLoader": 300,  # room for the report that appears when it has run
    "ControlNeXtSampleInputs": 350,  # room for its picture
    "ControlNeXtTrain": 600,  # room for the loss curve and the validation pictures
    "ControlNetXSLoader": 200,
    "CreateVideo": 114,  # newer ComfyUIs have a widget more
    "LossGraphNode": 260,
    "PreviewImage": 190,
    "SaveAnimatedWEBP": 340,
    "SaveImage": 340,
    "SaveVideo": 340,
}
GROWTH = {"CLIPTextEncode": 90, "ControlNeXtTrain": 460, "LossGraphNode": 200}
GROWTH |= dict.fromkeys(("ControlNeXtSampleInputs", "PreviewImage", "SaveAnimatedWEBP", "SaveImage", "SaveVideo"), 360)
"""Types of nodes that use remaining space, and its largest height."""
SLOT, WIDGET, EDGE, FOOTER = 20, 28, 14, 32
"""Heights in Nodes 2.0: a row of sockets, a widget, the edges; the footer of a node of a pack, or of one whose file is
missing."""
NODE_GAP, STACK_GAP, COLUMN_GAP, GROUP_GAP, PADDING, GROUP_TITLE = 38, 44, 50, 44, 18, 40
COLORS = ("#6f8794", "#7d7a94", "#6b8a78", "#94836d", "#7a858c")
"""Muted colours of the groups, so that wires and pictures stand out."""


class Column(NamedTuple):
    """Column of groups. groups: their numbers, from top to bottom; stacks: number of stacks in each of them, 1 or 2."""

    groups: tuple[int, ...]
    stacks: int


ARRANGEMENT = (Column((0, 2), 2), Column((1, 3), 1), Column((4,), 2))
"""Default arrangement: models over hint; prompts over control; result."""


@dataclass(frozen=True)
class Member:
    """Page node in its group. stack: as set in the description, or None; feeds:

    True if it feeds a node of the same group.
    """

    page: dict[str, Any]
    group: int
    stack: int | None
    feeds: bool


Stacks = list[list[dict[str, Any]]]


def size_of(type: str, sockets: int, widgets: int, footers: int) -> list[int]:
    """Width and height of a node without its title; sockets: number on the side with more of them."""
    height = EDGE + SLOT * sockets + WIDGET * widgets + FOOTER * footers
    return [WIDTHS.get(type, WIDTH), HEIGHTS.get(type, height)]


def place(titles: Sequence[str], arrangement: Sequence[Column], members: Sequence[Member]) -> list[dict[str, Any]]:
    """Set positions and sizes of the page nodes; returns the page's groups, without empty ones.

    A node that feeds another one of its group is put in the first stack, others in the second, notes where there is
    space. All columns get the height of the highest.
    """
    used = {member.group for member in members}
    columns = [
        {group: _stacks([m for m in members if m.group == group], count) for group in groups if group in used}
        for groups, count in arrangement
    ]
    tallest = max(map(_column_height, columns))
    made: list[dict[str, Any]] = []
    left = 0
    for column in columns:
        widths = [max(width, default=0) for width in zip(*map(_widths, column.values()), strict=True)]
        spare = (tallest - _column_height(column)) // len(column)
        top = 0
        for group, stacks in column.items():
            height = _inner_height(stacks) + spare
            _set_stacks(stacks, widths, left + PADDING, top + GROUP_TITLE, height)
            frame = [left, top, _across(widths) + 2 * PADDING, GROUP_TITLE + height + PADDING]
            made.append({"id": group + 1, "title": titles[group], "bounding": frame})
            top += frame[3] + GROUP_GAP
        left += _across(widths) + 2 * PADDING + COLUMN_GAP
    looks = {"font_size": 24, "flags": {}}
    return [group | {"color": COLORS[group["id"] - 1]} | looks for group in sorted(made, key=lambda g: g["id"])]


def _stacks(members: Sequence[Member], count: int) -> Stacks:
    stacks: Stacks = [[] for _ in range(count)]
    for member in members:
        if member.page["type"] != NOTE or member.stack is not None:
            wanted = member.stack if member.stack is not None else int(not member.feeds)
            stacks[min(wanted, count - 1)].append(member.page)
    for member in members:
        if member.page["type"] == NOTE and member.stack is None:
            min(stacks, key=_stack_height).append(member.page)
    return stacks


def _stack_height(stack: Sequence[dict[str, Any]]) -> int:
    return sum(TITLE + node["size"][1] + NODE_GAP for node in stack) - NODE_GAP * bool(stack)


def _inner_height(stacks: Stacks) -> int:
    return max(map(_stack_height, stacks))


def _column_height(column: dict[int, Stacks]) -> int:
    frames = [GROUP_TITLE + _inner_height(stacks) + PADDING for stacks in column.values()]
    return sum(frames) + GROUP_GAP * (len(frames) - 1)


def _widths(stacks: Stacks) -> list[int]:
    return [max((node["size"][0] for node in stack), default=0) for stack in stacks]


def _across(widths: Sequence[int]) -> int:
    used = [width for width in widths if width]
    return sum(used) + STACK_GAP * (len(used) - 1)


def _set_stacks(stacks: Stacks, widths: Sequence[int], left: int, top: int, height: int) -> None:
    """Set positions and sizes of the nodes of one group; its stacks begin at (left, top) and are `height` high."""
    for stack, width in zip(stacks, widths, strict=True):
        share = (height - _stack_height(stack)) // max(sum(node["type"] in GROWTH for node in stack), 1)
        y = top
        for node in stack:
            node["size"] = [width, node["size"][1] + min(share, GROWTH.get(node["type"], 0))]
            node["pos"] = [left, y + TITLE]
            y += TITLE + node["size"][1] + NODE_GAP
        left += width + STACK_GAP * bool(width)
