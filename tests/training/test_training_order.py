"""Order of samples over the steps."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from comfyui_controlnext.controlnext_training.data import DatasetError, order

SIZES = [(64, 64)] * 10 + [(64, 128)] * 7 + [(128, 64)] * 2 + [(64, 64)]


def epoch(batch: int, seed: int = 0, number: int = 0) -> list[tuple[int, ...]]:
    made = order(SIZES, batch, seed)
    first = number * made.steps_per_epoch
    return [made.batch(step) for step in range(first, first + made.steps_per_epoch)]


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 16])
def test_a_batch_is_of_one_bucket_and_full(batch: int) -> None:
    for indices in epoch(batch):
        assert len(indices) == batch
        assert len({SIZES[index] for index in indices}) == 1


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("number", [0, 1, 5])
def test_every_item_comes_once_an_epoch_but_for_completed_batches(batch: int, number: int) -> None:
    counted = Counter(index for indices in epoch(batch, number=number) for index in indices)
    assert set(counted) == set(range(len(SIZES)))
    for size in set(SIZES):
        members = [index for index, other in enumerate(SIZES) if other == size]
        times = [counted[index] for index in members]
        assert sum(times) == -(-len(members) // batch) * batch
        assert max(times) - min(times) <= 1


def test_a_batch_is_completed_from_the_start_of_its_buckets_own_order() -> None:
    """Batch of five from two items: a, b, a, b, a."""
    (tall,) = [indices for indices in epoch(5) if SIZES[indices[0]] == (128, 64)]
    assert tall[:2] == tall[2:4] and tall[4] == tall[0] and set(tall) == {17, 18}


def test_a_step_depends_on_nothing_but_sizes_batch_seed_and_step() -> None:
    one, other = order(SIZES, 3, 7), order(list(SIZES), 3, 7)
    steps = list(range(40))
    forwards = [one.batch(step) for step in steps]
    backwards = [other.batch(step) for step in reversed(steps)]
    assert forwards == backwards[::-1]
    assert order(SIZES, 3, 7).batch(23) == forwards[23]


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    assert len({tuple(epoch(2, seed, number)) for seed in range(3) for number in range(3)}) == 9


def test_items_of_a_bucket_do_not_stay_together_in_their_batches() -> None:
    made = order([(64, 64)] * 100, 4, 0)
    together = [{frozenset(made.batch(e * 25 + s)) for s in range(25)} for e in range(2)]
    assert not together[0] & together[1]


def test_buckets_take_turns() -> None:
    made = order([(64, 64)] * 60 + [(64, 128)] * 60, 1, 0)
    first_half = Counter(made.batch(step)[0] < 60 for step in range(60))
    assert 15 < first_half[True] < 45


def test_a_million_items_are_quick() -> None:
    start = time.process_time()
    made = order([(64, 64 + 64 * (index % 9)) for index in range(1_000_000)], 8, 0)
    assert len({made.batch(step) for step in range(0, 3000)}) == 3000
    assert time.process_time() - start < 5  # about 0.7 s; one epoch is shuffled once


@pytest.mark.parametrize(("sizes", "batch", "words"), [([], 1, "no items"), (SIZES, 0, "batch: 0")])
def test_nothing_to_order_is_said(sizes: list[tuple[int, int]], batch: int, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        order(sizes, batch, 0)
