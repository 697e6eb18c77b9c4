"""Cache of encoder outputs: lookups, evictions when a budget is full, and its byte counts."""

from __future__ import annotations

import random
import sys
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import feature_cache
from comfyui_controlnext.controlnext_core.feature_cache import DEVICE_BUDGET, MIB, FeatureCache, GroupKey

CPU, GPU = torch.device("cpu"), torch.device("cuda")
A, B, C = GroupKey("encoder", "hint a"), GroupKey("encoder", "hint b"), GroupKey("other encoder", "hint a")


@dataclass(frozen=True)
class OnGpu:
    """Stand-in for a tensor in GPU memory, with the attributes that the cache reads."""

    nbytes: int
    device: torch.device = GPU

    def to(self, device: torch.device, non_blocking: bool = False) -> Any:
        return OnGpu(self.nbytes, device)

    def cpu(self) -> Any:
        return OnGpu(self.nbytes, CPU)


def size(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8)


def gpu(nbytes: int) -> Any:
    return OnGpu(nbytes)


def held(cache: FeatureCache, group: GroupKey, *keys: int) -> list[bool]:
    return [cache.get(group, key, CPU) is not None for key in keys]


def test_an_entry_is_found_under_its_own_group_and_key_alone() -> None:
    cache, value = FeatureCache(), torch.arange(4)
    assert cache.get(A, 1, CPU) is None
    assert cache.put(A, 1, value)
    found = cache.get(A, 1, CPU)
    assert found is not None and torch.equal(found, value)
    assert cache.holds(A, 1) and not cache.holds(A, 2) and not cache.holds(B, 1)
    assert cache.get(A, 2, CPU) is None and cache.get(B, 1, CPU) is None and cache.get(C, 1, CPU) is None
    assert len(cache) == 1


def test_a_second_value_takes_the_place_of_the_first() -> None:
    cache = FeatureCache(host_budget=100)
    assert cache.put(A, 1, size(60)) and cache.put(A, 1, size(80))
    found = cache.get(A, 1, CPU)
    assert found is not None and found.nbytes == 80
    assert cache.used == {"device": 0, "host": 80} and len(cache) == 1


def test_within_a_run_that_does_not_fit_the_earliest_steps_stay() -> None:
    cache = FeatureCache(host_budget=100)
    cache.begin_run()
    assert [cache.put(A, step, size(40)) for step in range(4)] == [True, True, False, False]
    assert held(cache, A, 0, 1, 2, 3) == [True, True, False, False]
    assert cache.put(B, 0, size(20)) and cache.used["host"] == 100


def test_between_runs_the_least_recently_used_group_goes_first() -> None:
    cache = FeatureCache(host_budget=100)
    cache.begin_run()
    assert cache.put(A, 1, size(50)) and cache.put(B, 1, size(50))
    cache.begin_run()
    assert held(cache, A, 1) == [True]  # A is used after B
    cache.begin_run()
    assert cache.put(C, 1, size(50))
    assert held(cache, A, 1) == [True] and held(cache, B, 1) == [False] and held(cache, C, 1) == [True]
    assert cache.used["host"] == 100 and len(cache) == 2


def test_what_the_present_run_has_read_is_not_pushed_out() -> None:
    cache = FeatureCache(host_budget=100)
    cache.begin_run()
    cache.put(A, 1, size(60))
    cache.begin_run()
    assert held(cache, A, 1) == [True]
    assert not cache.put(B, 1, size(60))
    assert held(cache, A, 1) == [True]


def test_a_value_larger_than_the_budget_pushes_nothing_out() -> None:
    cache = FeatureCache(host_budget=100)
    cache.begin_run()
    cache.put(A, 1, size(60))
    cache.begin_run()
    assert not cache.put(B, 1, size(101))
    assert held(cache, A, 1) == [True]


def test_the_device_fills_before_the_host() -> None:
    cache = FeatureCache(device_budget=100, host_budget=50)
    cache.begin_run()
    assert [cache.put(A, step, gpu(50)) for step in range(4)] == [True, True, True, False]
    assert cache.used == {"device": 100, "host": 50}
    found = cache.get(A, 2, GPU)
    assert found is not None and found.device == GPU  # from host memory, back on the device
    cache.begin_run()
    assert cache.put(B, 0, gpu(50))
    assert cache.used == {"device": 50, "host": 50}
    assert held(cache, A, 0, 1, 2) == [False, False, True]


def test_on_a_cpu_the_host_budget_counts_alone() -> None:
    cache = FeatureCache(device_budget=10**9, host_budget=10)
    assert not cache.put(A, 1, size(11)) and cache.used == {"device": 0, "host": 0}


def test_dropping_an_encoder_leaves_the_others() -> None:
    cache = FeatureCache()
    for group in (A, B, C):
        cache.put(group, 1, size(10))
    cache.drop("encoder")
    assert held(cache, A, 1) == [False] and held(cache, B, 1) == [False] and held(cache, C, 1) == [True]
    assert cache.used["host"] == 10
    cache.drop("unknown")
    cache.clear()
    assert len(cache) == 0 and cache.used == {"device": 0, "host": 0}


def test_the_sums_are_those_of_the_entries_after_any_history() -> None:
    cache = FeatureCache(device_budget=300, host_budget=500)
    generator = torch.Generator().manual_seed(0)
    groups = [GroupKey(f"encoder {i % 3}", f"hint {i}") for i in range(6)]
    for turn in range(400):
        kind, group, key, nbytes = torch.randint(0, 100, (4,), generator=generator).tolist()
        if kind < 10:
            cache.begin_run()
        elif kind < 12:
            cache.drop(f"encoder {group % 3}")
        elif kind < 60:
            cache.get(groups[group % 6], key % 5, CPU)
        else:
            cache.put(groups[group % 6], key % 5, gpu(nbytes) if turn % 3 else size(nbytes))
        entries = [entry for kept in cache._groups.values() for entry in kept.entries.values()]
        assert cache.used["host"] == sum(e.nbytes for e in entries if e.device.type == "cpu") <= 500
        assert cache.used["device"] == sum(e.nbytes for e in entries if e.device.type != "cpu") <= 300
        assert len(cache) == len(entries)


def test_room_is_made_for_what_would_be_kept_and_for_nothing_else() -> None:
    cache = FeatureCache(device_budget=0, host_budget=100)
    cache.begin_run()
    cache.put(A, 1, size(60))
    assert cache.makes_room(size(40)) and not cache.makes_room(size(41))
    assert cache.makes_room(gpu(40)) and not cache.makes_room(gpu(41))
    cache.begin_run()
    assert not cache.makes_room(size(101)) and held(cache, A, 1) == [True]
    cache.begin_run()
    assert cache.makes_room(size(41)) and held(cache, A, 1) == [False] and cache.used["host"] == 0


def no_more_pinned(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("CUDA error: out of memory")


@pytest.mark.parametrize("pinned", [True, False])
def test_where_the_system_pins_nothing_host_memory_serves_as_it_is(
    monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    """Runs continue where the system refuses to pin, and nothing is pinned where the user forbids it."""
    monkeypatch.setattr(feature_cache, "_is_cuda", lambda value: True)
    asked: list[bool] = []
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: asked.append(True) or no_more_pinned())
    cache = FeatureCache(0, 4 * MIB, pinned=pinned)
    assert cache.put(A, 1, gpu(1_200_000))
    assert cache.used == {"device": 0, "host": 1_200_000} and asked == [True] * pinned
    assert cache.get(A, 1, GPU) == gpu(1_200_000)


@pytest.mark.gpu
def test_what_a_gpu_has_no_room_for_is_pinned_and_comes_back_bit_for_bit() -> None:
    cache = FeatureCache(device_budget=0, host_budget=4 * MIB)
    values = [torch.randn(3, 100, 1000, device="cuda") for _ in range(3)]  # 1.14 MiB, of which torch makes 2
    assert [cache.put(A, step, value) for step, value in enumerate(values)] == [True, True, False]
    assert cache.used == {"device": 0, "host": 4 * MIB}
    for step, value in enumerate(values[:2]):
        found = cache.get(A, step, torch.device("cuda", 0))
        assert found is not None and torch.equal(found, value)
    cache.clear()


@pytest.mark.parametrize("steps", [20, 30])
def test_the_default_device_budget_holds_sdxl_at_1024(steps: int) -> None:
    one_step = 320 * 128 * 128 * 2  # fp16 features of the site
    assert one_step == 10 * MIB and steps * one_step <= DEVICE_BUDGET


def test_threads_keep_its_sums_right() -> None:
    """Threads as of devices that sample at once: separate groups, and budgets that are always full."""
    cache = FeatureCache(device_budget=300, host_budget=500)
    failures: list[Exception] = []

    def one_call(numbers: random.Random, device: str) -> None:
        group, key = GroupKey(f"encoder {numbers.randrange(3)}", "hint", device), numbers.randrange(8)
        make = numbers.choice([size, gpu])
        calls = [
            lambda: cache.put(group, key, make(numbers.randrange(1, 90))),
            lambda: cache.get(group, key, CPU),
            lambda: cache.makes_room(make(80)),
            lambda: cache.drop(group.encoder, device),
            cache.begin_run,
        ]
        numbers.choice(calls)()

    def hammer(device: str) -> None:
        numbers = random.Random(device)
        try:
            for _ in range(3000):
                one_call(numbers, device)
        except Exception as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=hammer, args=(name,)) for name in ("a", "b", "c", "d")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    entries = [entry for kept in cache._groups.values() for entry in kept.entries.values()]
    assert failures == [] and entries
    assert cache.used["host"] == sum(e.nbytes for e in entries if e.device.type == "cpu") <= 500
    assert cache.used["device"] == sum(e.nbytes for e in entries if e.device.type != "cpu") <= 300


def test_dropping_what_one_device_made_leaves_the_others() -> None:
    cache = FeatureCache()
    groups = [GroupKey("encoder", "hint", device) for device in ("cuda:0", "cuda:1")]
    for group in groups:
        cache.put(group, 1, size(10))
    cache.drop("encoder", "cuda:1")
    assert [cache.holds(group, 1) for group in groups] == [True, False] and cache.used["host"] == 10
