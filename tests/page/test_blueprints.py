"""Blueprints in subgraphs/: the real page lists them, adds them as nodes, and they run."""

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from comfyui_controlnext.tests.fixtures.page_fixtures import SEARCH, opened_page, screenshots
from comfyui_controlnext.tools import make_workflows
from comfyui_controlnext.tools.comfy_server import ComfyServer
from comfyui_controlnext.tools.workflow_blueprints import Blueprint
from comfyui_controlnext.tools.workflow_graph import split_inputs

if TYPE_CHECKING:
    from conftest import TinyModels
    from playwright.sync_api import Page

BLUEPRINTS = [describe() for describe in make_workflows.BLUEPRINTS]
AROUND = """([title, names]) => {  // a graph around the node that was added
    const node = app.graph.nodes.find(n => n.title === title), graph = app.graph;
    const add = (type, values) => {
        const made = LiteGraph.createNode(type);
        graph.add(made);
        for (const [name, value] of Object.entries(values)) made.widgets.find(w => w.name === name).value = value;
        return made;
    };
    const base = add("CheckpointLoaderSimple", {ckpt_name: names.checkpoint});
    const photo = add("ControlNeXtSampleInputs", {kind: "photo", width: 64, height: 64});
    const text = add("CLIPTextEncode", {text: "a"}), latent = add("EmptyLatentImage", {width: 64, height: 64});
    const sampler = add("KSampler", {steps: 1, seed: 1}), picture = add("VAEDecode", {}), saved = add("SaveImage", {});
    node.widgets.find(w => w.name === "control_name").value = names.control;
    node.widgets.find(w => w.name === "strength").value = names.strength;
    base.connect(0, node, 0); photo.connect(0, node, 1); base.connect(1, text, 0);
    node.connect(0, sampler, 0); text.connect(0, sampler, 1); text.connect(0, sampler, 2);
    latent.connect(0, sampler, 3);
    sampler.connect(0, picture, 0); base.connect(2, picture, 1); picture.connect(0, saved, 0);
}"""


@pytest.fixture(scope="module")
def page(server: ComfyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Page"]:
    with opened_page(server, screenshots(tmp_path_factory), 1600) as made:
        yield made.page


def add_by_search(page: "Page", title: str) -> None:
    """Empty the canvas and add the node of this title."""
    from playwright import sync_api

    page.evaluate("app.graph.clear()")
    page.keyboard.press("Escape")  # a dialog of the node before
    page.mouse.move(800, 500)
    found = page.get_by_role("option").filter(has_text=title.partition("(")[2]).first
    for _ in range(8):  # the page reads blueprints after it says that it is ready
        page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
        page.get_by_placeholder(SEARCH).fill("Control from a picture")
        with contextlib.suppress(sync_api.TimeoutError):
            found.wait_for(timeout=5000)
            break
        page.keyboard.press("Escape")
        page.wait_for_timeout(1000)
    found.click()
    page.wait_for_function("(title) => app.graph.nodes.some(n => n.title === title)", arg=title)
    page.mouse.click(800, 500)  # newer pages let the node follow the pointer until then


@pytest.mark.comfy
@pytest.mark.browser
@pytest.mark.parametrize("blueprint", BLUEPRINTS, ids=lambda b: b.inner.name)
def test_the_page_adds_the_blueprint_as_one_node(blueprint: Blueprint, page: "Page", server: ComfyServer) -> None:
    add_by_search(page, blueprint.inner.title)
    (shown,) = page.evaluate("""app.graph.nodes.map(n => ({sockets: n.inputs.map(i => i.name),
        outputs: n.outputs.map(o => o.name), widgets: Object.fromEntries(n.widgets.map(w => [w.name, w.value]))}))""")
    assert shown["sockets"] == list(blueprint.inputs) and shown["outputs"] == list(blueprint.outputs)
    info = server.object_info()
    open_widgets = {name for name, (n, field) in blueprint.inputs.items() if field in split_inputs(info[n.type])[1]}
    assert shown["widgets"].keys() == open_widgets
    assert all(shown["widgets"][name] == n.inputs[f] for name, (n, f) in blueprint.inputs.items() if f in n.inputs)
    sent = page.evaluate("async () => (await app.graphToPrompt()).output")
    assert [node["class_type"] for node in sent.values()] == [node.type for node in blueprint.inner.nodes]


@pytest.mark.comfy
@pytest.mark.browser
def test_a_blueprint_controls_a_run(page: "Page", server: ComfyServer, tiny: "TinyModels") -> None:
    pictures: list[bytes] = []
    title = BLUEPRINTS[0].inner.title
    for strength in (0, 1):
        add_by_search(page, title)
        names = {"checkpoint": tiny.names["checkpoint"], "control": tiny.names["control"], "strength": strength}
        page.evaluate(AROUND, [title, names])
        sent: dict[str, Any] = page.evaluate("async () => (await app.graphToPrompt()).output")
        (saver,) = (number for number, node in sent.items() if node["class_type"] == "SaveImage")
        with ThreadPoolExecutor() as thread:  # this one has Playwright's event loop
            done = thread.submit(server.run, sent).result()
        pictures.append(server.image(done.outputs[saver]["images"][0]))
    assert pictures[0] != pictures[1], "the strength on the outer node reaches the control"


@pytest.mark.comfy
def test_the_host_serves_what_is_committed(server: ComfyServer) -> None:
    served = {entry["name"]: number for number, entry in server.get("/global_subgraphs").items()}
    for blueprint in BLUEPRINTS:
        title = blueprint.inner.title
        data = server.get(f"/global_subgraphs/{served[title]}")["data"]
        committed = (make_workflows.SUBGRAPHS / f"{title}.json").read_text("utf-8")
        assert json.loads(data) == json.loads(committed)
