"""Reading of one sample from its files: decoded, cropped, its hint computed where it has no hint file."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .buckets import Fit, variant_of
from .clips import Clip, Frames
from .degraded import COMPUTED
from .outpainting import HINT_KINDS, OUTPAINT, outpainting_hints
from .pictures import BLACK, WHITE, Picture, cut, luminance
from .samples import PAIRED, BrokenSample, DatasetError, Sample, Share
from .video_frames import REFERENCES, chosen_frames, region

MASKS = ("auto", "alpha", "none")
"""Sources of loss regions. auto: mask files; alpha: mask files, else the pictures' alpha; none: no regions."""
CUT_VERSION = 1
"""Version of the pixels, a part of every key: raise it when the same file gives other values."""


@dataclass(frozen=True, slots=True)
class Item:
    """Sample before it is read."""

    clip: Clip
    start: int
    fit: Fit
    share: Share = Share()


@dataclass(frozen=True, slots=True)
class Reading:
    """Rules for making samples from files."""

    hint: str = PAIRED
    mask: str = "auto"
    clip_frames: int = 1
    clip_stride: int = 1
    reference: str = "random"

    def variant(self, item: Item, number: int) -> Item:
        """Item with the crop of that number; 0: the item's first crop."""
        if not number:
            return item
        return replace(item, fit=variant_of(item.fit, item.clip.images.content(0), number, item.share.flip))

    def __post_init__(self) -> None:
        for name, allowed in (("hint", HINT_KINDS), ("mask", MASKS), ("reference", REFERENCES)):
            if getattr(self, name) not in allowed:
                raise DatasetError(f"{name}: {getattr(self, name)!r} is unknown. Choose one of {', '.join(allowed)}.")
        if self.clip_frames < 1 or self.clip_stride < 1:
            raise DatasetError("clip_frames, clip_stride: must be 1 or more.")

    def hint_identity(self) -> str:
        """Kind of hint with, where it is computed, the parameters of the function."""
        return f"{self.hint}{inspect.signature(COMPUTED[self.hint])}" if self.hint in COMPUTED else self.hint

    def chosen(self, item: Item, seed: int, position: int, reference: str = "") -> tuple[int, ...]:
        """Frame numbers of an item at a position of the run. reference: replaces the setting of that name."""
        first = reference or self.reference
        return chosen_frames(item.start, item.clip.count, self.clip_frames, self.clip_stride, first, seed, position)


@dataclass(frozen=True, slots=True)
class Request:
    """Request to read a sample, made by calling it. It is small and can be sent to another process."""

    item: Item
    reading: Reading
    numbers: tuple[int, ...]
    """Frames of the item's clip."""
    keys: tuple[str, ...]
    whole: bool = True
    """True: everything. False: only the hint and the mask, and pictures only where these are made from them."""

    def __call__(self) -> Sample:
        """Read the sample. Raises BrokenSample."""
        item, numbers = self.item, self.numbers
        clip, where = item.clip, item.fit
        pictures = _read(clip.images, numbers, where.original) if self._opens_pictures() else []
        frames = [cut(picture.over(WHITE), where, smooth=True) for picture in pictures]
        masks = self._masks(pictures)
        if clip.hints is not None:
            read = clip.hints.read(numbers)
            hints = [cut(picture.over(BLACK), where, smooth=False) for picture in read]
        elif self.reading.hint == OUTPAINT:
            hints = list(outpainting_hints(_stack(frames), self.keys).numpy())
        else:
            alphas = [None if p.alpha is None else cut(p.alpha, where, smooth=False) for p in pictures]
            hints = [self._computed(f, a if m is None else m) for f, a, m in zip(frames, alphas, masks, strict=True)]
        held = [mask for mask in masks if mask is not None]
        weighed = region(_stack(held), self.reading.reference) if held and self.reading.mask != "none" else None
        stacked = _stack(frames) if frames else torch.zeros(0, *where.size, 3)
        return Sample(stacked, _stack(hints), clip.caption, weighed, where.original, where.seen_crop, self.keys)

    def _opens_pictures(self) -> bool:
        clip = self.item.clip
        return self.whole or clip.hints is None or (clip.masks is None and self.reading.mask == "alpha")

    def _masks(self, pictures: Sequence[Picture]) -> list[np.ndarray | None]:
        """Mask (H, W) per frame, or None for all: from mask files, else from alpha if the setting uses it."""
        item, numbers = self.item, self.numbers
        if item.clip.masks is not None:
            read = item.clip.masks.read(numbers)
            return [cut(luminance(picture), item.fit, smooth=False) for picture in read]
        if self.reading.mask != "alpha" or all(picture.alpha is None for picture in pictures):
            return [None] * len(numbers)
        opaque = np.ones(item.fit.original, np.float32)
        return [cut(opaque if p.alpha is None else p.alpha, item.fit, smooth=False) for p in pictures]

    def _computed(self, frame: np.ndarray, inside: np.ndarray | None) -> np.ndarray:
        """Hint of one frame; a mask or alpha channel is the foreground for hints that show one."""
        if self.reading.hint == "mask":
            return COMPUTED["mask"](frame, given=inside)
        return COMPUTED[self.reading.hint](frame)


def _read(frames: Frames, numbers: Sequence[int], size: tuple[int, int]) -> list[Picture]:
    pictures = frames.read(numbers)
    if any(picture.size != size for picture in pictures):
        raise BrokenSample(frames.label, "has another size than when the dataset was opened. Open it again")
    return pictures


def _stack(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
