"""Encoding of the hints of clips in training: the same passes and averages as in inference, with a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

from ...controlnext_core.injection import pool_to, prepare
from ...controlnext_core.latent_clips import Clip, Frames, averaged, distinct_frames, frame_groups, one_below_the_other
from ...controlnext_core.memory import numbers_per_pixel, rows_at_once
from ...controlnext_core.specs import Fusion, Spec
from ...models.controlnext import ControlNeXt


def quick_layout(hint: Tensor) -> Tensor:
    """Hint in the quicker memory layout, which decides the kernels, and so speed and rounding.

    Without a gradient it is that of inference, channels last on a CPU. With one it is contiguous: there the backward
    pass of the encoder's convolutions takes 0.62 of the time on a CPU (AVX2, fp32, hints of 192 pixels).
    """
    if hint.device.type != "cpu":
        return hint
    return hint.contiguous(memory_format=torch.contiguous_format if torch.is_grad_enabled() else torch.channels_last)


def projected(net: ControlNeXt, narrow: Tensor, size: tuple[int, int], fusion: Fusion) -> Tensor:
    """Project maps (rows, C, H, W) of the encoder, already at this size, to the base's channels, and normalise them."""
    wide = prepare(net.project(narrow), size, fusion)
    return wide.to(narrow.dtype, memory_format=torch.channels_last)


def latent_frames_at_once(spec: Spec, pixels: int, itemsize: int, clip: Clip) -> int:
    """Latent frames whose hints the encoder takes in one pass; pixels: of one frame of the hint."""
    return rows_at_once(pixels * numbers_per_pixel(spec.build, pixels) * itemsize * clip.frames)


@dataclass(frozen=True, slots=True)
class ClipEncoding:
    """Encoder of the frames of hints to the features of clips."""

    net: ControlNeXt
    spec: Spec
    checkpointing: bool
    """True: the backward pass recomputes each pass of the encoder. False: all frames of all clips are stored."""

    def encode(self, hint: Tensor, timesteps: Tensor, size: tuple[int, int], clip: Clip, rows: int) -> Tensor:
        """Features (rows, C, T * H, W) of clips, normalised.

        hint: (rows * frames, 3, 8H, 8W), clip after clip; timesteps: (rows,), or (1,) for all; size: (T * H, W).
        """
        of_frame, count = (size[0] // clip.length, size[1]), len(hint) // rows
        groups = frame_groups(range(clip.length), count, clip.frames)
        at_once = latent_frames_at_once(self.spec, int(hint.shape[-2] * hint.shape[-1]), hint.element_size(), clip)
        maps = []
        for row in range(rows):
            own = hint[row * count : (row + 1) * count]
            time = timesteps[row : row + 1] if len(timesteps) > 1 else timesteps
            for start in range(0, clip.length, at_once):
                maps.append(self._again(self._latent_frames, own, time, of_frame, groups[start : start + at_once]))
        return self._again(self._project, one_below_the_other(torch.cat(maps), clip.length), size)

    def _project(self, narrow: Tensor, size: tuple[int, int]) -> Tensor:
        return projected(self.net, narrow, size, self.spec.fusion)

    def _latent_frames(self, hint: Tensor, time: Tensor, size: tuple[int, int], groups: Sequence[Frames]) -> Tensor:
        """Maps (len(groups), C, H, W), before projection, of some latent frames of one clip; hint: all its frames."""
        frames = distinct_frames(groups)
        narrow = self.net.narrow(self.net.begin(quick_layout(hint[list(frames)])), time)
        return averaged(pool_to(narrow.float(), size), frames, groups).to(hint.dtype).contiguous()

    def _again(self, function: Callable[..., Tensor], *given: Any) -> Tensor:
        if not self.checkpointing:
            return function(*given)
        found: Tensor = checkpointed(function, *given, use_reentrant=False, preserve_rng_state=False)
        return found
