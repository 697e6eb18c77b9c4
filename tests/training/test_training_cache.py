"""Encoded samples on disk: complete files are read back, damaged ones are made again."""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from comfyui_controlnext.controlnext_training.data import Cache
from torch import Tensor

KEY = "latent-0123abcd-ef"


def tensors() -> dict[str, Tensor]:
    return {
        "latent": torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2),
        "context": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
    }


def same(one: dict[str, Tensor] | None, other: dict[str, Tensor]) -> bool:
    return one is not None and one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "c\u00e4che \u4e2d")


@pytest.mark.parametrize("key", [KEY, "text \u00fc/..\\x: ?*", "a" * 400, "A", "a", ""])
def test_what_is_put_is_got_by_this_and_later_caches(cache: Cache, key: str) -> None:
    assert cache.get(key) is None and key not in cache
    assert cache.put(key, tensors())
    assert key in cache
    assert same(cache.get(key), tensors()) and same(Cache(cache.folder).get(key), tensors())
    assert cache.get(f"{key}2") is None
    assert cache.path(key).resolve().is_relative_to(cache.folder.resolve())


def test_keys_that_differ_in_case_are_two(cache: Cache) -> None:
    cache.put("KEY", {"x": torch.zeros(1)})
    cache.put("key", {"x": torch.ones(1)})
    assert cache.path("KEY").name.lower() != cache.path("key").name.lower()
    assert same(cache.get("KEY"), {"x": torch.zeros(1)})


def test_tensors_that_share_memory_are_kept(cache: Cache) -> None:
    base = torch.arange(4.0)
    assert cache.put(KEY, {"one": base, "same": base, "part": base[1:3]})
    assert same(cache.get(KEY), {"one": base, "same": base, "part": base[1:3]})


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "one bit", "zeros at the end"])
def test_a_damaged_file_counts_as_missing_and_is_rewritten(
    cache: Cache, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache.put(KEY, tensors())
    path = cache.path(KEY)
    whole = path.read_bytes()
    at = whole.index(torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2).contiguous().numpy().tobytes()) + 40
    path.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "empty": b"",
            "text": b"hello",
            "one bit": whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :],
            "zeros at the end": whole[:-8] + bytes(8),
        }[damage]
    )
    with caplog.at_level(logging.WARNING):
        assert cache.get(KEY) is None
    assert str(path) in caplog.text and "made again" in caplog.text
    assert cache.put(KEY, tensors()) and same(cache.get(KEY), tensors())


def test_a_file_under_another_keys_name_counts_as_missing(cache: Cache) -> None:
    cache.put(KEY, tensors())
    other = cache.path("another")
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_bytes(cache.path(KEY).read_bytes())
    assert cache.get("another") is None


def test_a_file_is_whole_or_not_there(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends between writing and renaming: the next one finds nothing, and no rest after a while."""

    def killed(*paths: object, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "unlink", killed)  # who is killed cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            cache.put(KEY, tensors())
    assert cache.get(KEY) is None
    (left,) = [path for path in cache.folder.rglob("*") if path.is_file()]
    Cache(cache.folder)
    assert left.is_file(), "it could be another process's"
    old = time.time() - 7200
    os.utime(left, (old, old))
    Cache(cache.folder)
    assert not left.exists()


def test_a_folder_that_cannot_be_written_costs_speed_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("x")
    cache = Cache(tmp_path / "file" / "cache")
    with caplog.at_level(logging.WARNING):
        assert not cache.put(KEY, tensors()) and not cache.put("other", tensors())
    assert len(caplog.records) == 1 and "cache_folder" in caplog.text
    assert cache.get(KEY) is None


def test_several_threads_may_put_the_same_key(cache: Cache) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: cache.put(KEY, tensors()), range(40)))
    assert same(cache.get(KEY), tensors())
    assert len([path for path in cache.folder.rglob("*") if path.is_file()]) == 1
