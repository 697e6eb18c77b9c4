"""Order of samples: the samples of a step are a pure function of (sizes, batch, seed, step)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..seeding import generator
from .samples import DatasetError


class Order:
    """Order of batches, each from one bucket. Every epoch has its own shuffle with every item once per repeat.

    The last batch of a bucket is completed from the start of the bucket's order in that epoch, so such items occur once
    more.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], batch: int, seed: int, repeats: Sequence[int] = ()) -> None:
        """sizes: the bucket of every item; batch: items of one step over all processes; repeats: of every item, () for
        one each. Raises DatasetError.
        """
        if not sizes:
            raise DatasetError("The dataset has no items. Add pictures.")
        if batch < 1:
            raise DatasetError(f"batch: {batch} must be 1 or more.")
        members: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(sizes):
            members.setdefault(size, []).extend([index] * (repeats[index] if repeats else 1))
        self._buckets = [(size, torch.tensor(members[size])) for size in sorted(members)]
        self._batch, self._seed = batch, seed
        self._epoch: tuple[int, Tensor] | None = None
        self.steps_per_epoch = sum(-(-len(items) // batch) for _, items in self._buckets)

    def batch(self, step: int) -> tuple[int, ...]:
        """Items of a step; steps are counted from 0 over the whole run."""
        epoch, row = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._shuffled(epoch)
        return tuple(self._epoch[1][row].tolist())

    def _shuffled(self, epoch: int) -> Tensor:
        """Indices (steps of an epoch, batch) in the order of an epoch."""
        batches = []
        for (height, width), items in self._buckets:
            shuffled = items[self._permutation(f"order of {height}x{width}", epoch, len(items))]
            places = torch.arange(-(-len(items) // self._batch) * self._batch) % len(items)
            batches.append(shuffled[places].view(-1, self._batch))
        return torch.cat(batches)[self._permutation("order of batches", epoch, self.steps_per_epoch)]

    def _permutation(self, purpose: str, epoch: int, count: int) -> Tensor:
        return torch.randperm(count, generator=generator(self._seed, purpose, epoch))


def order(sizes: Sequence[tuple[int, int]], batch: int, seed: int, repeats: Sequence[int] = ()) -> Order:
    """Order of a run, see `Order`."""
    return Order(sizes, batch, seed, repeats)
