"""Example workflows: committed as the script writes them, accepted by the host, and run on small models."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.controlnext_training.synthetic import write_folder
from comfyui_controlnext.tests.fixtures.published_unet import make_published_unet
from comfyui_controlnext.tests.references import reference_controlnext as released
from comfyui_controlnext.tools import host, make_workflows
from comfyui_controlnext.tools import tiny_models as tm
from comfyui_controlnext.tools.comfy_command import for_this_system
from comfyui_controlnext.tools.demo_weights import shipped
from comfyui_controlnext.tools.workflow_graph import NOTE, WIDGET_TYPES, split_inputs
from comfyui_controlnext.tools.workflows import clip_graphs, image_graphs, parts, training_graphs, xs_graphs
from comfyui_controlnext.tools.workflows.demo_graphs import SHARP
from PIL import Image, ImageSequence

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer
    from conftest import TinyModels

FOLDER = Path(__file__).resolve().parents[2] / "example_workflows"
TITLES = {describe.__name__: describe().title for describe in make_workflows.WORKFLOWS}
NAMES = sorted(TITLES)
OWN = ("sd15_canny", "sd35_canny", "wan_pose", "wan_depth", "wan_outpaint")
"""Workflows of controls that a user trains."""
DEMOS = [name for name in NAMES if name.startswith("demo")]
VIDEOS = [name for name in NAMES if name.startswith("svd_")]
ADDED_BY_THE_PAGE = ("fixed", "image")  # of `control_after_generate` and of the upload button
THUMBNAIL_BYTES, TITLE = 30_000, 30  # a node's title bar stands that much above its position
SIZE, STEPS = 64, 1
FRAMES = {"svd_short_clip": 3, "svd_long_clip": 7}
"""Number of frames of the sample poses; the long clip runs in windows."""
TINY: dict[str, dict[str, Any]] = {
    "EmptyLatentImage": {"width": SIZE, "height": SIZE},
    "EmptySD3LatentImage": {"width": SIZE, "height": SIZE},
    "CLIPTextEncode": {"text": "a"},  # one text, which the host then encodes once
    "KSampler": {"steps": STEPS},
    "ControlNeXtSampleInputs": {"width": SIZE, "height": SIZE},
    "ControlDatasetFolder": {"resolution": SIZE},
    "ControlNeXtTrain": {"steps": 2, "batch_size": 1, "config": "validate_every = 0", "resume": False},
    "SVD_img2vid_Conditioning": {"width": SIZE, "height": SIZE, "augmentation_level": 0.0},
    "ControlNeXtVideoWindows": {"length": 4, "overlap": 1},
    "LatentUpscaleBy": {"scale_by": 1.0},
    "ImageScaleBy": {"scale_by": 1.5},  # to 96 pixels in four tiles
    "ControlNeXtSplitTiles": {"width": SIZE, "height": SIZE, "overlap": 16},
    "SaveAnimatedWEBP": {"lossless": True},
}
SAVERS = ("SaveImage", "SaveAnimatedWEBP", "SaveVideo")
APPLIERS = ("ControlNeXtApply", "ControlNetApplyAdvanced")


def page(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{TITLES[name]}.json").read_text("utf-8"))


def prompt(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / "api" / f"{name}.json").read_text("utf-8"))


def rectangle(node: dict[str, Any]) -> tuple[float, float, float, float]:
    """Rectangle (left, top, right, bottom) with the title bar."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


@pytest.mark.parametrize("name", NAMES)
def test_a_title_is_a_file_name_on_every_system_and_every_input_comes_with_the_pack(name: str) -> None:
    assert re.fullmatch(r"[A-Z][\w.,-]*( [\w.,-]+)+", TITLES[name]) and not TITLES[name].endswith(".")
    kinds = {node["class_type"] for node in prompt(name).values()}
    own = {"LoadVideo" if name == "wan_outpaint" else "ControlNeXtSampleInputs"}  # it is for a video of one's own
    assert {"ControlNeXtSampleInputs", "LoadImage", "LoadVideo"} & kinds == own


def test_every_kind_of_control_is_shown_through_both_doors() -> None:
    used = {name: {node["class_type"] for node in prompt(name).values()} for name in NAMES}
    of_xs = [name for name in NAMES if name.startswith("xs_")]
    assert {"xs_sd15_canny", "xs_sdxl_canny", "xs_sdxl_depth", "xs_sdxl_two", "xs_controlnext_lora"} == set(of_xs)
    assert all("ControlNetXSLoader" in used[name] for name in of_xs)
    for names in (of_xs, [name for name in NAMES if name.startswith("sd")]):
        assert {door for name in names for door in used[name]} >= set(APPLIERS)
    assert {"ControlNetXSLoader", "ControlNeXtLoader", "LoraLoader", *APPLIERS} <= used["xs_controlnext_lora"]
    assert {name: "ControlNeXtVideoWindows" in used[name] for name in VIDEOS} == {
        "svd_short_clip": False,
        "svd_long_clip": True,
    }


def test_what_the_issue_of_a_release_lists_is_there() -> None:
    wanted = {"sd15_canny", "sd15_depth", "sd15_pose", "sd15_mask", "sdxl_canny", "sdxl_depth"}
    assert wanted | {"sdxl_lora_two_controls"} <= set(NAMES)
    assert {path.stem for path in FOLDER.glob("*.json")} == set(TITLES.values())
    assert {path.stem for path in (FOLDER / "api").glob("*.json")} == set(NAMES)


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
        shown = [value for value in nodes[key]["widgets_values"] if value not in ADDED_BY_THE_PAGE]
        wired = sum("widget" in entry for entry in nodes[key]["inputs"])
        assert len(shown) == len(values) + wired
        rest = iter(shown)
        assert all(value in rest for value in values), "the page's values, but for those that a wire replaces"


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
    """The page reads `properties.models` whose name a widget shows."""
    graph = page(name)
    found: list[dict[str, str]] = []
    for node in graph["nodes"]:
        for entry in node["properties"].get("models", []):
            assert entry["name"] in node["widgets_values"]
            found.append(entry)
    for entry in found:
        url = urlparse(entry["url"])
        assert (url.scheme, url.hostname) == ("https", "huggingface.co")
        assert url.path.rpartition("/")[2] == entry["name"].rpartition("/")[2]
        assert entry["directory"] in ("checkpoints", "controlnext", "loras", "diffusion_models", "text_encoders", "vae")
        if entry["directory"] == "controlnext":
            assert url.path.endswith(f"/main/{entry['name']}"), "below models/controlnext as where it is published"
    unpublished = {"ControlNeXtLoader"} if name in OWN else set()  # none for these has been
    for node in graph["nodes"]:
        if "Loader" in node["type"] and name not in DEMOS:
            wanted = (
                0
                if node["type"] in unpublished
                else sum(str(value).endswith((".safetensors", ".ckpt")) for value in node["widgets_values"])
            )
            assert len(node["properties"].get("models", [])) == wanted
    encoders = [entry for entry in found if entry["name"].endswith("/controlnet.safetensors")]
    assert len([entry for entry in found if entry["name"].endswith("/unet.safetensors")]) == len(encoders)


@pytest.mark.parametrize("name", NAMES)
def test_thumbnail_is_small(name: str) -> None:
    path = FOLDER / f"{TITLES[name]}.jpg"
    assert path.stat().st_size < THUMBNAIL_BYTES
    with Image.open(path) as picture:
        assert picture.format == "JPEG" and min(picture.size) >= 200


@pytest.fixture(scope="module")
def object_info(server: "ComfyServer") -> dict[str, Any]:
    return server.object_info()


@pytest.mark.comfy
def test_files_are_what_the_script_writes(object_info: dict[str, Any], pinned_host: bool) -> None:
    if not pinned_host:
        pytest.skip(f"the titles of stock nodes are those of ComfyUI {host.VERSION}")
    for path, text in make_workflows.files(object_info).items():
        assert path.read_text("utf-8") == text, f"{path.name}: run tools/make_workflows.py"


def needed(info: dict[str, Any]) -> int:
    """Number of widgets that need values in a saved graph; newer hosts add optional ones after them."""
    widgets = split_inputs(info)[1]
    return sum(name in info["input"].get("required", {}) for name in widgets)


@pytest.mark.comfy
@pytest.mark.parametrize("name", NAMES)
def test_every_node_and_slot_exists_in_the_host(name: str, object_info: dict[str, Any], pinned_host: bool) -> None:
    for node in page(name)["nodes"]:
        if node["type"] == NOTE:
            continue
        info = object_info[node["type"]]
        sockets, widgets = split_inputs(info)
        slots = [(slot["name"], slot["type"]) for slot in node["inputs"]]
        assert slots[: len(sockets)] == [(n, s[0]) for n, s in sockets.items()]
        for slot in node["inputs"][len(sockets) :]:
            assert slot["widget"] == {"name": slot["name"]} and slot["type"] == widgets[slot["name"]][0]
        outputs = [slot["type"] for slot in node["outputs"]]
        assert outputs == info["output"][: len(outputs)], "newer hosts have more outputs, after those"
        kept = [value for value in node["widgets_values"] if value not in ADDED_BY_THE_PAGE]
        assert all(kind in WIDGET_TYPES for kind, _, _ in widgets.values())
        assert len(kept) == len(widgets) or (not pinned_host and needed(info) <= len(kept) < len(widgets))
        for value, (widget, (kind, options, _)) in zip(kept, widgets.items(), strict=pinned_host):
            of_a_person = widget == "folder" or str(value).endswith((".safetensors", ".ckpt", ".png", ".mp4"))
            if kind == "COMBO" and not of_a_person:
                assert value in options["options"]
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"]


@pytest.fixture(scope="module")
def published(tiny: "TinyModels") -> Iterator[dict[str, str]]:
    """Small models under the published names; yields {published file: its stand-in}. Removed afterwards.

    Whole models have stand-ins, because a .safetensors of theirs would be large.
    """
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
    controls = models / "controlnext"
    stand_ins = {
        parts.SD15.name: tm.make_sd15_deep(models / "checkpoints" / "deep_sd15.ckpt"),
        parts.SDXL.name: tm.make_sdxl(models / "checkpoints" / "tiny_sdxl.ckpt"),
        parts.SD35.name: tm.make_sd3(models / "checkpoints" / "small_sd3.ckpt"),
        clip_graphs.SVD.name: tm.make_svd(models / "checkpoints" / "tiny_svd.ckpt"),
        clip_graphs.UNET.name: make_published_unet(controls / "tiny_svd_unet.bin", seed=1),
    }
    others = (
        _own_sd35(controls / image_graphs.OWN_SD35_CANNY),
        tm.make_lora(models / "loras" / parts.OFFSET_LORA.name, "sdxl"),
        tm.make_controlnext(controls / clip_graphs.ENCODER.name, "gen2", torch.float16),
        tm.make_controlnet_xs(controls / xs_graphs.XS_SD15_CANNY.name, "sd15_deep"),
        tm.make_controlnet_xs(controls / xs_graphs.XS_SDXL_CANNY.name, "sdxl", own_time=True),
        tm.make_controlnet_xs(controls / xs_graphs.XS_SDXL_DEPTH.name, "sdxl", own_time=True, seed=1),
    )
    yield {name: path.name for name, path in stand_ins.items()}
    for path in (*stand_ins.values(), *others):
        path.unlink()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _own_sd35(path: Path) -> Path:
    """Control of SD3's shape in the trainer's form: one file, with a low-rank difference."""
    encoder = released.random_weights("SD15-T", seed=3, out=128)
    proj = "base.joint_blocks.0.x_block.attn.proj.weight"
    factors = {f"{proj}.up": 0.1 * torch.randn(128, 4), f"{proj}.down": torch.randn(4, 128) * 128**-0.5}
    bundled = {f"controlnext.{name}": tensor for name, tensor in encoder.items()}
    return checkpoint.save(path, bundled | factors, {"controlnext.spec": "sd3"})


@pytest.fixture(scope="module")
def pictures(server: "ComfyServer", tiny: "TinyModels") -> None:
    """Models of the demo, and a folder to train from."""
    shipped.install(tiny.base)
    shutil.copyfile(*(tiny.models / "controlnext" / name for name in (shipped.PICTURE_EDGES, SHARP)))
    write_folder(tiny.base / "input" / training_graphs.FOLDER, 4, SIZE, 0, "edges")


def shown(content: bytes) -> tuple[list[Image.Image], float]:
    """Pictures of a PNG, WebP or mp4, and their number per second (0 for a single one)."""
    import av

    if content[4:8] == b"ftyp":
        with av.open(io.BytesIO(content)) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
            return frames, float(container.streams.video[0].average_rate)
    with Image.open(io.BytesIO(content)) as picture:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]
        return frames, 1000 / picture.info["duration"] if len(frames) > 1 else 0.0


def tiny_run(name: str, stand_ins: dict[str, str]) -> dict[str, Any]:
    """Workflow with small models, a small latent, few steps and frames."""
    workflow = for_this_system(prompt(name))
    for node in workflow.values():
        inputs = node["inputs"]
        inputs |= {key: stand_ins[value] for key, value in inputs.items() if str(value) in stand_ins}
        inputs |= TINY.get(node["class_type"], {})
        if node["class_type"] == "ControlNeXtLoader":  # else the host keeps what an earlier workflow loaded
            inputs["weights_strength"] = 1 - NAMES.index(name) / 1000
        if inputs.get("kind") == "pose_clip":
            inputs["frames"] = FRAMES[name]
    return workflow


def saved(server: "ComfyServer", workflow: dict[str, Any]) -> bytes:
    """Result saved by the workflow's single saving node."""
    (saver,) = (key for key, node in workflow.items() if node["class_type"] in SAVERS)
    return server.image(server.run(workflow).outputs[saver]["images"][0])


@pytest.mark.comfy
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("wan_")])
def test_api_workflow_runs(name: str, server: "ComfyServer", published: dict[str, str], pictures: None) -> None:
    workflow = tiny_run(name, published)
    seen = len(server.log_lines())
    frames, fps = shown(saved(server, workflow))
    assert len(frames) == FRAMES.get(name, 1)
    assert fps == pytest.approx(8 if name in VIDEOS else 0)
    for picture in frames:
        assert picture.size == (SIZE, SIZE) or (name, *picture.size) == ("demo_tiles", 96, 96)
        assert picture.convert("L").getextrema() != (0, 0)
    said = "\n".join(server.log_lines()[seen:])
    names = [str(n["inputs"]["weights_name"]) for n in workflow.values() if n["class_type"] == "ControlNeXtLoader"]
    bundled = name in ("demo", "demo_tiles", "sd35_canny")
    beside = "bundled in the control file" if bundled else "unet.safetensors, the only one beside the control"
    assert said.count(beside) == names.count("auto")
    assert said.count("unet.safetensors, as chosen") == sum(n.endswith("unet.safetensors") for n in names)
    assert "had no effect" not in said and "hints for" not in said


@pytest.mark.comfy
@pytest.mark.parametrize("name", ["sd15_canny", "sd35_canny", "svd_short_clip", "xs_controlnext_lora"])
def test_each_control_of_a_workflow_acts(
    name: str, server: "ComfyServer", published: dict[str, str], pictures: None
) -> None:
    with_all, _ = shown(saved(server, tiny_run(name, published)))
    for key in (key for key, node in prompt(name).items() if node["class_type"] in APPLIERS):
        workflow = tiny_run(name, published)
        workflow[key]["inputs"]["strength"] = 0.0
        without, _ = shown(saved(server, workflow))
        for one, other in zip(with_all, without, strict=True):
            assert one.tobytes() != other.tobytes(), f"node {key} does nothing"
