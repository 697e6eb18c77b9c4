"""Clips whose frames lie in one latent: which frames of a video each latent frame stands for, and averages over them.

Latent frame 0 is frame 0, latent frame k the frames n * (k - 1) + 1 to n * k. Source: the causal video autoencoders of
Wan and others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .families import FAMILIES
from .specs import Family

Frames = tuple[int, ...]
"""Frames of a hint whose features are averaged; one that counts several times is repeated."""


@dataclass(frozen=True, slots=True)
class Clip:
    """Numbers of frames in a latent clip (rows, C, T, H, W)."""

    length: int
    """Latent frames."""
    frames: int
    """Frames of the video in each latent frame after the first, which has one."""


def clip_of(family: Family, latent: tuple[int, ...]) -> Clip | None:
    """Clip for a latent of this shape; None where each row is one picture."""
    frames = FAMILIES[family].frames
    if frames is None or len(latent) < 5 or latent[2] == 1:
        return None
    return Clip(latent[2], frames)


def frame_groups(latent_frames: Iterable[int], hints: int, frames: int) -> tuple[Frames, ...]:
    """Frames of a hint for each of these latent frames of a clip.

    One hint stands for all frames. Where the hint ends before the clip does, its last frame is held.
    """
    return tuple((0,) if hints == 1 else _frames_of(k, hints, frames) for k in latent_frames)


def _frames_of(latent_frame: int, hints: int, frames: int) -> Frames:
    last = frames * latent_frame
    found = tuple(min(frame, hints - 1) for frame in range(max(0, last - frames + 1), last + 1))
    return found[:1] if len(set(found)) == 1 else found


def distinct_frames(groups: Iterable[Frames]) -> Frames:
    """The frames in some groups, each once, in order."""
    return tuple(dict.fromkeys(frame for group in groups for frame in group))


def averaged(maps: Tensor, frames: Sequence[int], groups: Sequence[Frames]) -> Tensor:
    """Maps (len(frames), ...) of frames -> (len(groups), ...): means over groups, by how often each frame counts."""
    place = {frame: number for number, frame in enumerate(frames)}
    return torch.stack([maps[[place[frame] for frame in group]].mean(0) for group in groups])


def one_below_the_other(maps: Tensor, length: int) -> Tensor:
    """Maps (clips * length, C, H, W) of latent frames -> (clips, C, length * H, W): a clip is one sample."""
    return maps.unflatten(0, (-1, length)).movedim(1, 2).flatten(2, 3)
