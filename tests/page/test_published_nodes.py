"""Public interface of the nodes for the page and shared workflows: ids, inputs, defaults, outputs, tooltips."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer

pytestmark = pytest.mark.comfy
ROOT = Path(__file__).resolve().parents[2]


def ours(server: ComfyServer) -> dict[str, Any]:
    """Descriptions of this pack's nodes on the server."""
    module = f"custom_nodes.{ROOT.name}"
    return {name: info for name, info in server.object_info().items() if info["python_module"] == module}


def test_the_page_gets_every_node_with_words_on_every_socket(server: ComfyServer) -> None:
    from comfyui_controlnext import controlnext_training, nodes

    found = ours(server)
    assert found.keys() == nodes.NODE_CLASS_MAPPINGS.keys() | controlnext_training.NODE_CLASS_MAPPINGS.keys()
    for name, info in found.items():
        assert info["display_name"] and info["description"] and info["category"].partition("/")[0] == "ControlNeXt"
        inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        for input_name, (_, options, *_) in ((n, (*given, {})) for n, given in inputs.items()):
            assert options.get("tooltip"), f"{name}.{input_name}"
        assert len(info["output_tooltips"]) == len(info["output"]) and all(info["output_tooltips"]), name
        assert server.request(f"/extensions/{quote(ROOT.name)}/docs/{name}.md"), name


WANTED = ("canny", "depth", "pose", "edges", "preprocessor", "svd", "video", "train", "lora", "controlnet")
"""Words that people search for and that no node's name contains."""


def test_nodes_are_found_by_the_words_that_people_search_for(server: ComfyServer) -> None:
    from comfyui_controlnext import controlnext_training, nodes

    classes = nodes.NODE_CLASS_MAPPINGS | controlnext_training.NODE_CLASS_MAPPINGS
    for name, info in ours(server).items():
        assert classes[name].SEARCH, name
        if "search_aliases" in info:  # newer hosts
            assert info["search_aliases"] == list(classes[name].SEARCH)
    assert {word for node in classes.values() for word in node.SEARCH}.issuperset(WANTED)


PUBLISHED = {
    "ControlNeXtLoader": (
        "model control_name weights_name=auto weights_strength=1.0 variant=auto weights_kind=auto",
        ["MODEL", "CONTROL_NET"],
    ),
    "ControlNeXtApply": (
        "model control_net image strength=1.0 start_percent=0.0 end_percent=1.0 mask",
        ["MODEL"],
    ),
    "ControlNeXtOptions": (
        "control_net apply_to=auto mask schedule= encoder_strength=1.0 middle_strength=1.0 decoder_strength=1.0 "
        "time_mix=-1.0",
        ["CONTROL_NET"],
    ),
    "ControlNetXSOptions": (
        "control_net encoder_strength=1.0 middle_strength=1.0 decoder_strength=1.0 time_mix=-1.0",
        ["CONTROL_NET"],
    ),
    "ControlNeXtInspect": ("control_name", ["STRING"]),
    "ControlNeXtSave": ("control_net model filename_prefix layout=single dtype=fp16", ["STRING"]),
    "ControlNetXSLoader": ("control_name norm_rule=auto num_heads=", ["CONTROL_NET"]),
    "ControlNeXtUNetLoader": ("weights_name weight_dtype=default", ["MODEL"]),
    "ControlNeXtVideoWindows": (
        "model length=14 overlap=4 schedule=standard_static fuse=pyramid repeat_first_hint=False",
        ["MODEL"],
    ),
    "ControlNeXtSplitTiles": ("image width=1024 height=1024 overlap=128", ["IMAGE", "TILE_LAYOUT"]),
    "ControlNeXtMergeTiles": ("tiles layout", ["IMAGE"]),
    "ControlDatasetFolder": (
        "folder hint=paired resolution=512 buckets=True caption_extension=.txt",
        ["CONTROL_DATASET"],
    ),
    "ControlDatasetImages": ("images hints captions=", ["CONTROL_DATASET"]),
    "ControlNeXtTrain": (
        "model vae dataset variant=sd15 steps=1000 batch_size=1 learning_rate=1e-05 control_learning_rate=0.0001 "
        "seed=0 output_name=control clip clip_vision config= resume=True preset=none",
        ["MODEL", "CONTROL_NET", "LOSS_MAP", "STRING"],
    ),
}
"""Ids, defaults and outputs that shared workflows depend on."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_ids_defaults_and_outputs_stay(server: ComfyServer, name: str) -> None:
    info = ours(server)[name]
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    wanted, outputs = PUBLISHED[name]
    assert info["output"] == outputs
    for entry in wanted.split():
        input_name, stated, default = entry.partition("=")
        assert input_name in inputs
        if stated:
            assert str(inputs[input_name][1]["default"]) == default
