"""Tiles of a picture that is too large for one pass: cut with an overlap, merged over it.

All lengths are in pixels. The tiles of a side stand at even distances, from edge to edge, so that neighbours share at
least the overlap. Where they share more, the seam lies in the middle of what they share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEP = 16
"""Sides of a tile are multiples of it: that of a token of SD3 and Flux, and of twice a latent's cell."""


@dataclass(frozen=True)
class Line:
    """Tiles along one side of a picture. length: of the side; tile: of each tile; starts: their first pixels."""

    length: int
    tile: int
    overlap: int
    starts: tuple[int, ...]

    @property
    def padded(self) -> int:
        """Length of the side with what a short one is filled up by."""
        return max(self.length, self.tile)

    def weights(self) -> Tensor:
        """Weights of the tiles' pixels in the merged picture, (tiles, tile); at each pixel of the side their sum is 1.

        A tile counts where its own ramp has risen and the next one's has not: ramps as wide as the overlap, linear,
        around the middle of what two neighbours share.
        """
        middles = torch.tensor([(after + before + self.tile) / 2 for before, after in self.neighbours])
        pixels = torch.arange(self.padded) + 0.5
        rises = ((pixels - middles[:, None]) / max(self.overlap, 1e-3) + 0.5).clamp(0, 1)
        whole, none = torch.ones(1, self.padded), torch.zeros(1, self.padded)
        shares = torch.cat([whole, rises]) - torch.cat([rises, none])
        cut = [share[start : start + self.tile] for share, start in zip(shares, self.starts, strict=True)]
        return torch.stack(cut)

    @property
    def neighbours(self) -> list[tuple[int, int]]:
        """Starts of each two tiles that follow each other."""
        return list(zip(self.starts, self.starts[1:], strict=False))


@dataclass(frozen=True)
class TileLayout:
    """Places of the tiles of each of a number of equal pictures, row by row."""

    pictures: int
    down: Line
    across: Line

    @property
    def places(self) -> list[tuple[int, int]]:
        """(row, column) of the tiles of a picture, in their order."""
        return [(row, column) for row in range(len(self.down.starts)) for column in range(len(self.across.starts))]

    @property
    def count(self) -> int:
        """Number of tiles of all pictures."""
        return self.pictures * len(self.places)


def line(length: int, tile: int, overlap: int, name: str = "tile") -> Line:
    """As few tiles as cover a side. A side shorter than a tile gets one, as long as the side in steps of `STEP`.

    name: of the tile's length, for messages. Raises ValueError for a tile that is no multiple of `STEP`, and for an
    overlap of more than half a tile.
    """
    if tile < STEP or tile % STEP:
        raise ValueError(f"{name}: {tile} pixels are no multiple of {STEP}. Set {max(tile // STEP, 1) * STEP}.")
    if not 0 <= overlap <= tile // 2:  # more would multiply the tiles, up to one for each pixel
        raise ValueError(f"overlap: {overlap} pixels are not within 0 and half of a tile of {tile}. Set {tile // 8}.")
    tile = min(tile, math.ceil(length / STEP) * STEP)
    if length <= tile:
        return Line(length, tile, min(overlap, tile - 1), (0,))
    steps = math.ceil((length - tile) / (tile - overlap))
    return Line(length, tile, overlap, tuple(round(step * (length - tile) / steps) for step in range(steps + 1)))


def split(pictures: Tensor, width: int, height: int, overlap: int) -> tuple[Tensor, TileLayout]:
    """Cut pictures (B, H, W, C) into tiles; return (B * tiles, height, width, C), picture by picture, and the layout.

    Where a picture is smaller than a tile and no multiple of `STEP`, its last row and column are repeated.
    """
    rows, columns = pictures.shape[1:3]
    down, across = line(rows, height, overlap, "height"), line(columns, width, overlap, "width")
    layout = TileLayout(len(pictures), down, across)
    inside = [torch.arange(side.padded).clamp(max=side.length - 1) for side in (down, across)]
    whole = pictures[:, inside[0]][:, :, inside[1]]
    tiles = [
        whole[:, top : top + down.tile, left : left + across.tile] for top in down.starts for left in across.starts
    ]
    return torch.stack(tiles, dim=1).flatten(0, 1), layout


def merge(tiles: Sequence[Tensor], layout: TileLayout) -> Tensor:
    """Merge what became of the tiles, in batches (b, h, w, C) of any number; return pictures (B, H, W, C) in fp32.

    Raises ValueError where they are not as many, or not as large, as `split` made.
    """
    found = sum(map(len, tiles))
    if found != layout.count:
        raise ValueError(f"tiles: there are {found}, and the layout has {layout.count}. Give the result for each tile.")
    down, across = layout.down, layout.across
    weights = down.weights()[:, None, :, None, None] * across.weights()[None, :, None, :, None]
    made = torch.zeros(layout.pictures, down.padded, across.padded, tiles[0].shape[-1])
    for number, tile in enumerate(tile for batch in tiles for tile in batch):
        if tile.shape[:2] != (down.tile, across.tile):
            height, width = tile.shape[:2]
            raise ValueError(
                f"tiles: number {number + 1} is {width} x {height}, and it was cut {across.tile} x {down.tile}. Give "
                "results of the size of the tiles; enlarge the picture before it is cut."
            )
        picture, place = divmod(number, len(layout.places))
        row, column = layout.places[place]
        top, left = down.starts[row], across.starts[column]
        made[picture, top : top + down.tile, left : left + across.tile] += tile.float().cpu() * weights[row, column]
    return made[:, : down.length, : across.length]
