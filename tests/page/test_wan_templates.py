"""Example graphs of Wan, on a small base: as many frames as hints, a control that acts, windows for longer clips."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
from comfyui_controlnext.tests.fixtures.sampling_fixtures import relative
from comfyui_controlnext.tests.fixtures.transformer_files import make_small, make_vae
from comfyui_controlnext.tests.host.test_api import latents
from comfyui_controlnext.tests.host.test_api import node as host_node
from comfyui_controlnext.tests.host.test_transformer_queue import TEXTS, make_control
from comfyui_controlnext.tests.page.test_workflows import SIZE, prompt, saved, shown
from comfyui_controlnext.tools.comfy_command import for_this_system
from comfyui_controlnext.tools.workflows import wan_graphs

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer

pytestmark = pytest.mark.comfy
FRAMES = 5
RECIPES = Path(__file__).parents[2] / "controlnext_training" / "recipes"
SMALL: dict[str, dict[str, Any]] = {
    "ControlNeXtSampleInputs": {"width": SIZE, "height": SIZE, "frames": FRAMES},
    "EmptyHunyuanLatentVideo": {"width": SIZE, "height": SIZE},
    "KSampler": {"steps": 3},  # uni_pc of one step makes none
    "UNETLoader": {"unet_name": "small_wan.pt"},
}
HINTED = ("wan_pose", "wan_depth")
"""Graphs whose hints are drawn; of *Wan video outpainting* the video itself is the hint."""
both = pytest.mark.parametrize("name", HINTED)


OWN = (wan_graphs.OWN_POSE, wan_graphs.OWN_DEPTH, wan_graphs.OWN_OUTPAINT)
PADDED = {
    "ImageScale": {"width": SIZE // 2, "height": SIZE},
    "ImagePadForOutpaint": {"left": SIZE // 4, "right": SIZE // 4},
}


def make_video(path: Path) -> Path:
    """Frames that brighten from left to right and from frame to frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=12, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(FRAMES):
            row = np.linspace(20, 120 + 20 * number, 96).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(np.broadcast_to(row[None, :, None], (64, 96, 3)).copy(), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def files(tiny: Any, pinned_host: bool) -> Iterator[None]:
    """A small base, and the files that the graphs name: an autoencoder and two controls. Removed afterwards."""
    models = tiny.models
    made = [
        make_small(models / "diffusion_models" / "small_wan.pt", "wan", pinned_host),
        make_vae(models / "vae" / wan_graphs.VAE.name, "wan"),
        *(make_control(models / "controlnext" / own, "wan") for own in OWN),
        make_video(tiny.base / "input" / wan_graphs.VIDEO),
    ]
    yield
    for path in made:
        path.unlink()


def small(name: str) -> dict[str, Any]:
    """The graph on a small base and a short clip; random texts, since the text encoder has billions of numbers."""
    graph = for_this_system(prompt(name))
    words = {"tokens": 7, "width": TEXTS["wan"]}
    for number, node in enumerate(graph.values()):
        new = (SMALL | (PADDED if name == "wan_outpaint" else {})).get(node["class_type"], {})
        node["inputs"] |= {key: value for key, value in new.items() if not isinstance(node["inputs"].get(key), list)}
        if node["class_type"] == "CLIPTextEncode":
            node |= {"class_type": "ControlNeXtTestPrompt", "inputs": {"seed": number, **words}}
    return {key: node for key, node in graph.items() if node["class_type"] != "CLIPLoader"}


def place(graph: dict[str, Any], kind: str) -> str:
    (found,) = (key for key, node in graph.items() if node["class_type"] == kind)
    return found


@both
def test_a_clip_has_as_many_frames_as_hints_and_the_control_acts(name: str, server: ComfyServer, files: None) -> None:
    graph = small(name)
    seen = len(server.log_lines())
    frames, fps = shown(saved(server, graph))
    assert (len(frames), fps) == (FRAMES, pytest.approx(wan_graphs.FPS))
    assert all(picture.size == (SIZE, SIZE) for picture in frames)
    said = "\n".join(server.log_lines()[seen:])
    assert "bundled in the control file" in said and "had no effect" not in said and "hints for" not in said
    graph["save"] = host_node("SaveLatent", samples=[place(graph, "KSampler"), 0], filename_prefix="latents/wan")
    for video in ("SaveVideo", "CreateVideo", "VAEDecode"):  # which may hide what is small
        del graph[place(graph, video)]
    controlled = latents(server, graph)
    graph[place(graph, "ControlNeXtApply")]["inputs"]["strength"] = 0.0
    without = latents(server, graph)
    assert controlled.shape == (1, 16, 1 + FRAMES // 4, SIZE // 8, SIZE // 8)
    assert all(relative(controlled[:, :, frame], without[:, :, frame]) > 0.001 for frame in range(controlled.shape[2]))


def test_outpainting_keeps_the_video_and_paints_around_it(server: ComfyServer, files: None) -> None:
    """The clip has the frames of the video; its middle stays, and its sides are sampled."""
    graph = small("wan_outpaint")
    painted, fps = shown(saved(server, graph))
    composite = graph[place(graph, "ImageCompositeMasked")]["inputs"]
    composite["source"] = composite["destination"]
    bare, _ = shown(saved(server, graph))
    assert (len(painted), fps, painted[0].size) == (FRAMES, pytest.approx(wan_graphs.FPS), (SIZE, SIZE))
    quarter = SIZE // 4
    for one, other in zip(painted, bare, strict=True):
        new, old = (np.asarray(picture, float) for picture in (one, other))
        away = np.abs(new - old).mean((0, 2))
        assert away[quarter + 4 : -quarter - 4].max() < 4 < min(away[:quarter].mean(), away[-quarter:].mean())
        assert np.abs(old[:, : quarter - 4] - 128).max() < 6, "gray where it paints"
    brighter = [np.asarray(picture, float)[:, SIZE // 2 : -quarter - 4].mean() for picture in bare]
    assert all(later > earlier + 2 for earlier, later in itertools.pairwise(brighter))


def test_outpainting_hears_its_hint_of_the_whole_size(server: ComfyServer, files: None) -> None:
    graph = small("wan_outpaint")
    graph["save"] = host_node("SaveLatent", samples=[place(graph, "KSampler"), 0], filename_prefix="latents/wan")
    for video in ("SaveVideo", "CreateVideo", "ImageCompositeMasked", "VAEDecode"):
        del graph[place(graph, video)]
    controlled = latents(server, graph)
    graph[place(graph, "ControlNeXtApply")]["inputs"]["strength"] = 0.0
    assert controlled.shape == (1, 16, 1 + FRAMES // 4, SIZE // 8, SIZE // 8)
    assert relative(controlled, latents(server, graph)) > 0.001
    applied = graph[place(graph, "ControlNeXtApply")]["inputs"]["image"]
    assert applied == [place(graph, "ImagePadForOutpaint"), 0]


@both
def test_the_graphs_are_of_the_hosts_own_nodes(name: str) -> None:
    graph = prompt(name)
    (load,) = (node for node in graph.values() if node["class_type"] == "CLIPLoader")
    assert load["inputs"]["type"] == "wan"
    count, length = place(graph, "GetImageSize"), graph[place(graph, "EmptyHunyuanLatentVideo")]["inputs"]["length"]
    assert length == [count, 2], "the clip is as long as its hints"
    shift = graph[place(graph, "ModelSamplingSD3")]["inputs"]
    assert shift["shift"] == 8.0 and shift["model"] == [place(graph, "ControlNeXtApply"), 0]
    frames = graph[place(graph, "ControlNeXtSampleInputs")]["inputs"]["frames"]
    assert frames % 4 == 1


def test_the_note_names_a_recipe_and_the_file_of_the_loader() -> None:
    """No control is shipped: who opens the graph reads first how to make one."""
    from comfyui_controlnext.controlnext_training.config_files import read_recipe
    from comfyui_controlnext.tests.page.test_workflows import page
    from comfyui_controlnext.tools.workflow_graph import NOTE

    for name, recipe in (("wan_pose", "wan_1_3b"), ("wan_depth", "wan_1_3b"), ("wan_outpaint", "wan_outpaint")):
        notes = [node["widgets_values"][0] for node in page(name)["nodes"] if node["type"] == NOTE]
        (note,) = (text for text in notes if recipe in text)
        graph = prompt(name)
        assert graph[place(graph, "ControlNeXtLoader")]["inputs"]["control_name"] in note
        assert (
            graph[place(graph, "UNETLoader")]["inputs"]["unet_name"] == read_recipe(RECIPES / f"{recipe}.toml")["base"]
        )
