"""Samples, the protocol of every dataset, and the errors of datasets.

# F frames (1 for a picture), H W height and width of the bucket in pixels
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from .buckets import Fit

PAIRED = "paired"
"""Kind of hint that is a separate picture; the other kinds are computed, see controlnext_core.hints."""


class DatasetError(ValueError):
    """Error for a dataset that cannot be used at all. The message names the source, what is wrong and what to do."""


class BrokenSample(ValueError):  # noqa: N818 - it says what is broken
    """Error for one sample that cannot be read, while others can. path: the file, why: the reason."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path, self.why = path, why

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.path, self.why)


class Broken(NamedTuple):
    """File that is left out, and the reason as a text."""

    path: str
    why: str


@dataclass(frozen=True, slots=True)
class Facts:
    """Content, size and length of one readable picture or video."""

    content: str
    """Hash of the file's bytes."""
    height: int
    width: int
    frames: int = 1
    times: tuple[int, ...] = ()
    """Presentation time of each video frame, in the stream's time base; empty: frames are counted from the start."""

    @property
    def size(self) -> tuple[int, int]:
        """Size (H, W) after the rotation stored in the file."""
        return self.height, self.width


class Share(NamedTuple):
    """Repeats, loss weight and crops of a source's samples."""

    repeats: int = 1
    """Uses of each sample in an epoch."""
    weight: float = 1.0
    """Factor on the loss of the samples."""
    crops: int = 1
    """Number of crops of each sample: the centre crop, and random ones."""
    flip: bool = False
    """True: each crop is mirrored in half of its uses. False: never."""

    @property
    def variants(self) -> int:
        """Number of variants (crops and their mirror images) of one sample; variant 0 is the centre crop."""
        return self.crops * (1 + self.flip)


@dataclass(frozen=True, slots=True)
class Sample:
    """Picture or clip for training; RGB float32 in [0, 1]."""

    frames: Tensor
    """Frames (F, H, W, 3); (0, H, W, 3) where only hint and mask were requested."""
    hints: Tensor
    """Hints (F, H, W, 3), cropped exactly as the frames."""
    caption: str
    mask: Tensor | None
    """Mask (F, H, W) in [0, 1] of the regions with extra loss weight; None without one. Zeros in a clip's reference
    frame, the first."""
    original_size: tuple[int, int]
    """Size (height, width) before resizing."""
    crop: tuple[int, int]
    """Offset (top, left) of the crop in the resized picture."""
    frame_keys: tuple[str, ...]
    """Keys per frame: content of picture, hint and mask, their crop and size. Equal keys give equal frames in any
    clip."""

    @property
    def key(self) -> str:
        """Content identity of the whole sample except its caption."""
        return self.frame_keys[0] if len(self.frame_keys) == 1 else digest(*self.frame_keys)


class ControlDataset(Protocol):
    """Dataset for training. Reading the same index, seed and position gives the same bits."""

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """Size (H, W) of every item's bucket."""

    @property
    def captions(self) -> Sequence[str]:
        """Captions of all items; empty for an item without one."""

    @property
    def fingerprint(self) -> str:
        """Content hash of the whole set, independent of the location of its files."""

    def __len__(self) -> int: ...

    def share(self, index: int) -> Share:
        """Repeats, loss weight and crops of the item's source."""

    def frame_keys(self, index: int, seed: int = 0, position: int = 0, variant: int = 0) -> tuple[str, ...]:
        """Frame keys as in `load(...).frame_keys`, without reading a picture, to look up encoded frames in a cache."""

    def load(self, index: int, seed: int = 0, position: int = 0) -> Sample:
        """Sample at one position of the run; a clip draws its reference frame from the position.

        Raises BrokenSample.
        """

    def place(self, index: int, variant: int = 0) -> Fit:
        """Original size, resize and crop of an item."""

    def job(self, index: int, seed: int, position: int, whole: bool, variant: int = 0) -> Callable[[], Sample]:
        """Function without arguments that reads as `load`. whole:

        True reads everything; False leaves `frames` empty where hint and mask do not need them.
        """


def digest(*parts: object) -> str:
    """Hash of a list of numbers and texts."""
    return hashlib.blake2b(json.dumps(parts, ensure_ascii=False).encode(), digest_size=16).hexdigest()


def first_line(error: Exception) -> str:
    """Message of an exception, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
