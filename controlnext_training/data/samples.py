"""Samples, the protocol of every dataset, and its errors.

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
"""The kind of hint that is a picture of its own; the other kinds are computed, see controlnext_core.hints."""


class DatasetError(ValueError):
    """A dataset that cannot be used at all. The message names the source, what is wrong and what to do."""


class BrokenSample(ValueError):  # noqa: N818 - it says what is broken
    """One sample that cannot be read; the others can. path: the file, why: the reason."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path, self.why = path, why

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.path, self.why)


class Broken(NamedTuple):
    """A file that is left out, and the reason in words."""

    path: str
    why: str


@dataclass(frozen=True, slots=True)
class Facts:
    """Content, size and length of one readable picture or video."""

    content: str
    """Hash of its bytes."""
    height: int
    width: int
    frames: int = 1
    times: tuple[int, ...] = ()
    """Presentation time of each video frame, in the stream's time base; empty: frames are counted from the start."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) after the rotation that the file asks for."""
        return self.height, self.width


class Share(NamedTuple):
    """Repeats, loss weight and cuts of a source's samples."""

    repeats: int = 1
    """Uses of each of its samples in an epoch."""
    weight: float = 1.0
    """Factor on the loss of its samples."""
    crops: int = 1
    """Crops of each sample: the plain one, and drawn ones."""
    flip: bool = False
    """True: each crop is mirrored in half of its uses."""

    @property
    def variants(self) -> int:
        """Number of cuts of one sample; cut 0 is the plain one."""
        return self.crops * (1 + self.flip)


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture or clip as the trainer takes it; RGB float32 in [0, 1]."""

    frames: Tensor
    """Frames (F, H, W, 3); (0, H, W, 3) where only hint and mask were requested."""
    hints: Tensor
    """(F, H, W, 3), cut exactly as the frames."""
    caption: str
    mask: Tensor | None
    """(F, H, W) in [0, 1], where the loss weighs more; or None. Zeros in a clip's reference frame, its first."""
    original_size: tuple[int, int]
    """(height, width) before resizing."""
    crop: tuple[int, int]
    """(top, left) of the cut in the resized picture."""
    frame_keys: tuple[str, ...]
    """Per frame: content of picture, hint and mask, their cut and size. Equal keys give equal frames in any clip."""

    @property
    def key(self) -> str:
        """Content identity of the whole sample except its caption."""
        return self.frame_keys[0] if len(self.frame_keys) == 1 else digest(*self.frame_keys)


class ControlDataset(Protocol):
    """A dataset that can be trained on. Reading the same index, seed and position gives the same bits."""

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """(H, W) of every item: its bucket."""

    @property
    def captions(self) -> Sequence[str]:
        """Captions of all items; empty where an item has none."""

    @property
    def fingerprint(self) -> str:
        """Content identity of the whole set, the same wherever its files lie."""

    def __len__(self) -> int: ...

    def share(self, index: int) -> Share:
        """Repeats, loss weight and cuts of the item's source."""

    def frame_keys(self, index: int, seed: int = 0, position: int = 0, variant: int = 0) -> tuple[str, ...]:
        """`load(...).frame_keys` without reading a picture, to look up encoded frames in a cache."""

    def load(self, index: int, seed: int = 0, position: int = 0) -> Sample:
        """The sample at one position of the run; a clip draws its reference frame from the position.

        Raises BrokenSample.
        """

    def place(self, index: int, variant: int = 0) -> Fit:
        """Original size, resize and crop of an item."""

    def job(self, index: int, seed: int, position: int, whole: bool, variant: int = 0) -> Callable[[], Sample]:
        """Call that does what `load` does; whole: False leaves `frames` empty where hint and mask do without them."""


def digest(*parts: object) -> str:
    """Identity of a list of numbers and texts."""
    return hashlib.blake2b(json.dumps(parts, ensure_ascii=False).encode(), digest_size=16).hexdigest()


def first_line(error: Exception) -> str:
    """Message of an exception, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
