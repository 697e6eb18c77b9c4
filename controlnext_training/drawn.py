"""Dataset of pictures that the project draws itself, without files: `data = ["synthetic:edges:200"]`.

`synthetic` draws circles, squares and triangles, `picturebook` the illustrations of controlnext_core.picturebook,
`children` those with children in them, whose pose is a hint as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..controlnext_core import picturebook
from ..controlnext_core.picturebook import HINTS, PLANES, Picture
from .data.buckets import Fit
from .data.degraded import COMPUTED
from .data.outpainting import OUTPAINT, outpainting_hints
from .data.samples import PAIRED, DatasetError, Sample, Share, digest
from .synthetic import draw

SCHEMES: dict[str, Callable[[int, int, int], Picture]] = {
    "synthetic": draw,
    "children": picturebook.draw_children,
    "picturebook": picturebook.draw,
}
"""Name of a source -> function (seed, index, side) that draws a picture."""
HINTS_OF = {scheme: HINTS if scheme == "children" else PLANES for scheme in SCHEMES}
"""Name of a source -> names of its drawn hints."""


class DrawnDataset:
    """Pictures 0 to count - 1 of one scheme and seed, all of one size."""

    def __init__(self, scheme: str, name: str, count: int, side: int, hint: str = PAIRED, seed: int = 0) -> None:
        """scheme: a key of SCHEMES; name: the drawn hint that `paired` uses, of HINTS_OF; side: pixels; hint:

        `paired`, or a kind that is computed.
        """
        self.scheme, self.name, self.side, self.hint, self.seed = scheme, name, side, hint, seed
        self.sizes: Sequence[tuple[int, int]] = [(side, side)] * count
        self.fingerprint = digest(scheme, name, count, side, hint, seed)

    @functools.cached_property
    def captions(self) -> Sequence[str]:
        return [self._scene(index).caption for index in range(len(self))]

    def share(self, index: int) -> Share:
        """Implementation of `ControlDataset.share`."""
        return Share()

    def __len__(self) -> int:
        return len(self.sizes)

    def _scene(self, index: int) -> Picture:
        return SCHEMES[self.scheme](self.seed, index, self.side)

    def frame_keys(self, index: int, seed: int = 0, position: int = 0, variant: int = 0) -> tuple[str, ...]:
        return (digest(self.scheme, self.seed, index, self.side, self.name, self.hint),)

    def _computed(self, picture: Tensor, keys: tuple[str, ...]) -> Tensor:
        if self.hint == OUTPAINT:
            return outpainting_hints(picture[None], keys)[0]
        return torch.from_numpy(COMPUTED[self.hint](picture.numpy()))

    def load(self, index: int, seed: int = 0, position: int = 0) -> Sample:
        scene = self._scene(index)
        picture = _floats(scene.image)
        own = _floats(scene.hint(self.name))
        hint = own if self.hint == PAIRED else self._computed(picture, self.frame_keys(index))
        return Sample(
            frames=picture[None],
            hints=hint[None],
            caption=scene.caption,
            mask=torch.from_numpy(scene.mask)[None].float() / 255,
            original_size=(self.side, self.side),
            crop=(0, 0),
            frame_keys=self.frame_keys(index),
        )

    def place(self, index: int, variant: int = 0) -> Fit:
        """Implementation of `ControlDataset.place`."""
        return Fit((self.side,) * 2, (self.side,) * 2, (0, 0), (self.side,) * 2)

    def job(self, index: int, seed: int, position: int, whole: bool, variant: int = 0) -> Callable[[], Sample]:
        """Implementation of `ControlDataset.job`."""
        return lambda: self.load(index, seed, position)


def _floats(picture: np.ndarray) -> Tensor:
    """Convert (H, W, 3) bytes to floats in [0, 1]."""
    return torch.from_numpy(picture).float() / 255


def is_drawn(source: str) -> bool:
    """True: the data source is drawn by the project. False: it is read from files."""
    return source.partition(":")[0] in SCHEMES


def open_drawn(source: str, side: int, hint: str) -> DrawnDataset:
    """Open a source such as `synthetic:edges:200`, with an optional `:SEED`. Raises DatasetError."""
    scheme, *parts = source.split(":")
    if not (
        len(parts) in (2, 3)
        and parts[0] in HINTS_OF[scheme]
        and all(p.isdecimal() for p in parts[1:])
        and int(parts[1])
    ):
        raise DatasetError(
            f"data: {source!r} is not understood. Write {scheme}:HINT:COUNT, HINT one of {', '.join(HINTS_OF[scheme])}."
        )
    return DrawnDataset(scheme, parts[0], int(parts[1]), side, hint, int(parts[2]) if len(parts) == 3 else 0)
