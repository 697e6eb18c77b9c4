"""Nodes that cut a picture into tiles and merge them, for pictures too large for one pass."""

from __future__ import annotations

import torch

from ..controlnext_core.tiles import STEP, TileLayout, merge, split
from ._api import ControlNode, io

Layout = io.Custom("TILE_LAYOUT")


class ControlNeXtSplitTiles(ControlNode):
    """Node that cuts a picture of any size into overlapping tiles."""

    SEARCH = ("tile", "upscale", "super-resolution", "ultimate sd upscale", "controlnet")

    @classmethod
    def define_schema(cls) -> io.Schema:
        side = {"default": 1024, "min": 4 * STEP, "max": 8192, "step": STEP}
        return io.Schema(
            node_id="ControlNeXtSplitTiles",
            display_name="ControlNeXt Split into Tiles",
            category="ControlNeXt",
            description="Cuts a picture into overlapping tiles of a size that one pass can take, for a "
            "super-resolution or tile control. Merge Tiles puts the results together.",
            inputs=[
                io.Image.Input(
                    "image", tooltip="The picture, enlarged already to the size that the result shall have."
                ),
                io.Int.Input("width", **side, tooltip="Width of a tile in pixels; what the model was trained on."),
                io.Int.Input("height", **side, tooltip="Height of a tile in pixels; what the model was trained on."),
                io.Int.Input(
                    "overlap",
                    default=128,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Pixels that neighbours share at least. They are faded into each other over this width.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    tooltip="The tiles as one batch, row by row. Rebatch Images makes smaller batches of it, which are "
                    "sampled one after the other."
                ),
                Layout.Output(display_name="layout", tooltip="Places of the tiles, for Merge Tiles."),
            ],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, width: int, height: int, overlap: int) -> io.NodeOutput:
        return io.NodeOutput(*split(image, width, height, overlap))


class ControlNeXtMergeTiles(ControlNode):
    """Node that merges tiles into one picture."""

    SEARCH = ("tile", "upscale", "untile", "stitch", "super-resolution")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNeXtMergeTiles",
            display_name="ControlNeXt Merge Tiles",
            category="ControlNeXt",
            description="Puts tiles together to the picture that Split into Tiles has cut, each faded into its "
            "neighbours.",
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "tiles", tooltip="The sampled and decoded tiles: one batch, or batches one after the other."
                ),
                Layout.Input("layout", tooltip="Places of the tiles, from Split into Tiles."),
            ],
            outputs=[io.Image.Output(tooltip="The picture, of the size of the one that was cut.")],
        )

    @classmethod
    def execute(cls, tiles: list[torch.Tensor], layout: list[TileLayout]) -> io.NodeOutput:
        return io.NodeOutput(merge(tiles, layout[0]))
