"""The real page of the real server in a real browser: find and add the nodes, load the examples, run one, read help.

Elements of the page are found by their roles and test ids, for the frontends 1.32.9 (ComfyUI 0.3.75) and 1.49.6
(ComfyUI 0.33). Reports, warnings and messages are in test_browser_layouts.py. Screenshots go to the folder that
CONTROLNEXT_SCREENSHOTS names, else to pytest's temporary folder; look at them after a change of the graphs. Needs a
Chromium: Debian's package, or `python -m playwright install chromium`.
"""

import base64
import contextlib
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from comfyui_controlnext.tests.fixtures.page_fixtures import ROOT, SEARCH, TIMEOUT, Browser, opened_page, screenshots
from comfyui_controlnext.tests.fixtures.page_graphs import overlapping, picture_of, same_but_for_additions
from comfyui_controlnext.tests.page.test_search_words import WORDS
from comfyui_controlnext.tools import make_locales, make_workflows
from comfyui_controlnext.tools.demo_weights import shipped
from comfyui_controlnext.tools.workflow_graph import split_inputs

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer
    from conftest import TinyModels
    from playwright.sync_api import Page

pytestmark = [pytest.mark.comfy, pytest.mark.browser]

TITLES = {describe.__name__: describe().title for describe in make_workflows.WORKFLOWS}
NAMES = [name for name in TITLES if not name.startswith("demo")]
"""Examples that need published files."""
NAMED_WORDS = ("canny", "pose", "video", "train", "controlnet")
"""Words of WORDS that occur in names of the pack's nodes."""
SETTINGS = {
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
OPEN_SERVED = """async ([address, title]) =>
    app.loadGraphData(await (await fetch(address)).json(), true, true, title, {openSource: 'template'})"""
DROP = """async ([png, name]) => {  // a picture, on an empty canvas
    const bytes = Uint8Array.from(atob(png), letter => letter.charCodeAt(0));
    app.graph.clear();
    await app.handleFile(new File([bytes], name, {type: 'image/png'}));
}"""
SENT = """async () => {
    const {workflow, output} = await app.graphToPrompt();
    return JSON.parse(JSON.stringify([workflow, output]));  // as the page writes it: without what is undefined
}"""
BOXES = """() => Object.fromEntries(app.graph.nodes.map(
    n => [n.id, [n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30]]))"""  # with the title above
CENTER_OF_TITLE = """(type) => {
    const node = app.graph.nodes.find(n => n.type === type), ds = app.canvas.ds;
    return [(node.pos[0] + node.size[0] / 2 + ds.offset[0]) * ds.scale, (node.pos[1] - 15 + ds.offset[1]) * ds.scale];
}"""


def open_example(page: "Page", name: str) -> None:
    """Open one of the pack's graphs from the templates, by its title."""
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    card = dialog.get_by_text(TITLES[name], exact=True).first  # newer pages repeat the title as a description
    pack = dialog.get_by_text(ROOT.name, exact=True)
    card.or_(pack).first.wait_for()
    if card.count() == 0:  # newer pages open on the host's own templates, with the packs in a sidebar
        pack.click()
    card.click()


def open_served(page: "Page", name: str) -> None:
    """Open one of the pack's graphs as the list of templates does, which newer pages are slow to draw."""
    address = f"/api/workflow_templates/{quote(ROOT.name)}/{quote(TITLES[name])}.json"
    page.evaluate(OPEN_SERVED, [address, TITLES[name]])


def sent_again_from_a_picture(page: "Page") -> Any:
    """Graph of the page in the API's format; equal after it opened a picture with the graph inside."""
    workflow, output = page.evaluate(SENT)
    page.evaluate(DROP, [picture_of(workflow, output), "picture.png"])
    page.wait_for_function("(count) => app.graph.nodes.length === count", arg=len(workflow["nodes"]))
    again, sent = page.evaluate(SENT)
    assert sent == output
    for part in ("nodes", "links", "groups"):
        assert again[part] == workflow[part]
    return output


def missing_files(page: "Page") -> str:
    """Text of the dialog (1.32.9) or of the panel of errors (1.49.6) about missing models, which is closed."""
    dialog = page.get_by_role("dialog").filter(has_text="Missing Models")
    overlay = page.get_by_test_id("error-overlay-see-errors")
    dialog.or_(overlay).first.wait_for()
    if dialog.count():
        text = dialog.inner_text()
        page.keyboard.press("Escape")
        dialog.wait_for(state="detached")
        return text
    overlay.click()
    text = page.get_by_test_id("error-group-missing-model").inner_text()
    page.get_by_role("button", name="Toggle properties panel").click()
    return text


def page_graph(name: str) -> dict[str, Any]:
    return json.loads((make_workflows.FOLDER / f"{TITLES[name]}.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def browser(server: "ComfyServer", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Page, loaded once; tests need not clear the canvas."""
    with opened_page(server, screenshots(tmp_path_factory), 1920, SETTINGS) as made:
        yield made


def found_by(page: "Page", words: str) -> Any:
    """Results of the search box for `words`; leaves it open."""
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.get_by_placeholder(SEARCH).fill(words)
    return page.get_by_role("option")


def put_down(page: "Page", place: int) -> None:
    """Click on the canvas until no node follows the pointer, as new ones do on newer pages.

    A search box that is closing receives clicks.
    """
    for _ in range(40):
        page.mouse.click(place, 400)
        if page.evaluate("app.canvas.state?.ghostNodeId == null"):
            return
        page.wait_for_timeout(250)
    raise AssertionError("a new node still follows the pointer")


def test_search_finds_load_first_then_apply_and_drops_them(browser: Browser) -> None:
    page = browser.page
    page.keyboard.press("Escape")
    page.evaluate("app.graph.clear()")
    for place, name in ((400, "Load ControlNeXt"), (1000, "Apply ControlNeXt")):
        page.mouse.move(place, 400)
        found = found_by(page, "ControlNeXt")
        found.filter(has=page.get_by_text(name, exact=True)).first.wait_for()
        first, second = [text for text in found.all_inner_texts() if text.strip()][:2]
        assert first.startswith("Load ControlNeXt") and second.startswith("Apply ControlNeXt"), found.all_inner_texts()
        found.filter(has=page.get_by_text(name, exact=True)).first.click()
        page.wait_for_function("(n) => app.graph.nodes.some(node => node.title === n)", arg=name)
        put_down(page, place)
    assert page.evaluate("app.graph.nodes.map(n => n.type)") == ["ControlNeXtLoader", "ControlNeXtApply"]
    browser.shot("search")


def test_search_finds_a_node_of_ours_by_words_that_people_type(browser: Browser, server: "ComfyServer") -> None:
    """Older ComfyUIs have no words besides the nodes' names. Newer ones show the first 64 nodes."""
    page, nodes = browser.page, make_locales.own_nodes(server.object_info())
    newer = "search_aliases" in nodes["ControlNeXtLoader"]
    wanted = WORDS if newer else NAMED_WORDS
    ours = re.compile("|".join(re.escape(info["display_name"]) for info in nodes.values()))
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    found = page.get_by_role("option").filter(has_text=ours)
    try:
        for word in wanted:
            page.get_by_placeholder(SEARCH).fill("qqxzzxqq")
            found.first.wait_for(state="detached")  # answers to the word before
            page.get_by_placeholder(SEARCH).fill(word)
            found.first.wait_for(timeout=TIMEOUT / 4)
    finally:
        page.keyboard.press("Escape")
        page.get_by_placeholder(SEARCH).wait_for(state="hidden")  # an open box would cover the tests after it


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
    if name == NAMES[0]:
        open_example(browser.page, name)
    else:
        open_served(browser.page, name)
    reported = missing_files(browser.page)
    wanted = [entry for node in graph["nodes"] for entry in node["properties"].get("models", [])]
    assert wanted
    for entry in wanted:  # newer pages show no folder where they know no address
        assert entry["name"] in reported
        assert f"{entry['directory']} / {entry['name']}" in reported or not pinned_host
    assert "not allowed" not in reported and "Invalid directory" not in reported
    assert browser.page.evaluate("app.graph.nodes.every(n => n.type in LiteGraph.registered_node_types)")
    sent = sent_again_from_a_picture(browser.page)
    assert missing_files(browser.page) == reported
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
    open_example(browser.page, "demo")
    page = browser.page
    page.wait_for_function("app.graph.nodes.some(n => n.title === 'Sample hint')")
    workflow, sent = page.evaluate(SENT)
    kept = json.loads((make_workflows.FOLDER / "api" / "demo.json").read_text("utf-8"))
    assert sent == kept if pinned_host else same_but_for_additions(sent, kept)
    page.get_by_test_id("queue-button").click()
    shown = "(type) => app.graph.nodes.find(n => n.type === type).imgs?.[0]?.naturalWidth"
    for kind in ("SaveImage", "ControlNeXtSampleInputs"):
        assert page.wait_for_function(shown, arg=kind, timeout=180_000).json_value() == 192
    assert page.get_by_text("Missing Models").count() == 0
    address = page.evaluate("app.graph.nodes.find(n => n.type === 'SaveImage').imgs[0].src")
    saved = base64.b64encode(page.request.get(address.replace("preview=", "kept=")).body()).decode()
    page.evaluate(DROP, [saved, "demo.png"])
    page.wait_for_function("(count) => app.graph.nodes.length === count", arg=len(workflow["nodes"]))
    again, output = page.evaluate(SENT)
    assert output == sent and again["links"] == workflow["links"] and again["groups"] == workflow["groups"]
    values = [[node.get("widgets_values") for node in shown["nodes"]] for shown in (again, workflow)]
    assert values[0] == values[1]  # newer pages write none for a node without widgets
    browser.shot("demo", clip=page.evaluate(SHOW_ALL))


def test_the_training_demo_trains_from_its_template(browser: Browser, server: "ComfyServer") -> None:
    """Training of two steps on eight scenes, without validation."""
    shipped.install(server.base)
    graph = page_graph("demo_train")
    (trainer,) = (node for node in graph["nodes"] if node["type"] == "ControlNeXtTrain")
    (data,) = (node for node in graph["nodes"] if node["type"] == "ControlDatasetFolder")
    data["widgets_values"][0] = data["widgets_values"][0].replace(":60:", ":8:")
    shorter = json.dumps(trainer["widgets_values"]).replace("validate_every = 30", "validate_every = 0")
    trainer["widgets_values"] = [2 if value == 60 else value for value in json.loads(shorter)]
    assert trainer["widgets_values"].count(2) == 1 and "validate_every = 0" in shorter
    page = browser.page
    page.evaluate("(graph) => app.loadGraphData(graph)", graph)
    page.get_by_test_id("queue-button").click()
    shown = "(type) => app.graph.nodes.find(n => n.type === type).imgs?.[0]?.naturalWidth"
    assert page.wait_for_function(shown, arg="SaveImage", timeout=600_000).json_value() == 128
    for kind in ("ControlDatasetFolder", "ControlNeXtTrain"):
        assert page.evaluate(shown, kind) > 200
    browser.shot("demo_train", clip=page.evaluate(SHOW_ALL))


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
    assert browser.of_ours() == []
