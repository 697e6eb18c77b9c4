"""Hints cut into tiles by packs that sample a large latent tile by tile.

Such a pack (ComfyUI-TiledDiffusion) scales the whole hint of a control as the host does, passes it through the
control's `preprocess_image`, cuts it, and leaves in the control's `cond_hint` one tile for each row of the coming
forward: the first tile of every chunk and latent, then the second of them all. Masks are cut with it, as its last
channel.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from comfy.utils import repeat_to_batch_size
from torch import Tensor

from ...injection import pool_to
from .hint_inputs import content_id

C = TypeVar("C")


@dataclass
class HintTiles:
    """Facts about a hint that is a set of tiles."""

    rows: tuple[int, ...]
    """Row of the hint for each row of a forward: the first one with its content."""
    forwards: int = 0
    """Number of forwards so far."""


@dataclass
class KnownTiles(Generic[C]):
    """Controls of the tiles of one run, found by the tensor that holds the tiles."""

    known: dict[int, tuple[weakref.ref[Tensor], C]] = field(default_factory=dict)

    def of(self, tiles: Tensor) -> C | None:
        """Control of these tiles; None: they are new."""
        reference, control = self.known.get(id(tiles), (None, None))
        return control if reference is not None and reference() is tiles else None

    def put(self, tiles: Tensor, control: C) -> None:
        """Keep a control for these tiles; those of tensors that no longer exist are dropped."""
        living = {key: entry for key, entry in self.known.items() if entry[0]() is not None}
        self.known = {**living, id(tiles): (weakref.ref(tiles), control)}


def fits(tiles: Any, channels: int, x: Tensor, ratio: int) -> bool:
    """True: `tiles` are a hint (rows, channels, ratio * H, ratio * W) for each row of the latent x (rows, c, H, W).

    False: they are none, or those of another latent.
    """
    if not isinstance(tiles, Tensor) or x.ndim != 4:
        return False
    return tuple(tiles.shape) == (len(x), channels, *(side * ratio for side in x.shape[-2:]))


def with_masks(hint: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
    """Hint (n, C, H, W) with the product of masks (m, 1, any, any) as a last channel: (max(n, m), C + 1, H, W).

    Without masks the hint is returned unchanged.
    """
    if not masks:
        return hint
    rows = max(len(hint), *map(len, masks))
    height, width = hint.shape[-2:]
    product = hint.new_ones(rows, 1, height, width)
    for mask in masks:
        product = product * repeat_to_batch_size(pool_to(mask.to(hint), (height, width)), rows)
    return torch.cat([repeat_to_batch_size(hint, rows), product], dim=1)


def parted(tiles: Tensor, masked: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Tiles of a hint and those of its masks, from what `with_masks` joined; copies on the CPU in fp32."""
    own = tiles.to("cpu", copy=True).float()
    return (own[:, :-1], (own[:, -1:].clamp(0, 1),)) if masked else (own, ())


def first_of_equals(hint: Tensor) -> tuple[int, ...]:
    """Index, for each row of a hint (n, C, H, W), of the first row with the same content: chunks share their tiles."""
    first: dict[str, int] = {}
    return tuple(first.setdefault(content_id([row]), number) for number, row in enumerate(hint))


def row_gains(gains: list[float], latents: int, rows: int) -> list[float]:
    """Gains of the rows of tiles. gains: one per chunk; latents: of a chunk; rows: of all tiles, chunks and latents.

    Where the rows do not fit, every row gets the largest gain.
    """
    of_tile = [gain for gain in gains for _ in range(latents)]
    return of_tile * (rows // len(of_tile)) if rows % len(of_tile) == 0 else [max(gains)] * rows
