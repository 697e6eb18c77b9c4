"""The real page of the real server in a real browser: find and add the nodes, load the examples, run one, read help.

Elements of the page are found by their roles and test ids, for the frontends 1.32.9 (ComfyUI 0.3.75) and 1.49.6
(ComfyUI 0.33). Screenshots go to the folder that CONTROLNEXT_SCREENSHOTS names, else to pytest's temporary folder;
look at them after a change of the graphs. Needs a Chromium: Debian's package, or `python -m playwright install
chromium`.
"""

import contextlib
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
from comfyui_controlnext.tests import page_graphs
from comfyui_controlnext.tests.page_graphs import overlapping, same_but_for_additions
from comfyui_controlnext.tools import make_locales, make_workflows
from comfyui_controlnext.tools.demo_weights import shipped
from comfyui_controlnext.tools.workflow_graph import split_inputs

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer
    from conftest import TinyModels
    from playwright.sync_api import Page

pytestmark = [pytest.mark.comfy, pytest.mark.browser]

ROOT = Path(__file__).resolve().parents[1]
TITLES = {describe.__name__: describe().title for describe in make_workflows.WORKFLOWS}
NAMES = [name for name in TITLES if not name.startswith("demo")]
"""Examples that want published files."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
READY = """() => Boolean(window.app?.vueAppReady && window.app.graph?.nodes.length  // the default graph is there
    && LiteGraph.registered_node_types.ControlNeXtLoader)"""
TIMEOUT = 60_000  # ms, for one step on a busy machine; newer pages draw hundreds of templates in software
SEARCH = re.compile(r"^(Search Nodes|Add a node)\.\.\.$")  # placeholders of the search box: 1.32.9, 1.49.6
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
BOXES = """() => Object.fromEntries(app.graph.nodes.map(
    n => [n.id, [n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30]]))"""  # with the title above
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

    def open_example(self, name: str) -> None:
        """Choose one of our graphs among the templates, by its title."""
        self.page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        dialog = self.page.get_by_role("dialog")
        card = dialog.get_by_text(TITLES[name], exact=True).first  # newer pages repeat the title as a description
        pack = dialog.get_by_text(ROOT.name, exact=True)
        card.or_(pack).first.wait_for()
        if card.count() == 0:  # newer pages open on the host's own templates, with the packs in a sidebar
            pack.click()
        card.click()

    def missing_files(self) -> str:
        """Text of the dialog (1.32.9) or of the panel of errors (1.49.6) about missing models, which is closed."""
        dialog = self.page.get_by_role("dialog").filter(has_text="Missing Models")
        overlay = self.page.get_by_test_id("error-overlay-see-errors")
        dialog.or_(overlay).first.wait_for()
        if dialog.count():
            text = dialog.inner_text()
            self.page.keyboard.press("Escape")
            dialog.wait_for(state="detached")
            return text
        overlay.click()
        text = self.page.get_by_test_id("error-group-missing-model").inner_text()
        self.page.get_by_role("button", name="Toggle properties panel").click()
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


def page_graph(name: str) -> dict[str, Any]:
    return json.loads((make_workflows.FOLDER / f"{TITLES[name]}.json").read_text("utf-8"))


def of_ours(text: str) -> bool:
    """True means that a message is about this pack; the page's own questions to hosts elsewhere (https) are not."""
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
        page.get_by_placeholder(SEARCH).fill("ControlNeXt")
        page.get_by_role("option").filter(has=page.get_by_text(name, exact=True)).first.click()
        page.wait_for_function("(n) => app.graph.nodes.some(node => node.title === n)", arg=name)
        page.mouse.click(place, 400)  # newer pages let the node follow the pointer until then
    assert page.evaluate("app.graph.nodes.map(n => n.type)") == ["ControlNeXtLoader", "ControlNeXtApply"]
    browser.shot("search")


@pytest.mark.parametrize(
    ("word", "name"),
    [("canny", "ControlNeXt Canny Hint"), ("svd", "Load ControlNeXt UNet"), ("train", "Train Control")],
)
def test_search_finds_nodes_by_other_words(word: str, name: str, browser: Browser, server: "ComfyServer") -> None:
    if "search_aliases" not in server.object_info()["ControlNeXtLoader"]:
        pytest.skip("this ComfyUI searches names alone")
    page = browser.page
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.get_by_placeholder(SEARCH).fill(word)
    page.get_by_role("option").filter(has=page.get_by_text(name, exact=True)).first.wait_for()
    page.keyboard.press("Escape")


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
def test_example_loads_whole_and_reports_missing_files(name: str, browser: Browser, pinned_host: bool) -> None:
    graph = page_graph(name)
    browser.open_example(name)
    reported = browser.missing_files()
    wanted = [entry for node in graph["nodes"] for entry in node["properties"].get("models", [])]
    assert wanted
    for entry in wanted:  # newer pages show no folder where they know no address
        assert entry["name"] in reported
        assert f"{entry['directory']} / {entry['name']}" in reported or not pinned_host
    assert "not allowed" not in reported and "Invalid directory" not in reported
    assert browser.page.evaluate("app.graph.nodes.every(n => n.type in LiteGraph.registered_node_types)")
    sent = browser.page.evaluate("async () => (await app.graphToPrompt()).output")
    kept = json.loads((make_workflows.FOLDER / "api" / f"{name}.json").read_text("utf-8"))
    assert sent == kept if pinned_host else same_but_for_additions(sent, kept)
    boxes = browser.page.evaluate(BOXES)
    assert not overlapping({node["id"]: boxes[str(node["id"])] for node in graph["nodes"]})
    if pinned_host:
        assert all(boxes[str(node["id"])][2:] == [node["size"][0], node["size"][1] + 30] for node in graph["nodes"])
    browser.shot(name, clip=browser.page.evaluate(SHOW_ALL))


def test_a_run_from_the_page_shows_the_image(browser: Browser, server: "ComfyServer", tiny: "TinyModels") -> None:
    graph = page_graph("sd15_canny")
    for node in graph["nodes"]:
        values = node["widgets_values"]
        if node["type"] == "CheckpointLoaderSimple":
            node["properties"], values[0] = {}, tiny.names["checkpoint"]
        elif node["type"] == "ControlNeXtLoader":
            values[0], values[2] = tiny.names["control"], 0.999  # else the host keeps what another test loaded
        elif node["type"] == "EmptyLatentImage":
            values[:2] = 128, 128
        elif node["type"] == "KSampler":
            values[2] = 2
    browser.page.evaluate("(graph) => app.loadGraphData(graph)", graph)
    browser.page.get_by_test_id("queue-button").click()
    shown = "() => app.graph.nodes.find(n => n.type === 'SaveImage').imgs?.[0]?.naturalWidth"
    assert browser.page.wait_for_function(shown, timeout=60_000).json_value() == 128
    report = "app.graph.nodes.find(n => n.type === 'ControlNeXtLoader').widgets.map(w => String(w.value)).join()"
    told = browser.page.wait_for_function(f"() => {report}.includes('UNet weights')", timeout=30_000)
    assert told.json_value() is True, "what was loaded is shown on the node"
    browser.shot("run", clip=browser.page.evaluate(SHOW_ALL))


def test_the_demo_runs_from_its_template_as_it_is(browser: Browser, server: "ComfyServer", pinned_host: bool) -> None:
    shipped.install(server.base)
    browser.page.evaluate("app.extensionManager.command.execute('Comfy.RefreshNodeDefinitions')")
    browser.open_example("demo")
    page = browser.page
    page.wait_for_function("app.graph.nodes.some(n => n.title === 'Sample hint')")
    sent = page.evaluate("async () => (await app.graphToPrompt()).output")
    kept = json.loads((make_workflows.FOLDER / "api" / "demo.json").read_text("utf-8"))
    assert sent == kept if pinned_host else same_but_for_additions(sent, kept)
    page.get_by_test_id("queue-button").click()
    shown = "(type) => app.graph.nodes.find(n => n.type === type).imgs?.[0]?.naturalWidth"
    for kind in ("SaveImage", "ControlNeXtSampleInputs"):
        assert page.wait_for_function(shown, arg=kind, timeout=180_000).json_value() == 192
    assert page.get_by_text("Missing Models").count() == 0
    browser.shot("demo", clip=page.evaluate(SHOW_ALL))


def test_the_training_demo_trains_from_its_template(browser: Browser, server: "ComfyServer") -> None:
    """Two of its steps on eight scenes, without validation."""
    shipped.install(server.base)
    graph = page_graph("demo_train")
    (trainer,) = (node for node in graph["nodes"] if node["type"] == "ControlNeXtTrain")
    (data,) = (node for node in graph["nodes"] if node["type"] == "ControlDatasetFolder")
    data["widgets_values"][0] = data["widgets_values"][0].replace(":200:", ":8:")
    shorter = json.dumps(trainer["widgets_values"]).replace("validate_every = 40", "validate_every = 0")
    trainer["widgets_values"] = [2 if value == 80 else value for value in json.loads(shorter)]
    assert trainer["widgets_values"].count(2) == 1 and "validate_every = 0" in shorter
    page = browser.page
    page.evaluate("(graph) => app.loadGraphData(graph)", graph)
    page.get_by_test_id("queue-button").click()
    shown = "(type) => app.graph.nodes.find(n => n.type === type).imgs?.[0]?.naturalWidth"
    assert page.wait_for_function(shown, arg="SaveImage", timeout=600_000).json_value() == 64
    for kind in ("ControlDatasetFolder", "ControlNeXtTrain"):
        assert page.evaluate(shown, kind) > 200
    browser.shot("demo_train", clip=page.evaluate(SHOW_ALL))


REPORTS = """() => Object.fromEntries(app.graph.nodes.filter(n => n.properties.controlnext_report)
    .map(n => [n.title, n.properties.controlnext_report]))"""


def reports(page: "Page", enough: int) -> dict[str, str]:
    """{title: report} of nodes, once there are `enough`; each is drawn too."""
    page.wait_for_function(f"() => Object.keys(({REPORTS})()).length >= {enough}", timeout=120_000)
    shown = page.evaluate(REPORTS)
    drawn = page.evaluate("[...document.querySelectorAll('div.controlnext_report')].map(each => each.innerText)")
    assert set(shown.values()) <= set(drawn)
    return shown


def test_warnings_and_reports_are_on_the_nodes_and_stay(
    browser: Browser, server: "ComfyServer", tiny: "TinyModels"
) -> None:
    """Seen after a run, and again when the saved graph is opened."""
    page = browser.page
    page_graphs.write_files(server.base / "models")
    page.evaluate("app.extensionManager.command.execute('Comfy.RefreshNodeDefinitions')")
    page.evaluate("(graph) => app.loadApiJson(graph, 'warnings')", page_graphs.warning_graph(tiny))
    page.get_by_test_id("queue-button").click()
    shown = reports(page, len(page_graphs.WARNINGS))
    for title, words in page_graphs.WARNINGS.items():
        assert shown[title].startswith("Warning: ") and words in shown[title]
    assert "controlnet.safetensors: ControlNeXt" in shown["full"] and "\nUNet weights: " in shown["full"]
    browser.shot("warnings", clip=page.evaluate(SHOW_ALL))
    saved = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize()))")
    page.evaluate("(graph) => app.loadGraphData(graph)", saved)
    assert reports(page, len(shown)) == shown


@pytest.mark.parametrize("what", page_graphs.REFUSED)
def test_the_page_says_what_is_wrong(what: str, browser: Browser, server: "ComfyServer", tiny: "TinyModels") -> None:
    page = browser.page
    page_graphs.write_files(server.base / "models")
    page.evaluate("(graph) => app.loadApiJson(graph, 'refused')", page_graphs.refused_graph(tiny, what))
    page.get_by_test_id("queue-button").click()
    overlay = page.get_by_test_id("error-overlay-see-errors")
    said = page.get_by_text(page_graphs.REFUSED[what][2])
    said.or_(overlay).first.wait_for()
    if said.count() == 0:
        overlay.click()
        said.first.wait_for()
    assert str(server.base) not in said.first.inner_text()
    browser.shot(what)
    page.keyboard.press("Escape")


def test_help_of_a_node_opens(browser: Browser) -> None:
    from playwright import sync_api

    page = browser.page
    page.evaluate("""() => { app.graph.clear(); const node = LiteGraph.createNode("ControlNeXtLoader");
        node.pos = [700, 300]; app.graph.add(node); app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 0]; }""")
    info = page.get_by_test_id("info-button")
    for _ in range(5):  # a busy page takes a click on a node that it has not drawn yet for one on the canvas
        page.wait_for_timeout(1000)
        page.mouse.click(*page.evaluate(CENTER_OF_TITLE, "ControlNeXtLoader"))
        with contextlib.suppress(sync_api.TimeoutError):
            info.wait_for(timeout=5000)
            break
    info.click()
    page.get_by_role("heading", name="Common errors").wait_for()
    browser.shot("help")


def test_nothing_of_ours_went_wrong_on_the_page(browser: Browser) -> None:
    asked_first = f"/extensions/{quote(ROOT.name)}/docs/ControlNeXtLoader/en.md"  # the page's first of two places
    assert [text for text in browser.wrong if of_ours(text) and asked_first not in text] == []
