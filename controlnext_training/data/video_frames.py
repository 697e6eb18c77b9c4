"""Video clips: runs of frames from a folder of pictures or from a video file.

SVD's authors replace the first frame of each clip and of its guide by a random frame of the same source and its pose,
and condition the model on that frame. See `chosen_frames`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..seeding import uniform
from .pictures import Picture, PictureError
from .samples import Facts, first_line
from .tree import Blob, fold

REFERENCES = ("random", "first")
"""Choices of a clip's first frame. random: any frame of its source, as the authors train; first: the clip's first
frame."""
CONTAINERS = "mov,mp4,matroska,webm,avi"
"""Formats that are opened, whatever the file's suffix: others are lists of further files, or of addresses."""
SEEK_GAP = 48
"""Number of frames up to which decoding is faster than seeking to the next keyframe."""


def windows(count: int, frames: int, stride: int) -> range:
    """Start frames of the clips in a source of `count` frames: one after the other, without overlap."""
    span = (frames - 1) * stride + 1
    return range(0, count - span + 1, span)


def chosen_frames(
    start: int, count: int, frames: int, stride: int, reference: str, seed: int, position: int
) -> tuple[int, ...]:
    """Frame numbers of a clip that starts at `start` in a source of `count`, the reference frame in place of the first.

    Source: ControlNeXt SVD-v2, training data.
    """
    own = tuple(range(start, start + (frames - 1) * stride + 1, stride))
    if frames == 1 or reference == "first":
        return own
    return (int(uniform(seed, "reference", position) * count), *own[1:])


def region(masks: Tensor, reference: str) -> Tensor:
    """Loss regions (F, H, W) of a sample, without one in a clip's random reference frame, so that it has the plain
    weight.

    Source: ControlNeXt SVD-v2, training data.
    """
    if len(masks) > 1 and reference == "random":
        masks[0] = 0
    return masks


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key of frames' names: numbers by value, so that 10 comes after 9."""
    parts = re.split(r"(\d+)", fold(name))
    return [(0, int(part), "") if place % 2 else (1, 0, part) for place, part in enumerate(parts)] + [(2, 0, name)]


def examine_video(blob: Blob) -> tuple[int, int, int, tuple[int, ...]]:
    """Read (height, width, frames, times) of a video by decoding all of it. Raises PictureError."""
    size, count, times = (0, 0), 0, []
    for frame in _decoded(blob, lambda container: None):
        if not count:
            size = _turned(np.empty((frame.height, frame.width), np.bool_), frame).shape
        count += 1
        times.append(frame.pts)
    if not count:
        raise PictureError("has no frames. Save it again, for example as mp4")
    rising = None not in times and all(a < b for a, b in zip(times, times[1:], strict=False))
    return size[0], size[1], count, tuple(times) if rising else ()


def read_video(blob: Blob, facts: Facts, wanted: Sequence[int]) -> list[Picture]:
    """Read frames of a video by number, in the order of `wanted`. Raises PictureError."""
    found: dict[int, np.ndarray] = {}
    if facts.times:
        for run in _runs(sorted(set(wanted))):
            _collect(blob, facts.times[run[0]], {facts.times[number]: number for number in run}, found)
    missing = set(wanted) - found.keys()
    if missing:  # no times, or seeking went past a frame
        for number, frame in enumerate(_decoded(blob, lambda container: None)):
            if number in missing:
                found[number] = _rgb(frame)
            if number >= max(missing):
                break
    if set(wanted) - found.keys():
        raise PictureError(f"has fewer frames than the {facts.frames} it had. Open the dataset again")
    return [Picture(found[number].astype(np.float32) / np.float32(255)) for number in wanted]


def _collect(blob: Blob, start: int, wanted: dict[int, int], found: dict[int, np.ndarray]) -> None:
    """Decode from the keyframe at or before time `start`, up to the last of `wanted` (time -> number)."""

    def seek(container: Any) -> None:
        container.seek(start, stream=container.streams.video[0], backward=True)

    for frame in _decoded(blob, seek):
        if frame.pts in wanted:
            found[wanted[frame.pts]] = _rgb(frame)
        if frame.pts is None or frame.pts >= max(wanted):
            return


def _runs(numbers: Sequence[int]) -> Iterator[list[int]]:
    """Runs of ascending numbers, split where seeking across the gap pays."""
    run: list[int] = []
    for number in numbers:
        if run and number - run[-1] > SEEK_GAP:
            yield run
            run = []
        run.append(number)
    yield run


def _decoded(blob: Blob, prepare: Callable[[Any], None]) -> Iterator[Any]:
    """Frames of the first video stream. Raises PictureError."""
    import av

    try:
        source = str(blob.path) if blob.size < 0 else io.BytesIO(blob.read())
        with av.open(source, options={"format_whitelist": CONTAINERS}) as container:
            if not container.streams.video:
                raise PictureError("has no pictures, only sound. Remove it")
            prepare(container)
            yield from container.decode(container.streams.video[0])
    except PictureError:
        raise
    except (av.error.FFmpegError, ValueError, EOFError) as error:
        reason = first_line(error)
        raise PictureError(f"is not a readable video ({reason}). Save it again, for example as mp4") from error


def _rgb(frame: Any) -> np.ndarray:
    """Frame as (H, W, 3) uint8."""
    return _turned(frame.to_ndarray(format="rgb24"), frame)


def _turned(values: np.ndarray, frame: Any) -> np.ndarray:
    """Frame rotated for display: phones film in landscape and store the angle, in degrees counterclockwise."""
    return np.rot90(values, round(getattr(frame, "rotation", 0) / 90) % 4)
