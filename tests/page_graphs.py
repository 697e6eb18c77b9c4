"""Graphs for the page's tests, which never sample: a node for each warning, a graph for each message; comparisons."""

from __future__ import annotations

import base64
import io
import itertools
import json
from pathlib import Path
from typing import Any

from comfyui_controlnext.tests.conftest import TinyModels
from comfyui_controlnext.tools.tiny_models import make_controlnext, make_unet_difference
from PIL import Image
from PIL.PngImagePlugin import PngInfo

CONTROL, WEIGHTS = "warned/controlnet.safetensors", "warned/unet.safetensors"
NAMED = str(Path(CONTROL))
"""As the host's lists name it."""
WARNINGS = {
    "full": "weights_kind is full, but the weights look like difference",
    "none": "was published with UNet weights and is loaded without them",
    "options": "strength 12 at 0.4 is above 10",
    "range": "start_percent 0.8 is after end_percent 0.2",
    "masked": "the mask is 0 everywhere",
    "blank": "the hint has one colour everywhere",
    "past": "its wire went past the loader",
}
"""Title of a node -> what it warns of."""
REFUSED = {
    "an encoder as weights": ("load", {"weights_name": NAMED}, "is an encoder and holds no weights of a base"),
    "a whole control as weights": (
        "load",
        {"weights_name": str(Path("warned/whole.safetensors"))},
        "is a whole control",
    ),
    "a damaged file": (
        "load",
        {"control_name": str(Path("warned/empty.safetensors"))},
        "models/controlnext/warned/empty",
    ),
    "a bad schedule": ("options", {"schedule": "0:1; 1:0"}, "is not a percent:strength pair"),
    "bad heads": ("xs", {"num_heads": "many"}, "is not a list of whole numbers"),
}
"""Fault -> (node, its inputs, what the page says)."""


def write_files(models: Path) -> None:
    """The control, its weights, a whole control and an empty file, in models/controlnext/warned."""
    from comfyui_controlnext.tests.test_short_messages import bundle

    folder = models / "controlnext" / "warned"
    folder.mkdir(parents=True, exist_ok=True)
    make_controlnext(models / "controlnext" / CONTROL, "gen2")
    make_unet_difference(models / "controlnext" / WEIGHTS)
    bundle(folder)
    (folder / "empty.safetensors").touch()


def node(type: str, /, **inputs: Any) -> dict[str, Any]:
    return {"class_type": type, "inputs": inputs, "_meta": {"title": type}}


def loader(**inputs: Any) -> dict[str, Any]:
    given = {"weights_name": "auto", "weights_strength": 1.0, "variant": "auto", "weights_kind": "auto", **inputs}
    return node("ControlNeXtLoader", model=["base", 0], control_name=NAMED, **given)


def warning_graph(tiny: TinyModels) -> dict[str, Any]:
    """A graph whose nodes warn, each titled with its key of WARNINGS."""
    apply = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "image": ["edges", 0], "model": ["full", 0]}
    made = {
        "base": node("CheckpointLoaderSimple", ckpt_name=tiny.names["checkpoint"]),
        "edges": node("ControlNeXtSampleInputs", kind="edges", width=64, height=64),
        "grey": node("EmptyImage", width=64, height=64, batch_size=1, color=8421504),
        "black": node("SolidMask", value=0.0, width=64, height=64),
        "full": loader(weights_kind="full"),
        "none": loader(weights_name="none"),
        "options": node("ControlNeXtOptions", control_net=["none", 1], apply_to="auto", schedule="0:1, 0.4:12, 1:0"),
        "range": node(
            "ControlNeXtApply", control_net=["full", 1], **apply | {"start_percent": 0.8, "end_percent": 0.2}
        ),
        "masked": node("ControlNeXtApply", control_net=["full", 1], mask=["black", 0], **apply),
        "blank": node("ControlNeXtApply", control_net=["full", 1], **apply | {"image": ["grey", 0]}),
        "past": node("ControlNeXtApply", control_net=["full", 1], **apply | {"model": ["base", 0]}),
    }
    made |= {f"see {name}": node("PreviewAny", source=[name, 0]) for name in WARNINGS if name not in ("full", "none")}
    for name in WARNINGS:
        made[name]["_meta"]["title"] = name
    return made


def refused_graph(tiny: TinyModels, what: str) -> dict[str, Any]:
    """A graph that the host refuses, or whose run fails, for one reason of REFUSED."""
    at, inputs, _ = REFUSED[what]
    first = "xs" if at == "xs" else "load"
    made = {
        "base": node("CheckpointLoaderSimple", ckpt_name=tiny.names["checkpoint"]),
        "load": loader(),
        "xs": node("ControlNetXSLoader", control_name=NAMED, norm_rule="auto", num_heads=""),
        "options": node(
            "ControlNeXtOptions", control_net=[first, 0 if first == "xs" else 1], apply_to="auto", schedule=""
        ),
        "see": node("PreviewAny", source=["options", 0]),
    }
    made[at]["inputs"] |= inputs
    return {name: made[name] for name in ("base", first, "options", "see")}


def picture_of(workflow: dict[str, Any], output: dict[str, Any]) -> str:
    """A PNG that holds a graph in both formats, written as the host's SaveImage does, in base64."""
    kept, stream = PngInfo(), io.BytesIO()
    kept.add_text("prompt", json.dumps(output))
    kept.add_text("workflow", json.dumps(workflow))
    Image.new("RGB", (8, 8)).save(stream, "PNG", pnginfo=kept)
    return base64.b64encode(stream.getvalue()).decode()


def same_but_for_additions(sent: dict[str, Any], kept: dict[str, Any]) -> bool:
    """True if both graphs of the API have the same nodes, and `sent` has every input of `kept` with its value.

    Newer hosts change titles of core nodes and add inputs to them.
    """
    return sent.keys() == kept.keys() and all(
        sent[number]["class_type"] == node["class_type"]
        and node["inputs"].items() <= dict(sent[number]["inputs"]).items()
        for number, node in kept.items()
    )


def overlapping(boxes: dict[int, list[float]]) -> list[tuple[int, int]]:
    """Pairs of nodes that cover each other. boxes: x, y, width and height by number, titles included."""
    return [
        (one, other)
        for (one, (x, y, w, h)), (other, (u, v, s, t)) in itertools.combinations(boxes.items(), 2)
        if x < u + s and u < x + w and y < v + t and v < y + h
    ]
