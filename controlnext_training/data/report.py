"""Report on a dataset as text, to read before a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .dataset import FileDataset, Item
from .samples import Broken, ControlDataset

LISTED = 20
"""Number of files of a kind that the text names; the report holds all of them."""
ASPECT = 0.02
"""Relative difference of aspect ratios that rounding of sizes does not explain."""


@dataclass(frozen=True, slots=True)
class Report:
    """Counts and lists about a dataset; `text` formats them."""

    items: int
    buckets: dict[tuple[int, int], int]
    """Size (H, W) of a bucket -> number of items."""
    originals: dict[tuple[int, int], int]
    """Size (H, W) before resizing -> number of items; empty for images from the graph."""
    enlarged: int
    """Number of items smaller than their bucket."""
    without_caption: tuple[str, ...]
    with_mask: int
    duplicates: tuple[tuple[str, ...], ...]
    """Groups of files with the same bytes."""
    broken: tuple[Broken, ...]
    stretched: tuple[str, ...] = ()
    """Pictures whose hint has another aspect ratio."""
    coarse: tuple[str, ...] = ()
    """Pictures whose hint has less than half the pixels along a side of its bucket."""
    shared: tuple[tuple[str, ...], ...] = ()
    """Groups of pictures that share one hint file, such as i.JPG and i.png."""

    @property
    def text(self) -> str:
        """Text for a log or a page: problems first, then the samples and their sizes."""
        lines = _listed("files are left out", [f"{path}: {why}" for path, why in self.broken])
        lines += _listed("have a hint of another aspect, which is stretched over the picture", self.stretched)
        lines += _listed("have a hint much smaller than what trains, which is enlarged", self.coarse)
        lines += _listed("groups of files are the same", [", ".join(group) for group in self.duplicates])
        lines += _listed("groups of pictures share one hint", [", ".join(group) for group in self.shared])
        lines += _listed("have no caption", self.without_caption)
        lines.append(f"{self.items} samples")
        lines += [f"  {width}x{height}: {count}" for (height, width), count in self.buckets.items()]
        if self.originals:
            smallest, largest = min(self.originals, key=_area), max(self.originals, key=_area)
            lines.append(f"original sizes from {smallest[1]}x{smallest[0]} to {largest[1]}x{largest[0]}")
        if self.enlarged:
            lines.append(f"{self.enlarged} are smaller than their bucket and are enlarged")
        if self.with_mask:
            lines.append(f"{self.with_mask} have a mask")
        return "\n".join(lines)


def report(dataset: ControlDataset) -> Report:
    """Report on an open dataset; no file is read again."""
    buckets = dict(sorted(Counter(dataset.sizes).items()))
    if not isinstance(dataset, FileDataset):
        without = tuple(f"sample {index}" for index, caption in enumerate(dataset.captions) if not caption)
        return Report(len(dataset), buckets, {}, 0, without, 0, (), ())
    items = dataset.items
    clips = list({id(item.clip): item.clip for item in items}.values())
    same: dict[str, list[str]] = {}
    of_hint: dict[str, list[str]] = {}
    for clip in clips:
        same.setdefault(" ".join(clip.images.content(n) for n in range(clip.count)), []).append(clip.images.label)
        if clip.hints is not None:
            of_hint.setdefault(clip.hints.label, []).append(clip.images.label)
    return Report(
        items=len(items),
        buckets=buckets,
        originals=dict(sorted(Counter(item.fit.original for item in items).items())),
        enlarged=sum(item.fit.original[0] < item.fit.resized[0] for item in items),
        without_caption=tuple(clip.images.label for clip in clips if not clip.caption),
        with_mask=sum(item.clip.masks is not None for item in items),
        duplicates=tuple(tuple(labels) for labels in same.values() if len(labels) > 1),
        broken=dataset.broken,
        stretched=tuple(dict.fromkeys(item.clip.images.label for item in items if _is_stretched(item))),
        coarse=tuple(dict.fromkeys(item.clip.images.label for item in items if _is_coarse(item))),
        shared=tuple(tuple(labels) for labels in of_hint.values() if len(labels) > 1),
    )


def _is_stretched(item: Item) -> bool:
    """True: the hint's aspect ratio differs by more than ASPECT from its picture's. False: it does not."""
    if item.clip.hints is None:
        return False
    (height, width), (own_height, own_width) = item.fit.original, item.clip.hints.size
    ratio = height * own_width / (width * own_height)
    return max(ratio, 1 / ratio) > 1 + ASPECT


def _is_coarse(item: Item) -> bool:
    """True: a side of the hint is enlarged more than twice. False: none is."""
    hints = item.clip.hints
    return hints is not None and any(2 * own < side for own, side in zip(hints.size, item.fit.resized, strict=True))


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _listed(what: str, names: Sequence[str]) -> list[str]:
    """Lines with the count, then the first names, one per line."""
    if not names:
        return []
    more = [f"  and {len(names) - LISTED} more"] if len(names) > LISTED else []
    return [f"{len(names)} {what}:", *(f"  {name}" for name in names[:LISTED]), *more]
