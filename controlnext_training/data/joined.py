"""Joining of small buckets with their neighbours, so that no batch consists of repetitions of a few pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from .buckets import choose, fit
from .dataset import FileDataset
from .samples import ControlDataset

JOINED = "joined"
"""Value in saved states of runs that join small buckets; states of earlier versions lack it."""

Size = tuple[int, int]


def join_small_buckets(data: ControlDataset, batch: int, say: Callable[[str], None]) -> ControlDataset:
    """Dataset in which every bucket of fewer samples than a batch is joined to the one of nearest aspect ratio.

    batch: samples of one step over all processes. say: called with a line for every joined bucket, and where the whole
    set is smaller than a batch. Data that are not files stay unchanged.
    """
    if len(data) < batch:
        say(f"batch: a step takes {batch} samples and there are {len(data)}, so some come several times in one step.")
    if not isinstance(data, FileDataset):
        return data
    targets = _targets(Counter(data.sizes), batch)
    if not targets:
        return data
    for (height, width), (to_height, to_width) in targets.items():
        count = data.sizes.count((height, width))
        say(
            f"buckets: {count} samples of {width}x{height} are fewer than a batch of {batch} and are cut to "
            f"{to_width}x{to_height}."
        )
    items = [
        replace(item, fit=fit(item.fit.original, targets[item.fit.size])) if item.fit.size in targets else item
        for item in data.items
    ]
    return FileDataset(items, data.reading, data.broken)


def _targets(counts: Counter[Size], batch: int) -> dict[Size, Size]:
    """Bucket -> bucket to which its samples are moved, smallest buckets first."""
    targets: dict[Size, Size] = {}
    left = dict(counts)
    while len(left) > 1 and min(left.values()) < batch:
        small = min(left, key=lambda size: (left[size], size))
        count = left.pop(small)
        near = choose(small, sorted(left))
        left[near] += count
        targets = {old: near if new == small else new for old, new in targets.items()} | {small: near}
    return targets
