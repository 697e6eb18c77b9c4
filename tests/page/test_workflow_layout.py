"""Layout of the example graphs: sizes, lanes of wires, notes. How the page draws them is in test_browser_layouts.py."""

import json
import math
from typing import Any

import pytest
from comfyui_controlnext.tests.page.test_workflows import NAMES, page
from comfyui_controlnext.tools import make_workflows
from comfyui_controlnext.tools.workflow_graph import NOTE
from comfyui_controlnext.tools.workflow_layout import Column, Member, place, size_of
from comfyui_controlnext.tools.workflow_wires import (
    Box,
    Wire,
    as_reroutes,
    boxes_of,
    curve,
    group_box,
    is_clear,
    is_clear_in_both,
    node_box,
    obstacles,
    route,
    wires_of,
)

WINDOW, FILLED, SMALLEST = (1600, 988), 0.74, 0.61
"""Size of the window in pixels, and the share of it that the page fills with a fitted graph."""
FULL = 0.48
"""Smallest share of a column's frames that its nodes cover; titles, edges and gaps are a third."""


def bounds(graph: dict[str, Any]) -> tuple[float, float]:
    boxes = [node_box(node) for node in graph["nodes"]]
    return (
        max(b.right for b in boxes) - min(b.left for b in boxes),
        max(b.bottom for b in boxes) - min(b.top for b in boxes),
    )


def points_of(graph: dict[str, Any], wire: Wire) -> list[tuple[float, float]]:
    """Points of a wire: start, reroute points and end."""
    reroutes = {reroute["id"]: reroute for reroute in graph["extra"].get("reroutes", [])}
    last = {entry["id"]: entry["parentId"] for entry in graph["extra"].get("linkExtensions", [])}
    between: list[tuple[float, float]] = []
    number = last.get(wire.link)
    while number is not None:
        assert wire.link in reroutes[number]["linkIds"]
        between.insert(0, tuple(reroutes[number]["pos"]))
        number = reroutes[number].get("parentId")
    return [wire.start, *between, wire.end]


def test_there_are_many_examples() -> None:
    assert len(NAMES) >= 20


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_fits_the_window_with_all_its_text(name: str) -> None:
    graph = page(name)
    scale = min(FILLED * side / length for side, length in zip(WINDOW, bounds(graph), strict=True))
    assert scale >= SMALLEST
    assert len({group["bounding"][0] for group in graph["groups"]}) <= 3, "columns of groups"


@pytest.mark.parametrize("name", NAMES)
def test_no_wire_passes_behind_a_node_or_a_title_or_through_a_foreign_group(name: str) -> None:
    graph = page(name)
    boxes = boxes_of(graph)
    frames = [group_box(group) for group in graph["groups"]]
    types = {node["id"]: node["type"] for node in graph["nodes"]}
    assert [
        (types[wire.origin], types[wire.target])
        for wire in wires_of(graph, {})
        if not is_clear_in_both(wire, points_of(graph, wire)[1:-1], obstacles(wire, boxes, frames))
    ] == []


@pytest.mark.parametrize("name", NAMES)
def test_notes_have_titles_that_say_something_and_no_code(name: str) -> None:
    for node in page(name)["nodes"]:
        if node["type"] == NOTE:
            assert node["title"] != "Note" and 6 <= len(node["title"]) <= 30, "longer ones are cut"
            (text,) = node["widgets_values"]
            assert "`" not in text and not text.startswith(f"**{node['title']}")


@pytest.mark.parametrize("name", NAMES)
def test_no_column_is_left_empty(name: str) -> None:
    graph = page(name)
    frames = [group_box(group) for group in graph["groups"]]
    for left in {frame.left for frame in frames}:
        column = [frame for frame in frames if frame.left == left]
        within = [node_box(n) for n in graph["nodes"] if any(f.holds(tuple(n["pos"])) for f in column)]
        area, used = (sum((b.right - b.left) * (b.bottom - b.top) for b in those) for those in (column, within))
        assert used > FULL * area


def test_a_curve_is_the_bezier_of_its_corners() -> None:
    """Against de Casteljau's construction, for a wire without reroute points."""
    start, end = (0.0, 0.0), (300.0, 400.0)
    corners = [start, (125.0, 0.0), (175.0, 400.0), end]
    for step, point in enumerate(curve((start, end))):
        level = corners
        while len(level) > 1:
            t = step / 24
            level = [
                tuple((1 - t) * a + t * b for a, b in zip(p, q, strict=True))
                for p, q in zip(level, level[1:], strict=False)
            ]
        assert math.dist(level[0], point) < 1e-9


def test_a_wire_goes_around_what_is_in_its_way() -> None:
    boxes = {1: Box(0, 0, 100, 100), 2: Box(200, -50, 300, 150), 3: Box(400, 0, 500, 100)}
    wire = Wire(7, 1, 0, (90, 44), 3, (410, 44))
    assert not is_clear((wire.start, wire.end), obstacles(wire, boxes, []))
    lanes = route([wire], boxes, [])
    assert is_clear((wire.start, *lanes[7], wire.end), obstacles(wire, boxes, []))
    assert route([Wire(8, 1, 0, (90, 44), 2, (210, 44))], boxes, []) == {}, "a free wire needs no reroute points"


def test_a_wire_keeps_out_of_a_foreign_group() -> None:
    boxes = {1: Box(0, 0, 100, 100), 3: Box(400, 0, 500, 100)}
    wire = Wire(7, 1, 0, (90, 44), 3, (410, 44))
    assert route([wire], boxes, [Box(-10, -10, 110, 110), Box(390, -10, 510, 110)]) == {}
    foreign = Box(180, -60, 320, 160)
    (way,) = route([wire], boxes, [foreign]).values()
    assert not any(foreign.holds(point) for point in curve((wire.start, *way, wire.end)))


def test_wires_of_one_output_share_their_reroute_points() -> None:
    wires = [Wire(1, 5, 0, (0, 0), 6, (9, 9)), Wire(2, 5, 0, (0, 0), 7, (9, 50)), Wire(3, 5, 1, (0, 9), 7, (9, 60))]
    way = ((20.0, -30.0), (80.0, -30.0))
    made = as_reroutes(wires, {1: way, 2: (way[0], (90.0, -30.0)), 3: way})
    first, shared_end, other_end, own, own_end = made["reroutes"]
    assert first["linkIds"] == [1, 2] and shared_end["parentId"] == other_end["parentId"] == first["id"]
    assert own["linkIds"] == [3] and own["id"] != first["id"] and own_end["parentId"] == own["id"]
    assert [entry["id"] for entry in made["linkExtensions"]] == [1, 2, 3]
    assert as_reroutes(wires, {}) == {}


def test_nodes_that_feed_others_stand_before_them_and_columns_are_equally_high() -> None:
    pages = [{"type": kind, "size": size_of(kind, 2, 3, 0)} for kind in ("A", "B", "C", NOTE, "D")]
    pages[3]["size"] = [200, 100]
    groups = (0, 0, 1, 0, 2)
    feeds = (True, False, False, False, False)
    members = [Member(p, g, None, f) for p, g, f in zip(pages, groups, feeds, strict=True)]
    made = place(("one", "two", "three", "none"), (Column((0,), 2), Column((1, 2, 3), 1)), members)
    assert [group["title"] for group in made] == ["one", "two", "three"], "a group without nodes is left out"
    a, b, c, note, d = (page["pos"] for page in pages)
    assert a[1] == b[1] and a[0] < b[0] and note[0] in (a[0], b[0]) and note[1] > a[1]
    assert c[0] == d[0] > b[0] and d[1] > c[1]
    left, above, below = (group["bounding"] for group in made)
    assert abs(left[3] - (below[1] + below[3])) <= 1


def test_the_script_lays_out_what_is_committed(tmp_path: Any) -> None:
    """Positions are whole numbers, so that files do not change with the machine."""
    for describe in make_workflows.WORKFLOWS:
        graph = json.loads((make_workflows.FOLDER / f"{describe().title}.json").read_text("utf-8"))
        for node in graph["nodes"]:
            assert all(isinstance(number, int) for number in (*node["pos"], *node["size"]))
