"""Nodes that draw hints from pictures, on top of `controlnext_core.hints`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch

from ..controlnext_core.hints import HINTS, edges, tones
from ._api import ControlNode, io, wrong_choice


def draw_batch(images: torch.Tensor, draw: Callable[[int, Any], Any]) -> io.NodeOutput:
    """Draw one hint per image. images: (B, H, W, C); draw: (number, image as an array) -> (H, W, 3).

    Stops between images where the user cancels the run.
    """
    hints = torch.empty((*images.shape[:3], 3))
    for number, image in enumerate(images):
        comfy.model_management.throw_exception_if_processing_interrupted()
        hints[number] = torch.from_numpy(draw(number, image.float().cpu().numpy()))
    return io.NodeOutput(hints)


def hint_schema(kind: str, name: str, description: str, inputs: list[Any], output: str) -> io.Schema:
    """Schema shared by the hint nodes: an image in, a hint out."""
    return io.Schema(
        node_id=f"ControlNeXtHint{kind}",
        display_name=f"ControlNeXt {name} Hint",
        category="ControlNeXt/hints",
        description=description,
        inputs=[io.Image.Input("image", tooltip="The picture, or a batch, such as the frames of a video."), *inputs],
        outputs=[io.Image.Output(tooltip=f"{output} One per image, of the same size.")],
    )


class ControlNeXtHintCanny(ControlNode):
    """Hint node for thin edges (Canny)."""

    SEARCH = ("canny", "edges", "preprocessor", "controlnet")

    @classmethod
    def define_schema(cls) -> io.Schema:
        thresholds = {"min": 0, "max": 1000, "step": 1}
        return hint_schema(
            "Canny",
            "Canny",
            "Draws thin white edges, as controls for Canny were trained on.",
            [
                io.Int.Input(
                    "low_threshold",
                    default=edges.CANNY_LOW,
                    **thresholds,
                    tooltip="Edges go on down to this contrast. Lower: edges are longer.",
                ),
                io.Int.Input(
                    "high_threshold",
                    default=edges.CANNY_HIGH,
                    **thresholds,
                    tooltip="Edges begin at this contrast. Lower: more edges. ControlNet-XS was trained with 50 to 100 "
                    "for low and 200 to 350 for high.",
                ),
            ],
            "White edges on black.",
        )

    @classmethod
    def execute(cls, image: torch.Tensor, low_threshold: int, high_threshold: int) -> io.NodeOutput:
        return draw_batch(image, lambda _, picture: HINTS["canny"](picture, low_threshold, high_threshold))


class ControlNeXtHintSoftEdge(ControlNode):
    """Hint node for soft outlines, without a network."""

    SEARCH = ("hed", "soft edge", "edges", "preprocessor", "controlnet")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return hint_schema(
            "SoftEdge",
            "Soft Edge",
            "Draws soft outlines from the gradient of the picture, for controls of the HED or soft edge kind. Needs no "
            "model, and knows less of objects than one.",
            [
                io.Float.Input(
                    "width",
                    default=edges.EDGE_WIDTH,
                    min=0.25,
                    max=16.0,
                    step=0.05,
                    tooltip="Width of the outlines; 1 draws about 4 pixels. Larger: broader, and less detail.",
                ),
                io.Float.Input(
                    "sensitivity",
                    default=edges.EDGE_SENSITIVITY,
                    min=0.05,
                    max=10.0,
                    step=0.05,
                    tooltip="2 draws edges of half the contrast as bright as 1 draws those of the whole.",
                ),
            ],
            "Outlines from black to white.",
        )

    @classmethod
    def execute(cls, image: torch.Tensor, width: float, sensitivity: float) -> io.NodeOutput:
        return draw_batch(image, lambda _, picture: HINTS["soft_edge"](picture, width, sensitivity))


class ControlNeXtHintLines(ControlNode):
    """Hint node for straight lines."""

    SEARCH = ("lineart", "sketch", "edges", "preprocessor", "controlnet")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return hint_schema(
            "Lines",
            "Lines",
            "Draws the straight edges of the picture as lines, for controls of the M-LSD kind: rooms, buildings.",
            [
                io.Float.Input(
                    "min_length",
                    default=edges.LINE_MIN_LENGTH,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip="Leaves out lines that are shorter; percent of the shorter side of the picture.",
                ),
                io.Int.Input(
                    "thickness",
                    default=edges.LINE_THICKNESS,
                    min=1,
                    max=64,
                    tooltip="Thickness of the drawn lines in pixels.",
                ),
            ],
            "White lines on black.",
        )

    @classmethod
    def execute(cls, image: torch.Tensor, min_length: float, thickness: int) -> io.NodeOutput:
        return draw_batch(image, lambda _, picture: HINTS["lines"](picture, min_length, thickness))


class ControlNeXtHintBlur(ControlNode):
    """Hint node that removes detail (blur or tile)."""

    SEARCH = ("tile", "upscale", "preprocessor", "controlnet")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return hint_schema(
            "Blur",
            "Blur",
            "Takes the detail out of the picture, for controls of the blur or tile kind, which put detail in.",
            [
                io.Int.Input(
                    "size", default=tones.BLUR_SIZE, min=1, max=256, tooltip="Detail up to this many pixels goes."
                ),
                io.Combo.Input(
                    "style",
                    options=list(tones.BLUR_STYLES),
                    default=tones.BLUR_STYLES[0],
                    tooltip="blur: a Gaussian. tile: scaled down by this size and up again.",
                ),
            ],
            "The picture without detail.",
        )

    @classmethod
    def validate_inputs(cls, style: str = tones.BLUR_STYLES[0]) -> bool | str:
        return wrong_choice(style=(style, tones.BLUR_STYLES)) or True

    @classmethod
    def execute(cls, image: torch.Tensor, size: int, style: str) -> io.NodeOutput:
        return draw_batch(image, lambda _, picture: HINTS["blur"](picture, size, style))


class ControlNeXtHintMask(ControlNode):
    """Hint node for foreground and background."""

    SEARCH = ("segmentation", "silhouette", "preprocessor", "controlnet")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return hint_schema(
            "Mask",
            "Mask",
            "Draws the foreground white on black: from a mask, else from the picture's alpha channel, else what is "
            "bright in it.",
            [
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="One for all images or one for each, of their size; white from 0.5 on. The mask of Load "
                    "Image is white where the file is transparent: switch invert on.",
                ),
                io.Boolean.Input("invert", default=False, optional=True, tooltip="Exchanges white and black."),
            ],
            "White foreground on black.",
        )

    @classmethod
    def execute(cls, image: torch.Tensor, mask: torch.Tensor | None = None, invert: bool = False) -> io.NodeOutput:
        given = None if mask is None else mask.float().cpu().reshape(-1, *mask.shape[-2:]).numpy()
        if given is not None and len(given) not in (1, len(image)):
            raise ValueError(f"mask: has {len(given)} masks for {len(image)} images. Give one, or one for each image.")

        def draw(number: int, picture: Any) -> Any:
            return HINTS["mask"](picture, None if given is None else given[number % len(given)], invert)

        return draw_batch(image, draw)


class ControlNeXtHintGray(ControlNode):
    """Hint node for luminance."""

    SEARCH = ("grayscale", "recolor", "preprocessor", "controlnet")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return hint_schema(
            "Gray",
            "Gray",
            "Takes the colour out of the picture, for controls that colour gray pictures or keep their light.",
            [],
            "The luminance in three equal channels.",
        )

    @classmethod
    def execute(cls, image: torch.Tensor) -> io.NodeOutput:
        return draw_batch(image, lambda _, picture: HINTS["gray"](picture))
