"""Index of files: unchanged files are not read again."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from comfyui_controlnext.controlnext_training.data import FileDataset, index, open_dataset
from comfyui_controlnext.controlnext_training.data.tree import Blob
from comfyui_controlnext.tests.fixtures.data_fixtures import broken_files, coordinates, pairs, shard, write


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are examined from now on."""
    names: list[str] = []
    real = index.examine

    def recording(blob: Blob) -> index.Facts | str:
        names.append(blob.name)
        return real(blob)

    monkeypatch.setattr(index, "examine", recording)
    return names


def opened(root: Path, where: Path | None) -> FileDataset:
    return open_dataset(root, resolution=64, bucket_step=8, index=where)


def test_every_file_is_read_once_and_changed_files_again(tmp_path: Path, read: list[str]) -> None:
    root, where = pairs(tmp_path / "d"), tmp_path / "new folder" / "ind\u00ebx.json"
    first = opened(root, where)
    assert len(read) == len(set(read)) == 6
    read.clear()
    again = opened(root, where)
    assert read == [] and again.fingerprint == first.fingerprint and again.sizes == first.sizes
    write(root / "hints" / "a b.png", coordinates(64, 64, 9))
    state = (root / "images" / "a b.png").stat()
    os.utime(root / "images" / "a b.png", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    changed = opened(root, where)
    assert sorted(read) == ["hints/a b.png", "images/a b.png"]
    assert changed.frame_keys(0) != first.frame_keys(0) and changed.frame_keys(1) == first.frame_keys(1)


def test_without_an_index_every_file_is_read_each_time(tmp_path: Path, read: list[str]) -> None:
    root = pairs(tmp_path)
    opened(root, None), opened(root, None)
    assert len(read) == 12


def test_broken_files_are_read_again_since_they_may_be_mended(tmp_path: Path, read: list[str]) -> None:
    root, where = pairs(tmp_path / "d"), tmp_path / "index.json"
    reasons = broken_files(root / "hints")
    for name in reasons:
        write(root / "images" / f"{Path(name).stem}.png", coordinates(64, 64))
    assert len(opened(root, where)) == 3
    read.clear()
    assert len(opened(root, where).broken) == 3
    assert sorted(Path(name).name for name in read) == sorted(reasons)


def test_members_of_a_shard_are_remembered_by_their_place(tmp_path: Path, read: list[str]) -> None:
    members = {path.name: path.read_bytes() for path in (pairs(tmp_path / "d") / "images").glob("*.png")}
    packed = shard(tmp_path / "x.tar", members)
    where = tmp_path / "index.json"
    one = open_dataset(packed, hint="gray", resolution=64, index=where)
    read.clear()
    two = open_dataset(packed, hint="gray", resolution=64, index=where)
    assert read == [] and one.fingerprint == two.fingerprint and len(one) == 3


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 0, "files": {}}', '{"version": 1, "files": {"x": {}}}']
)
def test_a_damaged_index_is_made_again(tmp_path: Path, read: list[str], content: str) -> None:
    root, where = pairs(tmp_path / "d"), write(tmp_path / "index.json", content)
    opened(root, where)
    assert len(read) == 6
    opened(root, where)
    assert len(read) == 6


def test_an_index_that_cannot_be_written_costs_time_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "file", "x")
    with caplog.at_level(logging.WARNING):
        assert len(opened(pairs(tmp_path / "d"), tmp_path / "file" / "index.json")) == 3
    assert "cannot be written" in caplog.text


def test_progress_counts_files_and_may_stop_the_reading(tmp_path: Path) -> None:
    root = pairs(tmp_path / "d")
    told: list[tuple[int, int]] = []
    open_dataset(root, resolution=64, progress=lambda done, total: told.append((done, total)))
    assert [row for row in told if row[0]] == [(number, 6) for number in range(1, 7)]
    assert all(row == (0, 0) for row in told if not row[0]), "listing a folder asks too, before there is a total"

    def stop(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        open_dataset(root, resolution=64, progress=stop)
