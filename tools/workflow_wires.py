"""Wires on the page: their curves in the page's renderers, and lanes around nodes or groups in the way.

A lane is a pair of the page's reroute points, in a gap between nodes. Units are the page's. Standard library only.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

TITLE = 30  # height of a node's title, which stands above its position
GROUP_LETTER, GROUP_LINE = 13, 32  # size of the title of a group
SLOT, SLOT_INSET = 20, 10
NODES_2_RISE = 2
"""Distance by which Nodes 2.0 draws sockets higher than the older renderer: it puts them on the edges of their
nodes."""
OWN_EDGE = 16
"""Largest distance that a wire may run behind the edge of a node at which it starts or ends."""
SPLINE_REACH = 80
"""Longest handle of a curve at a reroute point: the page's setting LiteGraph.Reroute.SplineOffset."""
LANE, LANE_EDGE, OUTER_LANES, OFFSETS = 10, 12, 8, (12, 20, 28, 36, 46)
"""Heights of lanes, and horizontal distances from its node at which a wire turns."""
STEP, CORNER, APART, MARGIN = 22, 10, 7, 4
SAMPLES = 24

Point = tuple[float, float]


class Box(NamedTuple):
    """Rectangle by its four sides."""

    left: float
    top: float
    right: float
    bottom: float

    def holds(self, point: Point) -> bool:
        return self.left < point[0] < self.right and self.top < point[1] < self.bottom


@dataclass(frozen=True)
class Wire:
    """Wire from an output to an input. link: its number; origin, target: numbers of nodes."""

    link: int
    origin: int
    slot: int
    start: Point
    target: int
    end: Point


def node_box(node: Mapping[str, Any]) -> Box:
    """Rectangle of a page node with its title."""
    (x, y), (width, height) = node["pos"], node["size"]
    return Box(x, y - TITLE, x + width, y + height)


def group_box(group: Mapping[str, Any]) -> Box:
    """Rectangle of a page group."""
    x, y, width, height = group["bounding"]
    return Box(x, y, x + width, y + height)


def title_box(group: Mapping[str, Any]) -> Box:
    """Rectangle of the title of a page group, which no wire should cross."""
    x, y, *_ = group["bounding"]
    return Box(x, y, x + GROUP_LETTER * len(group["title"]), y + GROUP_LINE)


def boxes_of(graph: Mapping[str, Any]) -> dict[int, Box]:
    """Rectangles in the way of wires: of nodes by number, of the titles of groups by their negative number."""
    titles = {-group["id"]: title_box(group) for group in graph["groups"]}
    return titles | {node["id"]: node_box(node) for node in graph["nodes"]}


def wires_of(graph: Mapping[str, Any], widget_heights: Mapping[tuple[int, str], float]) -> list[Wire]:
    """Wires of a page graph. widget_heights: offset below the node's top of (node, name), for
    inputs that are widgets.
    """
    nodes = {node["id"]: node for node in graph["nodes"]}
    return [
        Wire(link, origin, slot, _output(nodes[origin], slot), target, _input(nodes[target], place, widget_heights))
        for link, origin, slot, target, place, _ in graph["links"]
    ]


def _output(node: Mapping[str, Any], slot: int) -> Point:
    return node["pos"][0] + node["size"][0] - SLOT_INSET, node["pos"][1] + SLOT * (slot + 0.7)


def _input(node: Mapping[str, Any], slot: int, widget_heights: Mapping[tuple[int, str], float]) -> Point:
    below = widget_heights.get((node["id"], node["inputs"][slot]["name"]), SLOT * (slot + 0.7))
    return node["pos"][0] + SLOT_INSET, node["pos"][1] + below


def curve(points: Sequence[Point]) -> list[Point]:
    """Points on the wire through start, reroute points and end, as the page's litegraph draws its splines."""
    drawn: list[Point] = []
    handle: Point = (0.25 * math.dist(*points[:2]), 0.0)
    for before, at, after in zip(points, points[1:], points[2:], strict=False):
        angle = _angle(before, at, after)
        reach = min(SPLINE_REACH, 0.25 * math.dist(before, at))
        drawn += _bezier(before, handle, at, (-reach * math.cos(angle), -reach * math.sin(angle)))
        reach = min(SPLINE_REACH, 0.25 * math.dist(at, after))
        handle = reach * math.cos(angle), reach * math.sin(angle)
    return drawn + _bezier(points[-2], handle, points[-1], (-0.25 * math.dist(*points[-2:]), 0.0))


def _angle(before: Point, at: Point, after: Point) -> float:
    """Direction of a wire at a reroute point, between the directions of its two parts."""
    come = math.atan2(at[1] - before[1], at[0] - before[0])
    half = (come - math.atan2(after[1] - at[1], after[0] - at[0])) / 2
    return come - (half + math.pi if abs(half) > math.pi / 2 else half)


def _bezier(start: Point, handle: Point, end: Point, end_handle: Point) -> list[Point]:
    corners = (start, _sum(start, handle), _sum(end, end_handle), end)
    return [_on_bezier(corners, step / SAMPLES) for step in range(SAMPLES + 1)]


def _sum(one: Point, other: Point) -> Point:
    return one[0] + other[0], one[1] + other[1]


def _on_bezier(corners: Sequence[Point], t: float) -> Point:
    weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
    x, y = (sum(w * corner[axis] for w, corner in zip(weights, corners, strict=True)) for axis in (0, 1))
    return x, y


def obstacles(wire: Wire, boxes: Mapping[int, Box], groups: Iterable[Box]) -> list[Box]:
    """Obstacles of the wire: nodes, without the edges of the two it connects, and other groups."""
    ends = (boxes[wire.origin], boxes[wire.target])
    foreign = [g for g in groups if not any(g.holds(((b.left + b.right) / 2, (b.top + b.bottom) / 2)) for b in ends)]
    nodes = dict(boxes)
    nodes[wire.origin] = nodes[wire.origin]._replace(right=wire.start[0] + SLOT_INSET - OWN_EDGE)
    nodes[wire.target] = nodes[wire.target]._replace(left=wire.end[0] - SLOT_INSET + OWN_EDGE)
    return [*nodes.values(), *foreign]


def is_clear(points: Sequence[Point], in_the_way: Sequence[Box]) -> bool:
    """True: the wire through these points crosses none of the boxes. False: it crosses one."""
    return not any(box.holds(point) for point in curve(points) for box in in_the_way)


def is_clear_in_both(wire: Wire, way: Sequence[Point], in_the_way: Sequence[Box]) -> bool:
    """True: the wire through these reroute points crosses none of the boxes in either renderer.

    False: it crosses one.
    """
    (x, y), (u, v) = wire.start, wire.end
    edges = (x + SLOT_INSET, y - NODES_2_RISE), (u - SLOT_INSET, v - NODES_2_RISE)
    return is_clear((wire.start, *way, wire.end), in_the_way) and is_clear((edges[0], *way, edges[1]), in_the_way)


def route(wires: Sequence[Wire], boxes: Mapping[int, Box], groups: Sequence[Box]) -> dict[int, tuple[Point, ...]]:
    """Reroute points for the wires that cross nodes, by link. A wire without a free lane stays direct."""
    taken: list[tuple[Wire, tuple[Point, ...]]] = []
    for wire in sorted(wires, key=lambda w: math.dist(w.start, w.end)):
        in_the_way = obstacles(wire, {number: _wider(box) for number, box in boxes.items()}, groups)
        if not is_clear_in_both(wire, (), in_the_way):
            ways = (way for way in _by_length(wire, in_the_way) if _is_free(wire, way, taken))
            lane = next((way for way in ways if is_clear_in_both(wire, way, in_the_way)), ())
            taken.append((wire, lane))
    return {wire.link: lane for wire, lane in taken if lane}


def _wider(box: Box) -> Box:
    """Box enlarged for the sockets of Nodes 2.0, which are a little lower."""
    return Box(box.left - MARGIN, box.top - MARGIN, box.right + MARGIN, box.bottom + MARGIN)


def _by_length(wire: Wire, in_the_way: Sequence[Box]) -> list[tuple[Point, ...]]:
    """Routes with reroute points: fewest points first, then by length."""
    found: list[tuple[Point, ...]] = []
    for out, back in itertools.product(OFFSETS, OFFSETS):
        x, u = wire.start[0] + SLOT_INSET + out, wire.end[0] - SLOT_INSET - back
        for y in _lanes(min(x, u), max(x, u), in_the_way):
            found += [((x, y), (u, y)), _with_corners(wire, x, y, u)]
        down = math.copysign(STEP, wire.end[1] - wire.start[1])
        found.append(((x, wire.start[1] + down), (x, wire.end[1] - down)))
    return sorted(found, key=lambda way: (len(way), _length((wire.start, *way, wire.end))))


def _length(points: Sequence[Point]) -> float:
    return sum(math.dist(*pair) for pair in itertools.pairwise(points))


def _with_corners(wire: Wire, x: float, y: float, u: float) -> tuple[Point, ...]:
    """Route through a narrow lane: points at both sides of each corner prevent the curve from overshooting."""
    down, on, along = (math.copysign(1, length) for length in (y - wire.start[1], wire.end[1] - y, u - x))
    first = ((x, wire.start[1] + down * STEP), (x, y - down * CORNER), (x + along * CORNER, y))
    return (*first, (u - along * CORNER, y), (u, y + on * CORNER), (u, wire.end[1] - on * STEP))


def _lanes(left: float, right: float, in_the_way: Sequence[Box]) -> Iterator[float]:
    """Free heights for a lane between two horizontal positions, some units apart."""
    blocked = sorted((box.top, box.bottom) for box in in_the_way if box.left < right and left < box.right)
    reach = min(box.top for box in in_the_way) if not blocked else blocked[0][0]
    yield from (reach - 2 * LANE_EDGE - LANE * number for number in range(OUTER_LANES))
    for top, bottom in blocked:
        count = int((top - reach - 2 * LANE_EDGE) // LANE) + 1
        middle = (top + reach - LANE * (count - 1)) / 2
        yield from (middle + LANE * number for number in range(count))
        reach = max(reach, bottom)
    yield from (reach + 2 * LANE_EDGE + LANE * number for number in range(OUTER_LANES))


def _is_free(wire: Wire, way: Sequence[Point], taken: Iterable[tuple[Wire, tuple[Point, ...]]]) -> bool:
    """True: the route has no point near one of a wire from another output, and shares no straight part with it.

    False: it does.
    """
    others = [points for other, points in taken if (other.origin, other.slot) != (wire.origin, wire.slot)]
    parts = [(part, axis) for points in others for part in itertools.pairwise(points) for axis in (0, 1)]
    return not any(
        _beside(mine, theirs, axis) for mine in itertools.pairwise(way) for theirs, axis in parts if _flat(theirs, axis)
    )


def _flat(part: tuple[Point, Point], axis: int) -> bool:
    return part[0][axis] == part[1][axis]


def _beside(mine: tuple[Point, Point], theirs: tuple[Point, Point], axis: int) -> bool:
    """True: two parts run along the same line, across `axis`, and overlap. False: they do not."""
    if not _flat(mine, axis) or abs(mine[0][axis] - theirs[0][axis]) > APART:
        return False
    (a, b), (c, d) = (sorted(point[1 - axis] for point in part) for part in (mine, theirs))
    return a < d and c < b


def as_reroutes(wires: Sequence[Wire], lanes: Mapping[int, Sequence[Point]]) -> dict[str, list[dict[str, Any]]]:
    """Reroute points in the form of a page graph (its `extra`). Wires of one output share equal points."""
    made: dict[tuple[int, int, tuple[Point, ...]], dict[str, Any]] = {}
    ends: list[dict[str, Any]] = []
    for wire in wires:
        before: dict[str, Any] = {}
        for count in range(1, len(lanes.get(wire.link, ())) + 1):
            way = tuple(lanes[wire.link][:count])
            parent = {"parentId": before["id"]} if before else {}
            fresh = {"id": len(made) + 1, **parent, "pos": [round(c) for c in way[-1]], "linkIds": []}
            before = made.setdefault((wire.origin, wire.slot, way), fresh)
            before["linkIds"].append(wire.link)
        if before:
            ends.append({"id": wire.link, "parentId": before["id"]})
    return {"reroutes": list(made.values()), "linkExtensions": ends} if ends else {}
