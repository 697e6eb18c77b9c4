"""Tiles of a picture that is too large for one pass: cut with an overlap, merged over it.

All lengths are in pixels. The tiles of a side are evenly spaced, from edge to edge, so that neighbours share at least
the overlap. Where they share more, the seam is in the middle of the shared area.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEP = 16
"""Divisor of the sides of a tile: the side of a token of SD3 and Flux, and twice that of a latent cell."""


@dataclass(frozen=True)
class Line:
    """Tiles along one side of a picture. length: of the side; tile: of each tile; starts: their first pixels."""

    length: int
    tile: int
    overlap: int
    starts: tuple[int, ...]

    @property
    def padded(self) -> int:
        """Length of the side, padded to at least one tile."""
        return max(self.length, self.tile)

    def weights(self) -> Tensor:
        """Weights of the tiles' pixels in the merged picture, (tiles, tile); at each pixel of the side their sum is 1.

        Neighbours are blended by linear ramps as wide as the overlap, around the middle of the area they share.
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
        """Pairs of the starts of neighbouring tiles."""
        return list(zip(self.starts, self.starts[1:], strict=False))


@dataclass(frozen=True)
class TileLayout:
    """Positions of the tiles of a number of equal pictures, row by row."""

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
    """Cover a side with as few tiles as possible. A side shorter than a tile gets one, as long as the side in steps of
    `STEP`.

    name: of the tile's length, for messages. Raises ValueError for a tile that is not a multiple of `STEP`, and for an
    overlap of more than half a tile.
    """
    if tile < STEP or tile % STEP:
        raise ValueError(f"{name}: {tile} pixels are not a multiple of {STEP}. Set {max(tile // STEP, 1) * STEP}.")
    if not 0 <= overlap <= tile // 2:  # more would multiply the tiles, up to one for each pixel
        raise ValueError(f"overlap: {overlap} pixels are not within 0 and half of a tile of {tile}. Set {tile // 8}.")
    tile = min(tile, math.ceil(length / STEP) * STEP)
    if length <= tile:
        return Line(length, tile, min(overlap, tile - 1), (0,))
    steps = math.ceil((length - tile) / (tile - overlap))
    return Line(length, tile, overlap, tuple(round(step * (length - tile) / steps) for step in range(steps + 1)))


def split(pictures: Tensor, width: int, height: int, overlap: int) -> tuple[Tensor, TileLayout]:
    """Cut pictures (B, H, W, C) into tiles; returns (B * tiles, height, width, C), picture by picture, and the layout.

    Where a picture is smaller than a tile and not a multiple of `STEP`, its last row and column are repeated.
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
    """Merge the processed tiles, in batches (b, h, w, C) of any size; returns pictures (B, H, W, C) in fp32.

    Raises ValueError where their number or size differs from that of `split`.
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
