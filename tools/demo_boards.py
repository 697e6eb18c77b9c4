"""Boards of the demo: its bases, the combinations of their controls, and the drawn hints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .demo_weights.shipped import (
    CHECKPOINT,
    PICTURE_DEPTH,
    PICTURE_EDGES,
    PICTURE_LORA,
    PICTURE_MASK,
    PICTURE_POSE,
    PICTUREBOOK,
    PRINTBOOK,
    XS,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

SEED = 5
HINTS = ("edges", "mask", "depth", "pose")
"""Names of the pictures in Hint, in their order there."""
SCENE_SEED = 99
"""Seed of scenes that were not used in training."""


@dataclass(frozen=True)
class Column:
    """Combination of controls. title: over its pictures; edges, mask, depth, pose, xs: strengths, 0 = not used."""

    title: str
    edges: float = 0.0
    mask: float = 0.0
    depth: float = 0.0
    pose: float = 0.0
    xs: float = 0.0
    lora: float = 0.0

    @property
    def file_name(self) -> str:
        return self.title.lower().replace(" + ", "_and_").replace(" ", "_").replace(".", "_")

    @property
    def words(self) -> str:
        """Description of controls and strength, such as "edges and mask, strength 1"."""
        used = {
            "edges": self.edges,
            "ControlNet-XS edges": self.xs,
            "mask": self.mask,
            "depth": self.depth,
            "pose": self.pose,
        }
        names = [name for name, strength in used.items() if strength]
        if not names:
            return "without control"
        return f"{' and '.join(names)}, strength {max(used.values()):g}{' and a LoRA' if self.lora else ''}"

    def given(self, hint: Hint) -> np.ndarray | None:
        """Picture given to the controls, (H, W, 3) bytes, if other than that of the row."""
        if self.depth:
            return hint.depth
        return hint.mask if self.mask else None

    def inputs(self) -> dict[str, tuple[float, str]]:
        """Kind of each used control -> its strength, and the name of its picture in Hint."""
        used = {
            "edges": (self.edges, "edges"),
            "xs": (self.xs, "edges"),
            "mask": (self.mask, "mask"),
            "depth": (self.depth, "depth"),
            "pose": (self.pose, "pose"),
        }
        return {kind: (strength, picture) for kind, (strength, picture) in used.items() if strength}


@dataclass(frozen=True)
class Board:
    """Board of one base of the demo: its part of the sheet."""

    name: str
    """Start of the names of its pictures."""
    title: str
    checkpoint: str
    scheme: str
    """Kind of the board's pictures, a key of controlnext_training.drawn.SCHEMES."""
    side: int
    """Side of a picture, in pixels."""
    steps: int
    scenes: tuple[int, ...]
    """Scene numbers, one per row."""
    columns: tuple[Column, ...]
    files: Mapping[str, str]
    """Kind of control, as in Column.inputs, or "lora" -> its file."""
    shown: str = "edges"
    """Name in Hint of the picture at the start of a row."""
    seed: int = SEED
    """Seed of the noise in the first row."""


PICTURE_FILES = {
    "edges": PICTURE_EDGES,
    "mask": PICTURE_MASK,
    "depth": PICTURE_DEPTH,
    "pose": PICTURE_POSE,
    "lora": PICTURE_LORA,
}
BOOK = Board(
    "picturebook",
    "A base of SD3's shape, and ControlNeXt for outlines, depth and masks",
    PICTUREBOOK,
    "picturebook",
    192,
    20,
    (4, 13, 103),
    (
        Column("without control"),
        Column("ControlNeXt 0.5", edges=0.5),
        Column("ControlNeXt 1.0", edges=1.0),
        Column("depth", depth=1.0),
        Column("mask 1.2", mask=1.2),
        Column("edges + depth", edges=0.6, depth=0.6),
        Column("with a LoRA", edges=1.0, lora=1.0),
    ),
    PICTURE_FILES,
)
CHILDREN = Board(
    "children",
    "The same base, and a ControlNeXt for poses",
    PICTUREBOOK,
    "children",
    192,
    20,
    (3, 9),
    (
        Column("without control"),
        Column("pose 0.5", pose=0.5),
        Column("pose 1.0", pose=1.0),
    ),
    PICTURE_FILES,
    shown="pose",
)
PRINT = Board(
    "print",
    "A fine-tune of that base, and the same ControlNeXts",
    PRINTBOOK,
    "picturebook",
    192,
    20,
    (4, 13),
    (
        Column("without control"),
        Column("ControlNeXt 1.0", edges=1.0),
        Column("depth", depth=1.0),
    ),
    PICTURE_FILES,
)
UNET_BOOK = Board(
    "picturebook_unet",
    "A base of SD1.5's shape, and a ControlNet-XS for outlines",
    CHECKPOINT,
    "picturebook",
    192,
    20,
    (4, 13),
    (
        Column("without control"),
        Column("ControlNet-XS 0.5", xs=0.5),
        Column("ControlNet-XS 1.0", xs=1.0),
    ),
    {"xs": XS},
)
BOARDS = (BOOK, PRINT, CHILDREN, UNET_BOOK)


@dataclass(frozen=True)
class Hint:
    """Hints of one row of the sheet; pictures are (H, W, 3) bytes."""

    caption: str
    edges: np.ndarray
    """Outlines of all things, with which the F1 is computed."""
    mask: np.ndarray
    """Mask of the things that the caption names, white on black."""
    depth: np.ndarray
    """Depth of everything in the scene; bright is near."""
    pose: np.ndarray
    """Pose of the people as sticks; black without people."""


def draw_hint(board: Board, index: int) -> Hint:
    """Draw the hints of an unseen scene."""
    from ..controlnext_training.drawn import SCHEMES

    scene = SCHEMES[board.scheme](SCENE_SEED, index, board.side)
    return Hint(scene.caption, *(scene.hint(name) for name in HINTS))


def hints_of(board: Board) -> dict[int, Hint]:
    """Hints of a board by row number."""
    return {row: draw_hint(board, index) for row, index in enumerate(board.scenes)}
