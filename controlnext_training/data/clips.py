"""Clips as sources of samples: one picture, the frames of a folder, or a video, each with its hints and masks."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from .index import content_hash
from .pictures import Picture, PictureError, decode
from .rows import Cell
from .samples import Broken, BrokenSample, Facts, first_line
from .sources import HINT, MASK, VIDEO_SUFFIXES, Entry, read_caption
from .tree import Blob
from .video_frames import natural, read_video

LENGTHS_DIFFER = 1
"""Largest difference in frames between a video and its hints: encoders drop or repeat the last one."""


class Frames(Protocol):
    """Sequence of pictures of one size."""

    @property
    def label(self) -> str:
        """Name for messages."""

    @property
    def size(self) -> tuple[int, int]:
        """Size (H, W) in pixels."""

    @property
    def count(self) -> int:
        """Number of frames."""

    def content(self, number: int) -> str:
        """Content hash of a frame."""

    def read(self, numbers: Sequence[int]) -> list[Picture]:
        """Read the frames with these numbers. Raises BrokenSample."""


@dataclass(frozen=True, slots=True)
class PictureFrames:
    """Frames in a file each."""

    blobs: tuple[Blob, ...]
    facts: tuple[Facts, ...]

    @property
    def label(self) -> str:
        return self.blobs[0].label

    @property
    def size(self) -> tuple[int, int]:
        return self.facts[0].size

    @property
    def count(self) -> int:
        return len(self.facts)

    def content(self, number: int) -> str:
        return self.facts[number].content

    def read(self, numbers: Sequence[int]) -> list[Picture]:
        return [self._read(number) for number in numbers]

    def _read(self, number: int) -> Picture:
        blob = self.blobs[number]
        try:
            content = blob.read()
            if content_hash(content) != self.facts[number].content:
                raise BrokenSample(blob.label, "has changed since the dataset was opened. Open it again")
            return decode(content)
        except (OSError, PictureError) as error:
            raise BrokenSample(blob.label, first_line(error)) from error


@dataclass(frozen=True, slots=True)
class VideoFrames:
    """Frames of a video file."""

    blob: Blob
    facts: Facts

    @property
    def label(self) -> str:
        return self.blob.label

    @property
    def size(self) -> tuple[int, int]:
        return self.facts.size

    @property
    def count(self) -> int:
        return self.facts.frames

    def content(self, number: int) -> str:
        return f"{self.facts.content}:{number}"

    def read(self, numbers: Sequence[int]) -> list[Picture]:
        try:
            return read_video(self.blob, self.facts, numbers)
        except (OSError, PictureError) as error:
            raise BrokenSample(self.blob.label, first_line(error)) from error


@dataclass(frozen=True, slots=True)
class Clip:
    """Source of samples; a picture is a clip of one frame."""

    name: str
    caption: str
    images: Frames
    hints: Frames | None
    masks: Frames | None
    count: int
    """Number of frames that images, hints and masks have in common."""


def clips(
    entries: Iterable[Entry], facts: Mapping[Blob, Facts | str], moving: bool, paired: bool, broken: list[Broken]
) -> Iterator[Clip]:
    """Combine pictures with their hints and masks; unreadable files go to `broken`, each once.

    moving: True means that the pictures of one folder are the frames of a clip; False: each is a sample, and videos are
    left out. paired: True leaves out entries without a hint; False does not.
    """
    said: set[Broken] = set()
    for group in _groups(entries, moving):
        try:
            yield _clip(group, facts, moving, paired)
        except BrokenSample as error:
            found = Broken(error.path, error.why)
            if found not in said:
                said.add(found)
                broken.append(found)


def _groups(entries: Iterable[Entry], moving: bool) -> list[list[Entry]]:
    """Entries of one sample or clip, in the order of their first ones; frames in natural order."""
    groups: dict[int | str, list[Entry]] = {}
    for number, entry in enumerate(entries):
        alone = not moving or entry.image.suffix in VIDEO_SUFFIXES
        groups.setdefault(number if alone else posixpath.dirname(entry.name), []).append(entry)
    return [sorted(group, key=lambda entry: natural(entry.name)) for group in groups.values()]


def _clip(group: list[Entry], facts: Mapping[Blob, Facts | str], moving: bool, paired: bool) -> Clip:
    """Clip of a group. Raises BrokenSample for its first fault."""
    images = [entry.image for entry in group]
    if not moving and images[0].suffix in VIDEO_SUFFIXES:
        raise BrokenSample(images[0].label, "is a video. Set clip_frames above 1 to train on clips")
    if moving and isinstance(images[0], Cell):
        raise BrokenSample(images[0].label, "is a picture, and clips are folders of frames or videos. Name their files")
    pictures = _frames(images, facts)
    hints = _all_or_none([entry.hint for entry in group], images, HINT)
    if paired and hints is None:
        raise BrokenSample(images[0].label, "has no hint of its name. Add one, or choose a hint that is computed")
    masks = _all_or_none([entry.mask for entry in group], images, MASK)
    try:
        caption = next(filter(None, (read_caption(entry.caption) for entry in group)), "")
    except (OSError, ValueError) as error:
        blob = next(entry.caption for entry in group if isinstance(entry.caption, Blob))
        raise BrokenSample(blob.label, first_line(error)) from error
    guides, regions = (None if blobs is None else _frames(blobs, facts) for blobs in (hints, masks))
    counts = [frames.count for frames in (pictures, guides, regions) if frames is not None]
    if max(counts) - min(counts) > LENGTHS_DIFFER:
        found = " and ".join(map(str, counts))
        raise BrokenSample(pictures.label, f"and its hints and masks differ in length: {found} frames. Cut them alike")
    return Clip(group[0].name, caption, pictures, guides, regions, min(counts))


def _all_or_none(blobs: Sequence[Blob | None], images: Sequence[Blob], role: str) -> list[Blob] | None:
    """Hints of every frame, or None."""
    there = [blob for blob in blobs if blob is not None]
    if there and len(there) < len(images):
        image = images[list(blobs).index(None)]
        raise BrokenSample(image.label, f"has no {role}, other frames of its clip have one. Add it")
    return there or None


def _frames(blobs: Sequence[Blob], facts: Mapping[Blob, Facts | str]) -> Frames:
    known: list[Facts] = []
    for blob in blobs:
        found = facts[blob]
        if isinstance(found, str):
            raise BrokenSample(blob.label, found)
        if known and found.size != known[0].size:
            raise BrokenSample(
                blob.label,
                f"is {found.width}x{found.height}, the clip's first frame is {known[0].width}x"
                f"{known[0].height}. Give all frames of a clip one size",
            )
        known.append(found)
    if blobs[0].suffix in VIDEO_SUFFIXES:
        return VideoFrames(blobs[0], known[0])
    return PictureFrames(tuple(blobs), tuple(known))
