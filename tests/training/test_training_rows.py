"""Parquet and Arrow files: rows with pictures in them, by the library `datasets` where it is installed.

Tests without the library put rows of their own in the place of its Arrow files.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfyui_controlnext.controlnext_training.data import DatasetError, open_dataset, report, rows
from comfyui_controlnext.controlnext_training.data.index import Index
from comfyui_controlnext.tests.fixtures.data_fixtures import coordinates, encoded, marks, pairs, shard, write

if TYPE_CHECKING:
    from comfyui_controlnext.controlnext_training.data import FileDataset

COUNT = 5
Record = dict[str, Any]


def opened(source: Path, **options: Any) -> FileDataset:
    return open_dataset(source, **{"resolution": 64, "bucket_step": 8, **options})


def summary(dataset: FileDataset) -> list[tuple[int, int, str]]:
    samples = [dataset.load(index) for index in range(len(dataset))]
    return [(*marks(s.frames), *marks(s.hints), s.caption) for s in samples]


def picture(mark: int) -> bytes:
    return encoded(coordinates(64, 64, mark=mark))


def row(number: int, image: str = "image", hint: str = "conditioning_image", text: str = "text") -> Record:
    return {image: picture(number), hint: picture(100 + number), text: f"t\u00ebxt {number}", "other": number}


EXPECTED = [(number, 100 + number, f"t\u00ebxt {number}") for number in range(COUNT)]


class MemoryRows:
    """Rows of Python values in place of an Arrow file's; bytes are pictures."""

    def __init__(self, held: list[Record]) -> None:
        self.held, self.read = held, 0
        self.columns = list(held[0])

    def __len__(self) -> int:
        return len(self.held)

    def values(self, column: str, start: int, stop: int) -> list[Any]:
        found = [row.get(column) for row in self.held[start:stop]]
        return [isinstance(value, bytes) or value for value in found]

    def picture(self, column: str, row: int) -> bytes:
        self.read += 1
        return self.held[row][column]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, MemoryRows]:
    """Name of an Arrow file -> its rows."""
    held: dict[str, MemoryRows] = {}
    monkeypatch.setattr(rows, "ArrowRows", lambda path: held[Path(path).name])
    rows._kept.cache_clear()
    return held


def reasons(dataset: FileDataset) -> list[str]:
    return [f"{Path(path).name}: {why}" for path, why in dataset.broken]


@pytest.mark.parametrize(
    "columns", [("image", "conditioning_image", "text"), ("target", "source", "prompt"), ("image", "hint", "caption")]
)
def test_pictures_hints_and_captions_are_found_by_the_names_of_their_columns(
    tmp_path: Path, stand_in: dict[str, MemoryRows], columns: tuple[str, str, str]
) -> None:
    stand_in["a b.arrow"] = MemoryRows([row(number, *columns) for number in range(COUNT)])
    data = opened(write(tmp_path / "a b.arrow", "rows"))
    assert summary(data) == EXPECTED and data.broken == ()
    assert data.items[3].clip.images.label == f"{tmp_path / 'a b.arrow'}: row 4 {columns[0]}"
    gray = opened(tmp_path, hint="gray", mask="none")
    assert [sample[0] for sample in summary(gray)] == list(range(COUNT)), "hint columns are not needed then"
    assert "5 samples" in report(data).text


def test_rows_are_remembered_until_their_file_changes(tmp_path: Path, stand_in: dict[str, MemoryRows]) -> None:
    file, index = write(tmp_path / "d" / "a.arrow", "rows"), tmp_path / "index.json"
    held = stand_in["a.arrow"] = MemoryRows([row(number) for number in range(COUNT)])
    first = opened(file, index=index)
    assert held.read == 2 * COUNT, "each picture and hint once"
    again = opened(file, index=index)
    assert held.read == 2 * COUNT and again.fingerprint == first.fingerprint
    assert len(Index(index)._known) == 2 * COUNT
    held.held[1] = {**row(1), "image": picture(50)}
    os.utime(file, ns=(0, 0))
    with pytest.raises(ValueError, match="row 2 image: has changed since the dataset was opened"):
        again.load(1)
    assert summary(opened(file, index=index))[1][0] == 50 and held.read == 2 * COUNT + 1 + 2 * COUNT + 2 * COUNT


def test_rows_name_files_which_lie_where_files_may_lie(tmp_path: Path, stand_in: dict[str, MemoryRows]) -> None:
    root, outside = tmp_path / "data", write(tmp_path / "outside.png", picture(9))
    write(root / "p" / "\u00e4.png", picture(7))
    named = [{**row(0), "image": "p/\u00e4.png"}, {**row(1), "image": str(outside)}, {**row(2), "image": "gone.png"}]
    stand_in["a.arrow"] = MemoryRows(
        [*named, {**row(3), "image": None}, {**row(4), "conditioning_image": None}, row(5)]
    )
    write(root / "a.arrow", "rows")
    data = opened(root, roots=[root])
    assert summary(data) == [(7, 100, "t\u00ebxt 0"), (5, 105, "t\u00ebxt 5")]
    parts = [
        "a.arrow, row 2: ",
        "a.arrow, row 3: names gone.png",
        "row 4: names no picture",
        "row 5 image: has no hint",
    ]
    assert len(data.broken) == 4
    assert all(part in why for part, why in zip(parts, reasons(data), strict=True)), data.broken
    assert "is outside of" in data.broken[0].why


def test_files_of_other_splits_and_what_no_list_names_are_left_out(
    tmp_path: Path, stand_in: dict[str, MemoryRows]
) -> None:
    for place, name in enumerate(
        ("train/data-0.arrow", "train/data-1.arrow", "train/old.arrow", "train/cache-1.arrow")
    ):
        write(tmp_path / name, "rows")
        stand_in[Path(name).name] = MemoryRows([row(place)])
    listed = {"_data_files": [{"filename": "data-0.arrow"}, {"filename": "data-1.arrow"}]}
    write(tmp_path / "train" / "state.json", json.dumps(listed))
    stand_in["held.arrow"] = MemoryRows([row(9)])
    write(tmp_path / "test" / "held.arrow", "rows")
    data = opened(tmp_path)
    assert summary(data) == EXPECTED[:2]
    assert reasons(data) == [
        "held.arrow: is of a split that does not train. Name it in validation_data to validate on it"
    ]
    (tmp_path / "train" / "state.json").unlink()
    assert summary(opened(tmp_path)) == EXPECTED[:3]
    assert [sample[0] for sample in summary(opened(tmp_path / "test"))] == [9]


def test_clips_are_not_made_of_rows(tmp_path: Path, stand_in: dict[str, MemoryRows]) -> None:
    stand_in["a.arrow"] = MemoryRows([row(number) for number in range(COUNT)])
    write(tmp_path / "a.arrow", "rows")
    with pytest.raises(DatasetError, match="row 1 image: is a picture, and clips are folders of frames or videos"):
        opened(tmp_path, clip_frames=2)


def test_a_user_who_cancels_is_heard_between_rows(tmp_path: Path, stand_in: dict[str, MemoryRows]) -> None:
    stand_in["a.arrow"] = MemoryRows([row(0)] * 3)
    write(tmp_path / "a.arrow", "rows")
    asked: list[int] = []

    def stop(done: int, total: int) -> None:
        asked.append(total)
        if len(asked) == 2:  # the first is of listing the folder
            raise InterruptedError

    with pytest.raises(InterruptedError):
        opened(tmp_path, progress=stop)
    assert asked == [0, 0], "before the first picture is read"


def test_without_the_library_a_remedy_is_named_and_other_files_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    file = write(tmp_path / "a.parquet", b"PAR1 and more")
    remedy = "a.parquet: needs the package datasets, which is not installed. Type .* -m pip install datasets"
    with pytest.raises(DatasetError, match=remedy):
        opened(file)
    write(tmp_path / "both" / "rows" / "a.parquet", b"PAR1 and more")
    data = opened(pairs(tmp_path / "both", ["x"]))
    assert len(data) == 1 and "needs the package datasets" in data.broken[0].why


def test_pointers_of_git_lfs_and_members_of_tars_are_told(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    with pytest.raises(
        DatasetError, match="a.parquet: is a pointer of git-lfs in place of the file. Type git lfs pull"
    ):
        opened(write(tmp_path / "a.parquet", pointer))
    with pytest.raises(DatasetError, match="b.parquet: is inside a tar, where its rows cannot be read. Unpack it"):
        opened(shard(tmp_path / "x.tar", {"b.parquet": b"PAR1"}))


# With the library


def library() -> Any:
    return pytest.importorskip("datasets", reason="the library datasets is not installed")


def table(kind: str = "image") -> Any:
    """Dataset of the library: pictures in its picture type, as bytes, or in a struct."""
    datasets = library()
    held = [row(number) for number in range(COUNT)]
    if kind != "bytes":
        names = ("image", "conditioning_image")
        held = [{**one, **{name: {"bytes": one[name], "path": None} for name in names}} for one in held]
    found = datasets.Dataset.from_list(held)
    if kind == "image":
        for name in ("image", "conditioning_image"):
            found = found.cast_column(name, datasets.Image())
    return found


@pytest.mark.parametrize("kind", ["image", "bytes", "struct"])
@pytest.mark.parametrize("saved", ["parquet", "disk", "splits"])
def test_what_the_library_saved_is_read(tmp_path: Path, kind: str, saved: str) -> None:
    held, root = table(kind), tmp_path / "a [b] \u00e4"
    if saved == "parquet":
        for number in range(2):
            held.shard(2, number, contiguous=True).to_parquet(
                str(root / "data" / f"train-0000{number}-of-00002.parquet")
            )
        held.select([0]).to_parquet(str(root / "data" / "test-00000-of-00001.parquet"))
    elif saved == "disk":
        held.save_to_disk(str(root), num_shards=2)
    else:
        library().DatasetDict({"train": held, "test": held.select([0])}).save_to_disk(str(root))
    data = opened(root, index=tmp_path / "cache" / "index.json")
    assert summary(data) == EXPECTED and len(data.broken) == (0 if saved == "disk" else 1)
    assert list((tmp_path / "cache").rglob("*.arrow")) != [] or saved != "parquet"


def test_pictures_that_the_library_names_are_read_from_their_files(tmp_path: Path) -> None:
    write(tmp_path / "p" / "\u00e4.png", picture(7))
    named = [{"bytes": None, "path": "p/\u00e4.png"}, {"bytes": picture(8), "path": "gone.png"}, None]
    held = [{**row(number), "image": image} for number, image in enumerate(named)]
    library().Dataset.from_list(held).to_parquet(str(tmp_path / "a.parquet"))
    data = opened(tmp_path / "a.parquet", index=tmp_path / "cache" / "index.json")
    assert [sample[0] for sample in summary(data)] == [7, 8]
    assert [why.split(":")[0] for _, why in data.broken] == ["names no picture"]


def test_a_parquet_file_is_turned_once_and_again_when_it_changes(tmp_path: Path) -> None:
    file, index = tmp_path / "a.parquet", tmp_path / "cache" / "index.json"
    table().to_parquet(str(file))
    first = opened(file, index=index)
    (made,) = (tmp_path / "cache").rglob("*.arrow")
    state = made.stat().st_mtime_ns
    assert opened(file, index=index).fingerprint == first.fingerprint and made.stat().st_mtime_ns == state
    table().select([3, 1]).to_parquet(str(file))
    os.utime(file, ns=(0, 0))
    assert summary(opened(file, index=index)) == [EXPECTED[3], EXPECTED[1]]


def test_damaged_parquet_files_are_told(tmp_path: Path) -> None:
    good, bad = tmp_path / "a.parquet", tmp_path / "b.parquet"
    table().to_parquet(str(good))
    bad.write_bytes(good.read_bytes()[:-100])
    data = opened(tmp_path, index=tmp_path / "cache" / "index.json")
    assert summary(data) == EXPECTED
    assert [reason.split(" (")[0] for reason in reasons(data)] == ["b.parquet: cannot be read"], data.broken


@pytest.mark.comfy
def test_processes_read_rows_as_this_one_does(tmp_path: Path) -> None:
    from comfyui_controlnext.tools.reader_processes import ProcessReaders

    table().to_parquet(str(tmp_path / "a.parquet"))
    data, readers = opened(tmp_path, index=tmp_path / "cache" / "index.json"), ProcessReaders(1)
    try:
        for index in range(COUNT):
            one, other = data.load(index, 0, index), readers.submit(data.job(index, 0, index, True)).result()
            assert torch.equal(one.frames, other.frames) and torch.equal(one.hints, other.hints)
        assert len(readers._started) == 1
    finally:
        readers.close()
