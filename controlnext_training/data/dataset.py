"""Datasets of files: found, examined, sorted into buckets, and read sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ...controlnext_core import encodable
from .buckets import Fit, bucket_sizes, choose, fit
from .clips import clips
from .index import Index, Progress
from .reading import CUT_VERSION, Item, Reading, Request
from .samples import PAIRED, Broken, ControlDataset, DatasetError, Facts, Sample, Share, digest
from .sources import VIDEO_SUFFIXES, Entry, entries, open_tree
from .tree import Blob
from .video_frames import windows

logger = encodable.logger(__name__)

FIRST = 3
"""Number of broken files that an error names."""


class FileDataset:
    """Samples from files; see `open_dataset`."""

    def __init__(self, items: Sequence[Item], reading: Reading, broken: Sequence[Broken]) -> None:
        self.items = tuple(items)
        self.reading = reading
        self.broken = tuple(broken)
        self.sizes = [item.fit.size for item in items]
        self.captions = [item.clip.caption for item in items]
        self._hint_identity = reading.hint_identity()
        self.fingerprint = digest(
            reading.clip_frames, reading.clip_stride, reading.reference, [self._identity(item) for item in items]
        )

    def __len__(self) -> int:
        return len(self.items)

    def share(self, index: int) -> Share:
        """Implementation of `ControlDataset.share`."""
        return self.items[index].share

    def frame_keys(self, index: int, seed: int = 0, position: int = 0, variant: int = 0) -> tuple[str, ...]:
        """Implementation of `ControlDataset.frame_keys`."""
        item = self.reading.variant(self.items[index], variant)
        return tuple(self._frame_key(item, number) for number in self.reading.chosen(item, seed, position))

    def place(self, index: int, variant: int = 0) -> Fit:
        """Implementation of `ControlDataset.place`."""
        return self.reading.variant(self.items[index], variant).fit

    def job(self, index: int, seed: int, position: int, whole: bool, variant: int = 0) -> Request:
        """Implementation of `ControlDataset.job`."""
        item = self.reading.variant(self.items[index], variant)
        numbers = self.reading.chosen(item, seed, position)
        keys = tuple(self._frame_key(item, number) for number in numbers)
        return Request(item, self.reading, numbers, keys, whole)

    def load(self, index: int, seed: int = 0, position: int = 0) -> Sample:
        """Implementation of `ControlDataset.load`."""
        return self.job(index, seed, position, True)()

    def _frame_key(self, item: Item, number: int) -> str:
        clip = item.clip
        hint = self._hint_identity if clip.hints is None else clip.hints.content(number)
        mask = None if clip.masks is None else clip.masks.content(number)
        where = item.fit
        content = clip.images.content(number)
        cut = (where.resized, where.crop, where.size, *(["flipped"] if where.flipped else []))
        return digest(CUT_VERSION, content, hint, mask, self.reading.mask, *cut)

    def _identity(self, item: Item) -> list[str]:
        numbers = self.reading.chosen(item, 0, 0, "first")
        return [item.clip.caption, *(self._frame_key(item, number) for number in numbers)]


class Subset:
    """Dataset of some items of another one."""

    def __init__(self, dataset: ControlDataset, indices: Iterable[int]) -> None:
        self.dataset, self.indices = dataset, tuple(indices)
        if not self.indices:
            raise DatasetError("No items are left of the dataset. Add pictures, or keep fewer for validation.")
        self.sizes = [dataset.sizes[index] for index in self.indices]
        self.captions = [dataset.captions[index] for index in self.indices]
        self.fingerprint = digest(dataset.fingerprint, self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def share(self, index: int) -> Share:
        """Implementation of `ControlDataset.share`."""
        return self.dataset.share(self.indices[index])

    def frame_keys(self, index: int, seed: int = 0, position: int = 0, variant: int = 0) -> tuple[str, ...]:
        """Implementation of `ControlDataset.frame_keys`."""
        return self.dataset.frame_keys(self.indices[index], seed, position, variant)

    def load(self, index: int, seed: int = 0, position: int = 0) -> Sample:
        """Implementation of `ControlDataset.load`."""
        return self.dataset.load(self.indices[index], seed, position)

    def place(self, index: int, variant: int = 0) -> Fit:
        """Implementation of `ControlDataset.place`."""
        return self.dataset.place(self.indices[index], variant)

    def job(self, index: int, seed: int, position: int, whole: bool, variant: int = 0) -> Callable[[], Sample]:
        """Implementation of `ControlDataset.job`."""
        return self.dataset.job(self.indices[index], seed, position, whole, variant)


def open_dataset(
    sources: str | Path | Sequence[str | Path],
    *,
    hint: str = PAIRED,
    resolution: int = 512,
    buckets: bool = True,
    bucket_step: int = 64,
    caption_extension: str = ".txt",
    mask: str = "auto",
    clip_frames: int = 1,
    clip_stride: int = 1,
    reference: str = "random",
    shares: Sequence[Share] = (),
    roots: Sequence[Path] | None = None,
    index: Path | None = None,
    progress: Progress | None = None,
) -> FileDataset:
    """Find and examine all samples in folders, shards and tables; `sources.py` says how files are matched.

    clip_frames: 1 for pictures; more for clips of every clip_stride-th frame, from folders of frames and from videos.
    shares: of each source, with the crops of its pictures. roots: folders that files must be in, links followed; None:
    anywhere. index: file that caches facts about files; Arrow files converted from Parquet are stored beside it. Files
    that cannot be used are listed in `.broken`. Raises DatasetError if no sample is left, or for a wrong setting.
    """
    reading = Reading(hint, mask, clip_frames, clip_stride, reference)
    sizes = bucket_sizes(resolution, bucket_step, buckets)
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    extension = caption_extension if caption_extension.startswith(".") else f".{caption_extension}"
    arrow = None if index is None else index.parent / "arrow"
    broken: list[Broken] = []
    found: list[list[Entry]] = []
    for source in given:
        tree, table = open_tree(Path(source), roots, lambda: progress(0, 0) if progress else None, arrow)
        found.append([_trimmed(entry, reading) for entry in entries(tree, table, extension, hint == PAIRED)])
        broken += tree.broken
    wanted = [e for part in found for e in part if clip_frames > 1 or e.image.suffix not in VIDEO_SUFFIXES]
    blobs = [blob for entry in wanted for blob in (entry.image, entry.hint, entry.mask) if blob is not None]
    facts = Index(index).facts(blobs, progress)
    parts = zip(found, shares or [Share()] * len(found), strict=True)
    items = [replace(item, share=own) for part, own in parts for item in _items(part, facts, reading, sizes, broken)]
    if not items:
        raise _nothing_left(given, reading, broken)
    if broken:
        logger.warning("%d files are left out; the first: %s: %s", len(broken), *broken[0])
    return FileDataset(items, reading, broken)


def _items(
    part: Sequence[Entry],
    facts: Mapping[Blob, Facts | str],
    reading: Reading,
    sizes: Sequence[tuple[int, int]],
    broken: list[Broken],
) -> Iterator[Item]:
    """Samples of one source; entries without any go to `broken`."""
    for clip in clips(part, facts, reading.clip_frames > 1, reading.hint == PAIRED, broken):
        where = fit(clip.images.size, choose(clip.images.size, sizes))
        starts = windows(clip.count, reading.clip_frames, reading.clip_stride)
        yield from (Item(clip, start, where) for start in starts)
        if not starts:
            need = (reading.clip_frames - 1) * reading.clip_stride + 1
            why = f"has {clip.count} frames, a clip takes {need}. Lower clip_frames or clip_stride"
            broken.append(Broken(clip.images.label, why))


def _trimmed(entry: Entry, reading: Reading) -> Entry:
    """Entry without the files that will not be read."""
    masked = reading.mask != "none" or reading.hint == "mask"
    return replace(entry, hint=entry.hint if reading.hint == PAIRED else None, mask=entry.mask if masked else None)


def _nothing_left(sources: Sequence[str | Path], reading: Reading, broken: Sequence[Broken]) -> DatasetError:
    named = ", ".join(map(str, sources)) or "no source was given"
    if not broken:
        return DatasetError(f"{named}: no pictures there. Put png, jpg, webp or bmp files in it, or choose another.")
    listed = "; ".join(f"{path}: {why}" for path, why in broken[:FIRST])
    more = f"; and {len(broken) - FIRST} more" if len(broken) > FIRST else ""
    pairs = ""
    if reading.hint == PAIRED:
        pairs = " Pairs are images/NAME and hints/NAME, or NAME.png and NAME_hint.png, or rows of metadata.jsonl."
    return DatasetError(f"{named}: nothing usable of {len(broken)} files. {listed}{more}.{pairs}")
