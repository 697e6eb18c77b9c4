"""The real page of the real server in a real browser: find and add the nodes, load the examples, run one, read help.

Screenshots go to the folder that CONTROLNEXT_SCREENSHOTS names, else to pytest's temporary folder; look at them
after a change of the graphs. Needs a Chromium: Debian's package, or `python -m playwright install chromium`.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from comfyui_controlnext.tools import make_locales, make_workflows
from comfyui_controlnext.tools.workflow_graph import split_inputs

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer
    from conftest import TinyModels
    from playwright.sync_api import Page

pytestmark = [pytest.mark.comfy, pytest.mark.browser]

ROOT = Path(__file__).resolve().parents[1]
NAMES = [describe.__name__ for describe in make_workflows.WORKFLOWS]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
READY = """() => Boolean(window.app?.vueAppReady && window.app.graph?.nodes.length  // the default graph is there
    && LiteGraph.registered_node_types.ControlNeXtLoader)"""
TIMEOUT = 20_000  # ms, for one step on a busy machine
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # else a new user is shown the templates first
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}
SHOW_ALL = """() => {  // fit groups and nodes into what the menus leave free; return that part of the window
    const boxes = [...app.graph.nodes.map(n => [n.pos[0], n.pos[1] - 30, ...n.size]),
                   ...app.graph.groups.map(g => [...g._bounding])];
    const low = i => Math.min(...boxes.map(b => b[i])), high = i => Math.max(...boxes.map(b => b[i] + b[i + 2]));
    const area = {x: 80, y: 130, width: innerWidth - 100, height: innerHeight - 220};
    const scale = Math.min(area.width / (high(0) - low(0)), area.height / (high(1) - low(1)));
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [area.x / scale - low(0), area.y / scale - low(1)];
    app.canvas.setDirty(true, true);
    return {x: area.x, y: area.y, width: scale * (high(0) - low(0)), height: scale * (high(1) - low(1))};
}"""
CENTER_OF_TITLE = """(type) => {
    const node = app.graph.nodes.find(n => n.type === type), ds = app.canvas.ds;
    return [(node.pos[0] + node.size[0] / 2 + ds.offset[0]) * ds.scale, (node.pos[1] - 15 + ds.offset[1]) * ds.scale];
}"""


@dataclass
class Browser:
    """A page of the host, and what went wrong on it."""

    page: "Page"
    shots: Path
    wrong: list[str] = field(default_factory=list)

    def hear(self, kind: str, text: str) -> None:
        """Remember an error on the page's console."""
        if kind == "error":
            self.wrong.append(text)

    def open_example(self, name: str) -> str:
        """Choose one of our graphs among the templates; return what the page reports about missing files."""
        self.page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        self.page.get_by_role("dialog").get_by_text(name, exact=True).click()
        report = self.page.get_by_role("dialog").filter(has_text="Missing Models")
        report.wait_for()
        text = report.inner_text()
        self.page.keyboard.press("Escape")
        report.wait_for(state="detached")
        return text

    def shot(self, name: str, clip: Any = None) -> None:
        self.page.wait_for_timeout(300)
        self.page.screenshot(path=self.shots / f"{name}.png", clip=clip)


def chromium_path(driver: Any) -> str:
    """A Chromium of this machine. Skips where there is none."""
    own = Path(driver.chromium.executable_path)
    found = next(filter(None, map(shutil.which, BROWSERS)), None) or (str(own) if own.is_file() else None)
    if found is None:
        pytest.skip("no Chromium here: install Debian's `chromium`, or run `python -m playwright install chromium`")
    return found


def of_ours(text: str) -> bool:
    """Whether a message is about this pack; the page's own questions to hosts elsewhere (https) are not."""
    return "https://" not in text and ("controlnext" in text.lower() or f"/{quote(ROOT.name)}/" in text)


@pytest.fixture(scope="module")
def browser(server: "ComfyServer", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The page, loaded once; every test leaves what it likes on the canvas."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    shots = Path(os.environ.get("CONTROLNEXT_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    for name, value in SETTINGS.items():
        server.post(f"/settings/{name}", value)
    with sync_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=chromium_path(driver), args=ARGUMENTS)
        page = chromium.new_page(viewport={"width": 1920, "height": 1000})
        made = Browser(page, shots)
        page.set_default_timeout(TIMEOUT)
        page.on("pageerror", lambda error: made.wrong.append(f"{error} {error.stack}"))
        page.on(
            "console", lambda line: made.wrong.append(f"{line.text} {line.location}") if line.type == "error" else 0
        )
        page.goto(f"http://{server.address}/")
        page.wait_for_function(READY, timeout=90_000)
        yield made
        chromium.close()


def test_search_finds_the_nodes_and_drops_them(browser: Browser) -> None:
    page = browser.page
    page.evaluate("app.graph.clear()")
    for place, name in ((400, "Load ControlNeXt"), (1000, "Apply ControlNeXt")):
        page.mouse.move(place, 400)
        page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
        page.get_by_placeholder("Search Nodes...").fill("ControlNeXt")
        page.get_by_role("option").filter(has_text=re.compile(rf"^{name}\s")).first.click()
        page.wait_for_function("(n) => app.graph.nodes.some(node => node.title === n)", arg=name)
    assert page.evaluate("app.graph.nodes.map(n => n.type)") == ["ControlNeXtLoader", "ControlNeXtApply"]
    browser.shot("search")


def test_every_node_shows_its_widgets_and_slots(browser: Browser, server: "ComfyServer") -> None:
    made = """(types) => { app.graph.clear(); return Object.fromEntries(types.map(type => {
        const node = LiteGraph.createNode(type); app.graph.add(node);
        return [type, {title: node.title, widgets: (node.widgets ?? []).map(w => w.name),
            sockets: node.inputs.filter(i => !i.widget).map(i => i.name), outputs: node.outputs.map(o => o.name)}];
    })) }"""
    nodes = make_locales.own_nodes(server.object_info())
    shown = browser.page.evaluate(made, list(nodes))
    for name, info in nodes.items():
        sockets, widgets = split_inputs(info)
        assert shown[name] == {
            "title": info["display_name"],
            "widgets": list(widgets),
            "sockets": list(sockets),
            "outputs": info["output_name"],
        }


@pytest.mark.parametrize("name", NAMES)
def test_example_loads_whole_and_reports_missing_files(name: str, browser: Browser) -> None:
    graph = json.loads((make_workflows.FOLDER / f"{name}.json").read_text("utf-8"))
    reported = browser.open_example(name)
    wanted = [*graph["models"], *(entry for node in graph["nodes"] for entry in node["properties"].get("models", []))]
    assert wanted and all(f"{entry['directory']} / {entry['name']}" in reported for entry in wanted)
    assert "not allowed" not in reported and "Invalid directory" not in reported
    assert browser.page.evaluate("app.graph.nodes.every(n => n.type in LiteGraph.registered_node_types)")
    sent = browser.page.evaluate("async () => (await app.graphToPrompt()).output")
    assert sent == json.loads((make_workflows.FOLDER / "api" / f"{name}.json").read_text("utf-8"))
    resized = {
        node["id"]: browser.page.evaluate("(id) => [...app.graph.getNodeById(id).size]", node["id"])
        for node in graph["nodes"]
    }
    assert resized == {node["id"]: node["size"] for node in graph["nodes"]}, (
        "the page needs other sizes: they may overlap"
    )
    browser.shot(name, clip=browser.page.evaluate(SHOW_ALL))


def test_a_run_from_the_page_shows_the_image(browser: Browser, server: "ComfyServer", tiny: "TinyModels") -> None:
    server.upload_image(ROOT / "demo" / "astronaut.jpg")
    graph = json.loads((make_workflows.FOLDER / "sd15_canny.json").read_text("utf-8"))
    for node in graph["nodes"]:
        values = node["widgets_values"]
        if node["type"] == "CheckpointLoaderSimple":
            node["properties"], values[0] = {}, tiny.names["checkpoint"]
        elif node["type"] == "ControlNeXtLoader":
            values[0] = tiny.names["control"]
        elif node["type"] == "LoadImage":
            values[0] = "astronaut.jpg"
        elif node["type"] == "EmptyLatentImage":
            values[:2] = 128, 128
        elif node["type"] == "KSampler":
            values[2] = 2
    browser.page.evaluate("(graph) => app.loadGraphData(graph)", graph)
    browser.page.get_by_test_id("queue-button").click()
    shown = "() => app.graph.nodes.find(n => n.type === 'SaveImage').imgs?.[0]?.naturalWidth"
    assert browser.page.wait_for_function(shown, timeout=60_000).json_value() == 128
    report = "() => app.graph.nodes.find(n => n.type === 'ControlNeXtLoader').widgets.map(w => String(w.value)).join()"
    assert "UNet weights" in browser.page.evaluate(report), "what was loaded is shown on the node"
    browser.shot("run", clip=browser.page.evaluate(SHOW_ALL))


def test_help_of_a_node_opens(browser: Browser) -> None:
    page = browser.page
    page.evaluate("""() => { app.graph.clear(); const node = LiteGraph.createNode("ControlNeXtLoader");
        node.pos = [700, 300]; app.graph.add(node); app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 0]; }""")
    page.wait_for_timeout(300)
    page.mouse.click(*page.evaluate(CENTER_OF_TITLE, "ControlNeXtLoader"))
    page.get_by_test_id("info-button").click()
    page.get_by_role("heading", name="Common errors").wait_for()
    browser.shot("help")


def test_nothing_of_ours_went_wrong_on_the_page(browser: Browser) -> None:
    asked_first = f"/extensions/{quote(ROOT.name)}/docs/ControlNeXtLoader/en.md"  # the page's first of two places
    assert [text for text in browser.wrong if of_ours(text) and asked_first not in text] == []
