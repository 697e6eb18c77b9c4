"""Clips with several frames in one latent: which frames of a video a latent frame covers, and averages over them.

Latent frame 0 covers frame 0, latent frame k the frames n * (k - 1) + 1 to n * k. Source: the causal video autoencoders
of Wan and others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .families import FAMILIES
from .specs import Family

Frames = tuple[int, ...]
"""Frames of a hint whose features are averaged; a frame with a greater weight is repeated."""


@dataclass(frozen=True, slots=True)
class Clip:
    """Numbers of frames in a latent clip (batch, C, T, H, W)."""

    length: int
    """Number of latent frames."""
    frames: int
    """Frames of the video in each latent frame after the first, which has one."""


def clip_of(family: Family, latent: tuple[int, ...]) -> Clip | None:
    """Clip for a latent of this shape; None where each batch item is one picture."""
    frames = FAMILIES[family].frames
    if frames is None or len(latent) < 5 or latent[2] == 1:
        return None
    return Clip(latent[2], frames)


def frame_groups(latent_frames: Iterable[int], hints: int, frames: int) -> tuple[Frames, ...]:
    """Frames of a hint for each of these latent frames of a clip.

    A single hint serves all frames. Where the hint ends before the clip does, its last frame is repeated.
    """
    return tuple((0,) if hints == 1 else _frames_of(k, hints, frames) for k in latent_frames)


def _frames_of(latent_frame: int, hints: int, frames: int) -> Frames:
    last = frames * latent_frame
    found = tuple(min(frame, hints - 1) for frame in range(max(0, last - frames + 1), last + 1))
    return found[:1] if len(set(found)) == 1 else found


def distinct_frames(groups: Iterable[Frames]) -> Frames:
    """Frames in these groups, each once, in order."""
    return tuple(dict.fromkeys(frame for group in groups for frame in group))


def averaged(maps: Tensor, frames: Sequence[int], groups: Sequence[Frames]) -> Tensor:
    """Average maps (len(frames), ...) of frames to (len(groups), ...), weighted by how often each frame occurs."""
    place = {frame: number for number, frame in enumerate(frames)}
    return torch.stack([maps[[place[frame] for frame in group]].mean(0) for group in groups])


def one_below_the_other(maps: Tensor, length: int) -> Tensor:
    """Stack maps (clips * length, C, H, W) of latent frames along the height:

    (clips, C, length * H, W), one sample a clip.
    """
    return maps.unflatten(0, (-1, length)).movedim(1, 2).flatten(2, 3)
