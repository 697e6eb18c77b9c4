"""Example graphs as the real page draws them, in the older renderer and in Nodes 2.0: readable, nothing covered.

Screenshots go to the folder that CONTROLNEXT_SCREENSHOTS names; look at them one by one after a change of the graphs.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from comfyui_controlnext.tests.fixtures import page_graphs
from comfyui_controlnext.tests.fixtures.page_fixtures import DRAWN, Browser, opened_page, screenshots
from comfyui_controlnext.tests.page.test_browser import TITLES, page_graph
from comfyui_controlnext.tools.comfy_server import ComfyServer

if TYPE_CHECKING:
    from conftest import TinyModels
    from playwright.sync_api import Page

pytestmark = [pytest.mark.comfy, pytest.mark.browser]

OLDER, NODES_2 = "older", "Nodes 2.0"
SMALLEST = 0.61
"""Scale of the page when it has fitted a graph. It draws no text of nodes below 8 / 14."""
RUN = "app.extensionManager.command.execute('Comfy.QueuePrompt')"
"""Command of the button Run, which messages of older pages cover."""
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
) -> Iterator[Browser]:
    """Page of 1600 x 1000 pixels in one renderer."""
    new = request.param == NODES_2
    if new and pinned_host:
        pytest.skip("Nodes 2.0 is young in this frontend; run these tests with --comfyui on a newer ComfyUI")
    folder = screenshots(tmp_path_factory) / request.param
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"Comfy.VueNodes.Enabled": new, "LiteGraph.Canvas.MinFontSizeForLOD": 8}  # the page's own
    with opened_page(server, folder, 1600, settings) as made:
        assert made.page.evaluate("Boolean(LiteGraph.vueNodesMode)") == new
        yield made
    server.post("/settings/Comfy.VueNodes.Enabled", False)


def opened(page: "Page", name: str) -> dict[str, Any]:
    """Open the graph as a template and wait until it is drawn; without its list of files, which the page would report
    first.
    """
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
    """True: two boxes (x, y, width, height) overlap by more than a unit. False: they do not."""
    return all(one[i] < other[i] + other[i + 2] - 1 and other[i] < one[i] + one[i + 2] - 1 for i in (0, 1))


def inside(box: list[float], frame: list[float]) -> bool:
    return all(frame[i] - 1 <= box[i] and box[i] + box[i + 2] <= frame[i] + frame[i + 2] + 1 for i in (0, 1))


@pytest.mark.parametrize("name", TITLES)
def test_example_is_readable_and_nothing_covers_another(name: str, canvas: Browser) -> None:
    page = canvas.page
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
    canvas.shot(name)


@dataclass
class Warned:
    """Page on which the graph of warnings ran. shown: {title: report}; saved: the graph with its reports."""

    canvas: Browser
    address: str
    shown: dict[str, str]
    saved: dict[str, Any]

    def opened(self) -> "Page":
        self.canvas.page.evaluate("(graph) => app.loadGraphData(graph)", self.saved)
        return self.canvas.page


@pytest.fixture(scope="module")
def warned(canvas: Browser, server: ComfyServer, tiny: "TinyModels") -> Warned:
    page = canvas.page
    page_graphs.write_files(server.base / "models")
    page.evaluate("app.extensionManager.command.execute('Comfy.RefreshNodeDefinitions')")
    page.evaluate("(graph) => app.loadApiJson(graph, 'warnings')", page_graphs.warning_graph(tiny))
    run_to_the_end(page)
    shown = canvas.reports(len(page_graphs.WARNINGS))
    return Warned(canvas, server.address, shown, page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize()))"))


def run_to_the_end(page: "Page") -> None:
    page.evaluate("""() => { window.ended = false;
        app.api.addEventListener('execution_success', () => { window.ended = true; }, {once: true}); }""")
    page.evaluate(RUN)
    page.wait_for_function("window.ended", timeout=120_000)


def set_strength(page: "Page", value: float) -> None:
    """Set weights_strength of the node "full" as the page does."""
    page.evaluate(
        """(value) => { const node = app.graph.nodes.find(n => n.title === 'full');
        const widget = node.widgets.find(w => w.name === 'weights_strength');
        widget.value = value; widget.callback(value, app.canvas, node); }""",
        value,
    )


def test_each_warning_is_on_its_node(warned: Warned) -> None:
    for title, words in page_graphs.WARNINGS.items():
        assert warned.shown[title].startswith("Warning: ") and words in warned.shown[title]
    first, *others = warned.shown["full"].splitlines()[1:]
    assert first.startswith("controlnet.safetensors: ControlNeXt") and others[0].startswith("UNet weights: ")
    warned.canvas.page.evaluate("app.canvas.ds.scale = 1")
    warned.canvas.shot("warnings")


def test_reports_stay_with_the_saved_graph_and_with_outputs_from_the_cache(warned: Warned) -> None:
    page = warned.opened()
    assert warned.canvas.reports(len(warned.shown)) == warned.shown
    run_to_the_end(page)
    assert warned.canvas.reports(len(warned.shown)) == warned.shown


def test_reports_are_there_after_a_reload_of_the_page(warned: Warned) -> None:
    """The page restores its graph; the host takes all nodes from its cache."""
    page = warned.opened()
    set_strength(page, 0.5)
    run_to_the_end(page)
    shown = warned.canvas.reports(len(warned.shown))
    assert "strength 0.5" in shown["full"]
    page.wait_for_timeout(1000)  # newer pages keep their copy of the graph half a second after a change
    warned.canvas.load(warned.address)
    assert warned.canvas.reports(len(shown)) == shown
    run_to_the_end(page)
    assert warned.canvas.reports(len(shown)) == shown


def test_a_report_from_before_a_change_says_so_until_the_next_run(warned: Warned) -> None:
    page, report = warned.opened(), warned.shown["full"]
    old = f"From a run before the last change:\n{report}"
    set_strength(page, 0.75)
    page.wait_for_function(f"(text) => {DRAWN}.includes(text)", arg=old)
    page.evaluate("app.loadGraphData(JSON.parse(JSON.stringify(app.graph.serialize())))")
    page.wait_for_function(f"(text) => {DRAWN}.includes(text)", arg=old)
    warned.canvas.shot("earlier run")
    set_strength(page, 1.0)
    page.wait_for_function(f"(text) => {DRAWN}.includes(text)", arg=report)
    set_strength(page, 0.75)
    run_to_the_end(page)
    assert warned.canvas.reports(len(warned.shown))["full"] == f"{report.removesuffix('1')}0.75"


def test_a_report_says_so_when_a_wire_of_its_node_changes(warned: Warned) -> None:
    page = warned.opened()
    page.evaluate("app.graph.nodes.find(n => n.title === 'past').disconnectInput(0)")
    page.wait_for_function(
        f"(text) => {DRAWN}.includes(text)", arg=f"From a run before the last change:\n{warned.shown['past']}"
    )


def test_inspect_and_dataset_report_on_their_nodes(canvas: Browser, server: ComfyServer) -> None:
    page = canvas.page
    page_graphs.write_reported(server.base)
    page.evaluate("app.extensionManager.command.execute('Comfy.RefreshNodeDefinitions')")
    page.evaluate("(graph) => app.loadApiJson(graph, 'reports')", page_graphs.report_graph())
    run_to_the_end(page)
    shown = canvas.reports(len(page_graphs.REPORTED))
    for title, wanted in page_graphs.REPORTED.items():
        lines = iter(shown[title].splitlines())
        assert [words for words in wanted if not any(words in line for line in lines)] == [], shown[title]
        assert str(server.base) not in shown[title]
    assert page.get_by_role("dialog").count() == 0
    page.evaluate("app.canvas.ds.scale = 1")
    canvas.shot("reports")


def shown_error(page: "Page", words: str) -> str:
    """Text with `words`, from the dialog (1.32.9) or the panel of errors (1.49.6) with its folded parts."""
    overlay, said = page.get_by_test_id("error-overlay-see-errors"), page.get_by_text(words)
    more = page.get_by_role("button", name=re.compile("^Info for "))
    said.or_(overlay).first.wait_for()
    if said.count() == 0:
        overlay.click()
        said.or_(more).first.wait_for()
    if said.count() == 0:
        more.first.click()
    said.first.wait_for()
    return said.first.inner_text()


@pytest.mark.parametrize("what", page_graphs.REFUSED)
def test_the_page_says_what_is_wrong(what: str, canvas: Browser, server: ComfyServer, tiny: "TinyModels") -> None:
    page = canvas.page
    page_graphs.write_files(server.base / "models")
    page.evaluate("(graph) => app.loadApiJson(graph, 'refused')", page_graphs.refused_graph(tiny, what))
    page.evaluate(RUN)
    said = shown_error(page, page_graphs.REFUSED[what][2])
    assert str(server.base) not in next(line for line in said.splitlines() if page_graphs.REFUSED[what][2] in line)
    canvas.shot(what)
    page.keyboard.press("Escape")


def test_nothing_of_ours_went_wrong_on_either_page(canvas: Browser) -> None:
    assert canvas.of_ours() == []
