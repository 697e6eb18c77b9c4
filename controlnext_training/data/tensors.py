"""Datasets of images from the graph.

# N images, F frames, H W height and width, C channels
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...controlnext_core.hints.picture import CLIPPED
from .buckets import LATENT_STEP, Fit
from .pictures import cut
from .samples import DatasetError, Sample, Share, digest
from .video_frames import chosen_frames, region, windows


class TensorDataset:
    """Pairs of images and hints, cropped at the centre to sides that latents can have."""

    def __init__(
        self,
        images: Tensor,
        hints: Tensor,
        captions: Sequence[str] = (),
        masks: Tensor | None = None,
        *,
        clip_frames: int = 1,
        clip_stride: int = 1,
        reference: str = "random",
    ) -> None:
        """images, hints: (N, H, W, C) in [0, 1], C of 1, 3 or 4 (alpha is dropped); masks: (N, H, W) or None.

        Hints and masks of another size are stretched over the images. captions: none, one for all, or N.
        clip_frames: more than 1 makes clips of consecutive images. Raises DatasetError naming the input.
        """
        self._images = _rgb(images, "images")
        count, height, width = self._images.shape[:3]
        self._hints = _alike(_rgb(hints, "hints"), count, "hints")
        self._masks = None if masks is None else _alike(_checked(masks, "masks", 3), count, "masks")
        size = (height // LATENT_STEP * LATENT_STEP, width // LATENT_STEP * LATENT_STEP)
        if min(size) < LATENT_STEP:
            raise DatasetError(f"images: are {width}x{height}. Both sides must be {LATENT_STEP} pixels or more.")
        self._fit = Fit((height, width), (height, width), ((height - size[0]) // 2, (width - size[1]) // 2), size)
        self._clip = clip_frames, clip_stride, reference
        self._starts = windows(count, clip_frames, clip_stride)
        if not self._starts:
            need = (clip_frames - 1) * clip_stride + 1
            raise DatasetError(
                f"images: {count} are too few, a clip takes {need}. Connect more, or take shorter clips."
            )
        self.captions = _captions(captions, len(self._starts))
        self.sizes = [size] * len(self._starts)
        self._keys = [self._frame_key(number) for number in range(count)]
        self.fingerprint = digest(self._clip, self.captions, self._keys)

    def share(self, index: int) -> Share:
        """Implementation of `ControlDataset.share`."""
        return Share()

    def __len__(self) -> int:
        return len(self._starts)

    def frame_keys(self, index: int, seed: int = 0, position: int = 0, variant: int = 0) -> tuple[str, ...]:
        """Implementation of `ControlDataset.frame_keys`."""
        return tuple(self._keys[number] for number in self._chosen(index, seed, position))

    def load(self, index: int, seed: int = 0, position: int = 0) -> Sample:
        """Implementation of `ControlDataset.load`."""
        numbers = self._chosen(index, seed, position)
        mask = None if self._masks is None else region(self._cut(self._masks, numbers, False), self._clip[2])
        return Sample(
            self._cut(self._images, numbers, True),
            self._cut(self._hints, numbers, False),
            self.captions[index],
            mask,
            self._fit.original,
            self._fit.crop,
            self.frame_keys(index, seed, position),
        )

    def place(self, index: int, variant: int = 0) -> Fit:
        """Implementation of `ControlDataset.place`."""
        return self._fit

    def job(self, index: int, seed: int, position: int, whole: bool, variant: int = 0) -> Callable[[], Sample]:
        """Implementation of `ControlDataset.job`."""
        return lambda: self.load(index, seed, position)

    def _chosen(self, index: int, seed: int, position: int) -> tuple[int, ...]:
        frames, stride, reference = self._clip
        return chosen_frames(self._starts[index], len(self._images), frames, stride, reference, seed, position)

    def _cut(self, tensor: Tensor, numbers: Sequence[int], smooth: bool) -> Tensor:
        return torch.stack([torch.from_numpy(cut(tensor[number].numpy(), self._fit, smooth)) for number in numbers])

    def _frame_key(self, number: int) -> str:
        tensors = [t[number] for t in (self._images, self._hints, self._masks) if t is not None]
        contents = [hashlib.blake2b(t.contiguous().numpy().data, digest_size=16).hexdigest() for t in tensors]
        return digest(contents, [list(t.shape) for t in tensors], self._fit.size)


def _checked(tensor: Tensor, name: str, dims: int) -> Tensor:
    """Tensor as float32 on the CPU, checked to be in [0, 1]."""
    if tensor.ndim != dims or not tensor.numel():
        raise DatasetError(f"{name}: has the shape {list(tensor.shape)}. Connect a batch of pictures.")
    values = tensor.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise DatasetError(f"{name}: holds values that are not numbers (NaN). They come from a run that failed.")
    low, high = float(values.min()), float(values.max())
    if not CLIPPED[0] <= low <= high <= CLIPPED[1]:
        raise DatasetError(f"{name}: holds values from {low:g} to {high:g}, not in 0..1. Scale them to 0..1.")
    return values.clamp(0, 1)


def _rgb(tensor: Tensor, name: str) -> Tensor:
    """Convert (N, H, W, C) to (N, H, W, 3)."""
    values = _checked(tensor, name, 4)
    if values.shape[-1] not in (1, 3, 4):
        raise DatasetError(f"{name}: has {values.shape[-1]} channels. Connect an IMAGE of 1, 3 or 4 channels.")
    return values.expand(-1, -1, -1, 3) if values.shape[-1] == 1 else values[..., :3]


def _alike(tensor: Tensor, count: int, name: str) -> Tensor:
    if len(tensor) not in (1, count):
        raise DatasetError(f"{name}: are {len(tensor)} for {count} images. Connect one for each image, or one for all.")
    return tensor.expand(count, *tensor.shape[1:])


def _captions(captions: Sequence[str], count: int) -> list[str]:
    if len(captions) not in (0, 1, count):
        raise DatasetError(
            f"captions: are {len(captions)} for {count} samples. Give one for each, one for all, or none."
        )
    return list(captions) * (count if len(captions) == 1 else 1) or [""] * count
