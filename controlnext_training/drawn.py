"""Scenes that the project draws itself, as a dataset without files: `data = ["synthetic:edges:200"]`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..controlnext_core.hints import HINTS
from .data.samples import PAIRED, DatasetError, Sample, digest
from .synthetic import HINTS as DRAWN_HINTS
from .synthetic import Scene, draw

SCHEME = "synthetic"


class DrawnDataset:
    """Scene after scene of one seed, all of one size."""

    def __init__(self, name: str, count: int, side: int, hint: str = PAIRED, seed: int = 0) -> None:
        """name: which hint of a scene is its own, a key of synthetic.HINTS; side: pixels; hint: `paired` for that one,
        or a kind that is computed."""
        self.name, self.side, self.hint, self.seed = name, side, hint, seed
        self.sizes: Sequence[tuple[int, int]] = [(side, side)] * count
        self.fingerprint = digest(SCHEME, name, count, side, hint, seed)

    @functools.cached_property
    def captions(self) -> Sequence[str]:
        return [self._scene(index).caption for index in range(len(self))]

    def __len__(self) -> int:
        return len(self.sizes)

    def _scene(self, index: int) -> Scene:
        return draw(self.seed, index, self.side)

    def frame_keys(self, index: int, seed: int = 0, position: int = 0) -> tuple[str, ...]:
        return (digest(SCHEME, self.seed, index, self.side, self.name, self.hint),)

    def load(self, index: int, seed: int = 0, position: int = 0) -> Sample:
        scene = self._scene(index)
        picture = _floats(scene.image)
        own = _floats(scene.hint(self.name))
        hint = own if self.hint == PAIRED else torch.from_numpy(HINTS[self.hint](picture.numpy()))
        return Sample(
            frames=picture[None],
            hints=hint[None],
            caption=scene.caption,
            mask=torch.from_numpy(scene.mask)[None].float() / 255,
            original_size=(self.side, self.side),
            crop=(0, 0),
            frame_keys=self.frame_keys(index),
        )


def _floats(picture: np.ndarray) -> Tensor:
    """(H, W, 3) bytes -> floats in [0, 1]."""
    return torch.from_numpy(picture).float() / 255


def is_synthetic(source: str) -> bool:
    """True: the data source is drawn by the project. False: it is read from files."""
    return source.partition(":")[0] == SCHEME


def open_drawn(source: str, side: int, hint: str) -> DrawnDataset:
    """`synthetic:edges:200`, with `:SEED` where wanted. Raises DatasetError."""
    parts = source.split(":")[1:]
    if not (
        len(parts) in (2, 3) and parts[0] in DRAWN_HINTS and all(p.isdecimal() for p in parts[1:]) and int(parts[1])
    ):
        raise DatasetError(
            f"data: {source!r} is not understood. Write {SCHEME}:HINT:COUNT, HINT one of {', '.join(DRAWN_HINTS)}."
        )
    return DrawnDataset(parts[0], int(parts[1]), side, hint, int(parts[2]) if len(parts) == 3 else 0)
