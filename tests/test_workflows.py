"""example_workflows/: what is committed is what the script writes, the host takes it, and it runs on small models."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import pytest
from comfyui_controlnext.tools import make_workflows
from comfyui_controlnext.tools import tiny_models as tm
from comfyui_controlnext.tools.demo import for_this_system
from comfyui_controlnext.tools.workflow_graph import NOTE, WIDGET_TYPES, split_inputs
from PIL import Image

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer
    from conftest import TinyModels

FOLDER = Path(__file__).resolve().parents[1] / "example_workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
DEMO = "demo_sd15_canny"  # API only; `run.py demo` and its tests run it
ADDED_BY_THE_PAGE = ("fixed", "image")  # of `control_after_generate` and of the upload button
THUMBNAIL_BYTES = 30_000
TITLE = 30  # a node's title bar stands above its position
SIZE, STEPS = 64, 1


def page(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def prompt(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / "api" / f"{name}.json").read_text("utf-8"))


def rectangle(node: dict[str, Any]) -> tuple[float, float, float, float]:
    """left, top, right, bottom with the title bar."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def test_what_the_issue_of_a_release_lists_is_there() -> None:
    wanted = {"sd15_canny", "sd15_depth", "sd15_pose", "sd15_mask", "sdxl_canny", "sdxl_depth"}
    assert wanted | {"sdxl_lora_two_controls"} <= set(NAMES)
    assert {path.stem for path in (FOLDER / "api").glob("*.json")} == {*NAMES, DEMO}


@pytest.mark.parametrize("name", NAMES)
def test_page_and_api_say_the_same(name: str) -> None:
    graph, api = page(name), prompt(name)
    nodes = {str(node["id"]): node for node in graph["nodes"] if node["type"] != NOTE}
    assert {key: node["type"] for key, node in nodes.items()} == {key: node["class_type"] for key, node in api.items()}
    wires = {
        (str(origin), slot, str(target), nodes[str(target)]["inputs"][place]["name"])
        for _, origin, slot, target, place, _ in graph["links"]
    }
    by_api = {
        (*value, key, field) for key, node in api.items() for field, value in node["inputs"].items() if is_wire(value)
    }
    assert wires == by_api
    for key, node in api.items():
        values = [value for value in node["inputs"].values() if not is_wire(value)]
        assert [value for value in nodes[key]["widgets_values"] if value not in ADDED_BY_THE_PAGE] == values


def is_wire(value: Any) -> bool:
    return isinstance(value, list)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_overlaps_and_every_node_lies_in_one_group(name: str) -> None:
    graph = page(name)
    boxes = [rectangle(node) for node in graph["nodes"]]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3], (a, b)
    groups = [(x, y, x + width, y + height) for x, y, width, height in (g["bounding"] for g in graph["groups"])]
    for box in boxes:
        assert sum(g[0] <= box[0] and g[1] <= box[1] and box[2] <= g[2] and box[3] <= g[3] for g in groups) == 1


@pytest.mark.parametrize("name", NAMES)
def test_links_are_whole(name: str) -> None:
    graph = page(name)
    nodes = {node["id"]: node for node in graph["nodes"]}
    for link, origin, slot, target, place, kind in graph["links"]:
        assert link in nodes[origin]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][place]["link"] == link
        assert nodes[origin]["outputs"][slot]["type"] == nodes[target]["inputs"][place]["type"] == kind
    ends = [end["link"] for node in graph["nodes"] for end in node["inputs"] if end["link"] is not None]
    assert sorted(ends) == sorted(link[0] for link in graph["links"])


@pytest.mark.parametrize("name", NAMES)
def test_published_files_are_reported_where_the_page_looks(name: str) -> None:
    """The page reads `properties.models` whose name a widget shows, and the graph's own `models`."""
    graph = page(name)
    found = list(graph["models"])
    for node in graph["nodes"]:
        for entry in node["properties"].get("models", []):
            assert entry["name"] in node["widgets_values"]
            found.append(entry)
    for entry in found:
        url = urlparse(entry["url"])
        assert (url.scheme, url.hostname) == ("https", "huggingface.co")
        assert url.path.rpartition("/")[2] == entry["name"].rpartition("/")[2]
        assert entry["directory"] in ("checkpoints", "controlnext", "loras")
        if "Pbihao" in url.path:
            assert url.path.endswith(f"/main/{entry['name']}"), "below models/controlnext as where it is published"
    controls = [node for node in graph["nodes"] if node["type"] == "ControlNeXtLoader"]
    encoders = [entry for entry in found if entry["name"].endswith("/controlnet.safetensors")]
    assert len(encoders) == (0 if name == "sd15_canny" else len(controls)), "no canny for SD1.5 has been published"
    assert len([entry for entry in found if entry["name"].endswith("/unet.safetensors")]) == len(encoders)


@pytest.mark.parametrize("name", NAMES)
def test_thumbnail_is_small(name: str) -> None:
    path = FOLDER / f"{name}.jpg"
    assert path.stat().st_size < THUMBNAIL_BYTES
    with Image.open(path) as picture:
        assert picture.format == "JPEG" and min(picture.size) >= 200


@pytest.fixture(scope="module")
def object_info(server: "ComfyServer") -> dict[str, Any]:
    return server.object_info()


@pytest.mark.comfy
def test_files_are_what_the_script_writes(object_info: dict[str, Any]) -> None:
    for path, text in make_workflows.files(object_info).items():
        assert path.read_text("utf-8") == text, f"{path.name}: run tools/make_workflows.py"


@pytest.mark.comfy
@pytest.mark.parametrize("name", NAMES)
def test_every_node_and_slot_exists_in_the_host(name: str, object_info: dict[str, Any]) -> None:
    for node in page(name)["nodes"]:
        if node["type"] == NOTE:
            continue
        info = object_info[node["type"]]
        sockets, widgets = split_inputs(info)
        assert [(slot["name"], slot["type"]) for slot in node["inputs"]] == [(n, s[0]) for n, s in sockets.items()]
        assert [slot["type"] for slot in node["outputs"]] == info["output"]
        kept = [value for value in node["widgets_values"] if value not in ADDED_BY_THE_PAGE]
        assert len(kept) == len(widgets) and all(kind in WIDGET_TYPES for kind, _, _ in widgets.values())
        for value, (kind, options, _) in zip(kept, widgets.values(), strict=True):
            if kind == "COMBO" and not str(value).endswith((".safetensors", ".png")):
                assert value in options["options"]
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"]


@pytest.fixture(scope="module")
def published(tiny: "TinyModels") -> Iterator[dict[str, str]]:
    """Small models under the published names; yields {published checkpoint: its stand-in}. Removed afterwards."""
    models, folders = tiny.models, []
    for folder, build, base, rule in (
        ("ControlNeXt-SD1.5/vidit_depth", "sd15_legacy", "sd15_deep", "to_out"),
        ("ControlNeXt-SD1.5/deepfashion_multiview", "sd15_legacy", "sd15_deep", "to_out"),
        ("ControlNeXt-SD1.5/deepfashoin_mask", "sd15_legacy", "sd15_deep", "to_out"),
        ("sd15_canny", "gen2", "sd15_deep", "to_out"),
        ("ControlAny-SDXL/anime_canny", "gen2", "sdxl", "attn2_to_out"),
        ("ControlAny-SDXL/vidit_depth", "gen2", "sdxl", "attn2_to_out"),
    ):
        path = models / "controlnext" / folder
        seed = len(folders)
        tm.make_controlnext(path / "controlnet.safetensors", build, seed=seed)
        tm.make_unet_difference(path / "unet.safetensors", base, rule, seed=seed)
        folders.append(models / "controlnext" / folder.partition("/")[0])
    stand_ins = {
        make_workflows.SD15.name: tm.make_sd15_deep(models / "checkpoints" / "deep_sd15.ckpt"),
        make_workflows.SDXL.name: tm.make_sdxl(models / "checkpoints" / "tiny_sdxl.ckpt"),
    }
    lora = tm.make_lora(models / "loras" / make_workflows.OFFSET_LORA.name, "sdxl")
    yield {name: path.name for name, path in stand_ins.items()}
    for path in (*stand_ins.values(), lora):
        path.unlink()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def pictures(server: "ComfyServer") -> None:
    """The pictures that the workflows ask for, with a painted part (alpha 0) for the mask."""
    ramp = Image.linear_gradient("L").resize((SIZE, SIZE))
    picture = Image.merge("RGBA", (ramp, ramp.rotate(90), ramp.rotate(45), ramp.point(lambda v: 255 * (v > 99))))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    for name in ("example.png", "depth.png", "pose.png"):
        server.upload_image(stream.getvalue(), name)


def tiny_run(name: str, checkpoints: dict[str, str]) -> dict[str, Any]:
    """The workflow with small models, a small latent, few steps and one text, which the host then encodes once."""
    workflow = for_this_system(prompt(name))
    for node in workflow.values():
        inputs = node["inputs"]
        if node["class_type"] == "CheckpointLoaderSimple":
            inputs["ckpt_name"] = checkpoints[inputs["ckpt_name"]]
        if node["class_type"] == "EmptyLatentImage":
            inputs |= {"width": SIZE, "height": SIZE}
        if node["class_type"] == "CLIPTextEncode":
            inputs["text"] = "a"
        if node["class_type"] == "KSampler":
            inputs["steps"] = STEPS
    return workflow


@pytest.mark.comfy
@pytest.mark.parametrize("name", NAMES)
def test_api_workflow_runs(name: str, server: "ComfyServer", published: dict[str, str], pictures: None) -> None:
    workflow = tiny_run(name, published)
    (saver,) = (key for key, node in workflow.items() if node["class_type"] == "SaveImage")
    seen = len(server.log_lines())
    with Image.open(io.BytesIO(server.image(server.run(workflow).outputs[saver]["images"][0]))) as picture:
        assert picture.size == (SIZE, SIZE)
        assert picture.convert("L").getextrema() != (0, 0)
    said = "\n".join(server.log_lines()[seen:])
    loaders = sum(node["class_type"] == "ControlNeXtLoader" for node in workflow.values())
    assert said.count("unet.safetensors, the only one beside the control; difference") == loaders
    assert "had no effect" not in said


@pytest.mark.comfy
def test_the_control_of_a_workflow_acts(server: "ComfyServer", published: dict[str, str], pictures: None) -> None:
    pictures_at = {}
    for strength in (1.0, 0.0):
        workflow = tiny_run("sd15_canny", published)
        for key, node in workflow.items():
            if node["class_type"] == "ControlNeXtApply":
                node["inputs"]["strength"] = strength
            if node["class_type"] == "SaveImage":
                saver = key
        pictures_at[strength] = server.image(server.run(workflow).outputs[saver]["images"][0])
    with Image.open(io.BytesIO(pictures_at[1.0])) as one, Image.open(io.BytesIO(pictures_at[0.0])) as other:
        assert one.tobytes() != other.tobytes()
