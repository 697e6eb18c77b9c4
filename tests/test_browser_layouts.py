"""Example graphs as the real page draws them, in the older renderer and in Nodes 2.0: readable, nothing covered.

Screenshots go to the folder that CONTROLNEXT_SCREENSHOTS names; look at them one by one after a change of the graphs.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from comfyui_controlnext.tests.test_browser import ARGUMENTS, READY, TIMEOUT, TITLES, chromium_path, page_graph
from comfyui_controlnext.tools.comfy_server import ComfyServer

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.comfy, pytest.mark.browser]

OLDER, NODES_2 = "older", "Nodes 2.0"
SMALLEST = 0.62
"""Scale of the page when it has fitted a graph. It draws no text of nodes below 8 / 14."""
OPEN = "(graph) => app.loadGraphData(graph, true, true, null, {openSource: 'template'})"
BOXES = """() => app.graph.nodes.map(node => {  // with the title, in the graph's units
    const {scale, offset} = app.canvas.ds, frame = app.canvas.canvas.getBoundingClientRect();
    const drawn = LiteGraph.vueNodesMode && document.querySelector(`[data-node-id="${node.id}"]`);
    if (LiteGraph.vueNodesMode && !drawn) return [node.id, null];
    if (!drawn) return [node.id, [node.pos[0], node.pos[1] - 30, node.size[0], node.size[1] + 30]];
    const {left, top, width, height} = drawn.getBoundingClientRect();
    return [node.id, [(left - frame.left) / scale - offset[0], (top - frame.top) / scale - offset[1],
                      width / scale, height / scale]];
})"""
BEHIND = """(boxes) => {  // wires that cross the edge of a node, but for the 18 units at its sockets
    const pen = document.createElement('canvas').getContext('2d'), found = [];
    pen.lineWidth = 2;
    for (const wire of app.canvas.renderedPaths) for (const [id, [left, top, width, height]] of boxes) {
        const [x, y, u, v] = [left + 18, top + 3, left + width - 18, top + height - 3];
        const meets = (a, b) => pen.isPointInStroke(wire.path, a, b);
        let met = false;
        for (let a = x; a <= u; a += 2) met ||= meets(a, y) || meets(a, v);
        for (let b = y; b <= v; b += 2) met ||= meets(x, b) || meets(u, b);
        if (met) found.push([wire.id, id]);
    }
    return [app.canvas.renderedPaths.size, found];
}"""


@pytest.fixture(scope="module", params=[OLDER, NODES_2])
def canvas(
    request: pytest.FixtureRequest, server: ComfyServer, pinned_host: bool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple["Page", Path]]:
    """A page of 1600 x 1000 pixels in one renderer, and the folder for screenshots."""
    if request.param == NODES_2 and pinned_host:
        pytest.skip("Nodes 2.0 is young in this frontend; run these tests with --comfyui on a newer ComfyUI")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    folder = Path(os.environ.get("CONTROLNEXT_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots")) / request.param
    folder.mkdir(parents=True, exist_ok=True)
    server.post("/settings/Comfy.TutorialCompleted", True)
    server.post("/settings/Comfy.VueNodes.Enabled", request.param == NODES_2)
    server.post("/settings/LiteGraph.Canvas.MinFontSizeForLOD", 8)  # the page's own
    with sync_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=chromium_path(driver), args=ARGUMENTS)
        page = chromium.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(TIMEOUT)
        page.goto(f"http://{server.address}/")
        page.wait_for_function(READY, timeout=90_000)
        assert page.evaluate("Boolean(LiteGraph.vueNodesMode)") == (request.param == NODES_2)
        yield page, folder
        chromium.close()
    server.post("/settings/Comfy.VueNodes.Enabled", False)


def opened(page: "Page", name: str) -> dict[str, Any]:
    """The graph, opened as a template and drawn; without its list of files, which the page would report first."""
    graph = page_graph(name)
    for node in graph["nodes"]:
        node["properties"].pop("models", None)
    page.evaluate("app.canvas.ds.scale = 0.3")
    page.evaluate(OPEN, graph)
    page.wait_for_function("app.canvas.ds.scale > 0.35")
    page.wait_for_timeout(1500)
    page.keyboard.press("Escape")
    return graph


def meet(one: list[float], other: list[float]) -> bool:
    """True if two boxes (x, y, width, height) share more than a unit."""
    return all(one[i] < other[i] + other[i + 2] - 1 and other[i] < one[i] + one[i + 2] - 1 for i in (0, 1))


def inside(box: list[float], frame: list[float]) -> bool:
    return all(frame[i] - 1 <= box[i] and box[i] + box[i + 2] <= frame[i] + frame[i + 2] + 1 for i in (0, 1))


@pytest.mark.parametrize("name", TITLES)
def test_example_is_readable_and_nothing_covers_another(name: str, canvas: tuple["Page", Path]) -> None:
    page, shots = canvas
    graph = opened(page, name)
    assert page.evaluate("app.canvas.ds.scale") >= SMALLEST and not page.evaluate("app.canvas.low_quality")
    boxes = page.evaluate(BOXES)
    assert len(boxes) == len(graph["nodes"]) and all(box for _, box in boxes)
    types = {str(node["id"]): node["type"] for node in graph["nodes"]}
    shown = [(types[str(number)], box) for number, box in boxes]
    assert [(a, b) for (a, one), (b, other) in itertools.combinations(shown, 2) if meet(one, other)] == []
    frames = [group["bounding"] for group in graph["groups"]]
    assert [kind for kind, box in shown if sum(inside(box, frame) for frame in frames) != 1] == []
    drawn, behind = page.evaluate(BEHIND, boxes)
    assert drawn == len(graph["links"]) + len(graph["extra"].get("reroutes", []))
    assert behind == []
    page.screenshot(path=shots / f"{name}.png")
