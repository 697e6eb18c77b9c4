"""Hint nodes in the real host: their schema, batches, masks, cancelling, and a run through the server."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from comfyui_controlnext.controlnext_core.hints import HINTS
from comfyui_controlnext.tools.comfy_client import PromptError
from PIL import Image

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer

pytestmark = pytest.mark.comfy
ROOT = Path(__file__).resolve().parents[2]
ASTRONAUT = ROOT / "demo" / "astronaut.jpg"
PUBLISHED = {
    "canny": ("ControlNeXtHintCanny", {"low_threshold": 100, "high_threshold": 200}),
    "soft_edge": ("ControlNeXtHintSoftEdge", {"width": 1.0, "sensitivity": 1.0}),
    "lines": ("ControlNeXtHintLines", {"min_length": 5.0, "thickness": 1}),
    "blur": ("ControlNeXtHintBlur", {"size": 8, "style": "blur"}),
    "mask": ("ControlNeXtHintMask", {"mask": None, "invert": False}),
    "gray": ("ControlNeXtHintGray", {}),
}
"""Name of the hint -> id, and inputs with their defaults, that shared workflows depend on."""


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Parts of the photograph, (3, 128, 96, 3)."""
    whole = torch.from_numpy(np.asarray(Image.open(ASTRONAUT)) / np.float32(255))
    return torch.stack([whole[y : y + 128, x : x + 96] for y, x in ((0, 150), (180, 60), (300, 300))])


def node(kind: str) -> Any:
    from comfyui_controlnext.nodes import NODE_CLASS_MAPPINGS

    return NODE_CLASS_MAPPINGS[PUBLISHED[kind][0]]


@pytest.mark.parametrize("kind", HINTS)
def test_ids_inputs_and_defaults_are_the_public_ones(kind: str) -> None:
    name, defaults = PUBLISHED[kind]
    schema = node(kind).define_schema()
    assert schema.node_id == name and schema.category == "ControlNeXt/hints"
    first, *others = schema.inputs
    assert first.id == "image" and first.io_type == "IMAGE"
    assert {entry.id: getattr(entry, "default", None) for entry in others} == defaults
    assert [entry.io_type for entry in schema.outputs] == ["IMAGE"]
    assert all(port.tooltip for port in (*schema.inputs, *schema.outputs)) and schema.description


@pytest.mark.parametrize("kind", HINTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_batch_gives_the_hint_of_each_image(kind: str, dtype: torch.dtype, images: torch.Tensor) -> None:
    batch = images.to(dtype)
    (hints,) = node(kind).execute(batch, **PUBLISHED[kind][1]).result
    assert hints.shape == (3, 128, 96, 3) and hints.dtype == torch.float32
    for image, hint in zip(batch, hints, strict=True):
        assert torch.equal(hint, torch.from_numpy(HINTS[kind](image.float().numpy())))


@pytest.mark.parametrize(
    ("kind", "settings", "arguments"),
    [
        ("canny", {"low_threshold": 20, "high_threshold": 60}, (20, 60)),
        ("soft_edge", {"width": 2.0, "sensitivity": 0.5}, (2.0, 0.5)),
        ("lines", {"min_length": 20.0, "thickness": 3}, (20.0, 3)),
        ("blur", {"size": 16, "style": "tile"}, (16, "tile")),
        ("mask", {"invert": True}, (None, True)),
    ],
)
def test_settings_reach_the_drawing(
    kind: str, settings: dict[str, Any], arguments: tuple[Any, ...], images: torch.Tensor
) -> None:
    (hints,) = node(kind).execute(images[:1], **settings).result
    drawn = HINTS[kind](images[0].numpy(), *arguments)
    assert np.array_equal(hints[0].numpy(), drawn)
    assert not np.array_equal(drawn, HINTS[kind](images[0].numpy()))


def test_masks_are_one_for_all_or_one_for_each(images: torch.Tensor) -> None:
    masks = torch.zeros(3, 128, 96)
    for number in range(3):
        masks[number, : 30 * (number + 1)] = 1
    for given in (masks, masks[1:2], masks[1]):
        (hints,) = node("mask").execute(images, given).result
        assert torch.equal(hints, given.expand(3, 128, 96)[..., None].expand(-1, -1, -1, 3))
    with pytest.raises(ValueError, match="mask: has 2 masks for 3 images. Give one, or one for each image"):
        node("mask").execute(images, masks[:2])
    with pytest.raises(ValueError, match="leave the mask unconnected"):
        node("mask").execute(images, torch.zeros(1, 64, 64))


def test_gray_and_transparent_batches_are_taken(images: torch.Tensor) -> None:
    with_alpha = torch.cat([images, images.mean(-1, keepdim=True).round()], dim=-1)
    for kind in HINTS:
        assert node(kind).execute(images[..., :1], **PUBLISHED[kind][1]).result[0].shape == images.shape
        (hints,) = node(kind).execute(with_alpha, **PUBLISHED[kind][1]).result
        same = torch.equal(hints, node(kind).execute(images, **PUBLISHED[kind][1]).result[0])
        assert same == (kind != "mask")


def test_cancelling_stops_between_two_images(images: torch.Tensor) -> None:
    import comfy.model_management as management
    from comfyui_controlnext.nodes.hint_images import draw_batch

    drawn = []

    def draw(number: int, image: np.ndarray) -> np.ndarray:
        drawn.append(number)
        if number == 1:
            management.interrupt_current_processing()
        return image

    with pytest.raises(management.InterruptProcessingException):
        draw_batch(images, draw)
    assert drawn == [0, 1]
    assert draw_batch(images, lambda _, image: image).result[0].equal(images), "the next run is not hurt"


def photograph() -> bytes:
    """Photograph as a PNG: decoders of JPEG differ by a step of 255, and hosts have changed theirs."""
    stream = io.BytesIO()
    Image.open(ASTRONAUT).save(stream, "PNG")
    return stream.getvalue()


def workflow(server: "ComfyServer", kind: str, **settings: Any) -> dict[str, dict[str, Any]]:
    """Workflow: load the photograph, draw, preview."""
    name, defaults = PUBLISHED[kind]
    inputs = {key: value for key, value in defaults.items() if value is not None} | settings
    return {
        "load": {"class_type": "LoadImage", "inputs": {"image": server.upload_image(photograph(), "photograph.png")}},
        "draw": {"class_type": name, "inputs": {"image": ["load", 0], **inputs}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["draw", 0]}},
    }


@pytest.mark.parametrize("kind", HINTS)
def test_the_server_draws_what_the_function_draws(kind: str, server: "ComfyServer") -> None:
    (entry,) = server.run(workflow(server, kind)).outputs["show"]["images"]
    shown = np.asarray(Image.open(io.BytesIO(server.image(entry))))
    drawn = HINTS[kind](np.asarray(Image.open(ASTRONAUT)) / np.float32(255))
    assert np.array_equal(shown, (255 * drawn).clip(0, 255).astype(np.uint8))


def test_wrong_values_are_told_on_the_node(server: "ComfyServer") -> None:
    with pytest.raises(PromptError) as refusal:
        server.queue(workflow(server, "blur", style="box"))
    assert "style: 'box' is not one of blur, tile" in refusal.value.node_errors["draw"]
    with pytest.raises(PromptError, match="low_threshold: 300 must be 0 or more and not above high_threshold, 200"):
        server.run(workflow(server, "canny", low_threshold=300))


def test_the_interrupt_button_ends_a_long_batch(server: "ComfyServer") -> None:
    graph = workflow(server, "soft_edge")
    graph["repeat"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["load", 0], "amount": 64}}
    graph["draw"]["inputs"]["image"] = ["repeat", 0]

    def stop(kind: str, data: dict[str, Any]) -> None:
        if kind == "executing" and data.get("node") == "draw":
            server.interrupt()

    with pytest.raises(PromptError, match="interrupted at node draw"):
        server.run(graph, on_event=stop, timeout=30)
