"""Metadata files and tar shards: rows, members, and their faults."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_training.data import FileDataset, open_dataset
from comfyui_controlnext.tests.fixtures.data_fixtures import coordinates, encoded, lines, marks, pairs, shard, write


def opened(source: Path, **options: Any) -> FileDataset:
    return open_dataset(source, **{"resolution": 64, "bucket_step": 8, **options})


def summary(dataset: FileDataset) -> list[tuple[int, int, str]]:
    samples = [dataset.load(index) for index in range(len(dataset))]
    return [(*marks(s.frames), *marks(s.hints), s.caption) for s in samples]


def picture(mark: int, size: tuple[int, int] = (64, 64)) -> bytes:
    return encoded(coordinates(*size, mark=mark))


def files(root: Path, count: int = 3) -> None:
    """Files p/N.png with mark N and h/N.png with mark 100 + N."""
    for number in range(count):
        write(root / "p" / f"\u00e4 {number}.png", picture(number))
        write(root / "h" / f"\u4e2d {number}.png", picture(100 + number))


def row(number: int, image: str = "file_name", hint: str = "conditioning_image", text: str = "text") -> dict[str, Any]:
    return {image: f"p/\u00e4 {number}.png", hint: f"h/\u4e2d {number}.png", text: f"t\u00ebxt {number}"}


EXPECTED = [(number, 100 + number, f"t\u00ebxt {number}") for number in range(3)]


@pytest.mark.parametrize("kind", ["table", "file beside the picture"])
def test_a_lone_surrogate_in_a_caption_is_written_as_its_escape(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "a.png", picture(0))
    if kind == "table":
        write(tmp_path / "metadata.jsonl", json.dumps({"file_name": "a.png", "text": "a\ud800b"}))
    else:
        write(tmp_path / "a.json", json.dumps({"caption": "a\ud800b"}))
    dataset = opened(tmp_path, hint="canny")
    assert dataset.captions == [dataset.load(0).caption] == ["a\\ud800b"]
    assert len(dataset.fingerprint) == 32


@pytest.mark.parametrize(
    "columns",
    [
        ("file_name", "conditioning_image", "text"),
        ("file_name", "hint", "caption"),
        ("file_name", "conditioning_image_file_name", "text"),
        ("image", "pose", "caption"),
        ("image_file_name", "hint_file_name", "prompt"),
        ("target", "source", "prompt"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "json lines", "json list", "json columns", "csv"])
def test_tables_of_each_kind_and_vocabulary_are_read(tmp_path: Path, columns: tuple[str, str, str], kind: str) -> None:
    files(tmp_path)
    rows = [row(number, *columns) for number in range(3)]
    text = {
        "jsonl": lines(rows) + "\n",
        "json lines": lines(rows),
        "json list": json.dumps(rows),
        "json columns": json.dumps({name: [r[name] for r in rows] for name in columns}),
        "csv": "\ufeff" + "\r\n".join([",".join(columns), *(",".join(r.values()) for r in rows)]),
    }[kind]
    dataset = opened(write(tmp_path / f"my list.{kind.split()[0].upper()}", text))
    assert summary(dataset) == EXPECTED and dataset.broken == ()


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "prompt.json"])
def test_a_folder_with_a_table_is_what_the_table_says(tmp_path: Path, name: str) -> None:
    """Tables apply in sub-folders too, as in Hugging Face's imagefolder with splits."""
    files(tmp_path / "train", 4)
    rows = [row(number) for number in range(3)]
    text = "\n".join([",".join(rows[0]), *(",".join(r.values()) for r in rows)]) if "csv" in name else lines(rows)
    write(tmp_path / "train" / name, text)
    pairs(tmp_path / "more", ["z"])
    dataset = opened(tmp_path)
    assert summary(dataset) == [*EXPECTED, (0, 100, "caption of z")]
    ((path, why),) = dataset.broken
    assert path.endswith(name) and "does not name 2 pictures" in why


def test_what_a_row_leaves_out_is_found_by_name(tmp_path: Path) -> None:
    pairs(tmp_path, ["a", "b"])
    write(tmp_path / "masks" / "a.png", picture(0))
    rows = [{"file_name": "images/a.png"}, {"file_name": "images/B.PNG", "text": "own"}]
    write(tmp_path / "metadata.jsonl", lines(rows))
    dataset = opened(tmp_path)
    assert summary(dataset) == [(0, 100, "caption of a"), (1, 101, "own")]
    assert dataset.load(0).mask is not None and dataset.broken == ()


def test_rows_name_masks_and_rows_without_text_have_none(tmp_path: Path) -> None:
    files(tmp_path)
    rows = [{**row(0), "mask": "h/\u4e2d 0.png"}, {**row(1), "text": None}, {**row(2), "text": ["one", "two"]}]
    dataset = opened(write(tmp_path / "x.jsonl", lines(rows)))
    assert dataset.captions == ["t\u00ebxt 0", "", "one"]
    assert [dataset.load(index).mask is not None for index in range(3)] == [True, False, False]


def test_rows_that_cannot_be_used_are_listed_by_number(tmp_path: Path) -> None:
    files(tmp_path)
    write(tmp_path / "notes.md", "x")
    write(tmp_path / "p" / "bad.png", "text")
    bad = [
        "{not json",
        "[1, 2]",
        json.dumps({"text": "no picture"}),
        json.dumps({"file_name": "gone.png"}),
        json.dumps({"file_name": 5}),
        json.dumps({"file_name": "notes.md"}),
        json.dumps({**row(0), "conditioning_image": "gone.png"}),
        json.dumps({**row(0), "file_name": "a\0b.png"}),
        json.dumps({**row(0), "file_name": "p/bad.png"}),
    ]
    dataset = opened(write(tmp_path / "x.jsonl", "\n".join([*bad, *lines(map(row, range(3))).splitlines()])))
    assert summary(dataset) == EXPECTED
    told = [f"{Path(path).name}: {why}" for path, why in dataset.broken]
    parts = ["is not JSON", "not a row", "names no picture", "not there", "int, not the path", "of none", "not there"]
    for number, part in enumerate(parts, 1):
        assert told[number - 1].startswith(f"x.jsonl, row {number}: ") and part in told[number - 1]
    assert told[7].startswith("x.jsonl, row 8: ") and told[8].startswith("bad.png: is not a readable")
    assert len(told) == 9


def test_where_a_picture_is_from_is_not_its_hint(tmp_path: Path) -> None:
    pairs(tmp_path, ["a"])
    write(tmp_path / "metadata.jsonl", lines([{"file_name": "images/a.png", "source": "https://a.b/c", "text": ""}]))
    assert summary(opened(tmp_path)) == [(0, 100, "caption of a")]


def test_computed_hints_need_none_of_the_tables(tmp_path: Path) -> None:
    files(tmp_path)
    rows = [{**row(0), "conditioning_image": "gone.png"}, {"file_name": "p/\u00e4 1.png", "source": "https://a.b/c"}]
    dataset = opened(write(tmp_path / "x.jsonl", lines(rows)), hint="gray")
    assert len(dataset) == 2 and dataset.broken == ()


@pytest.mark.parametrize("content", [b"\xff\xfe\0", b"", b"[1", b"[" * 100_000])
def test_a_table_that_cannot_be_read_is_listed(tmp_path: Path, content: bytes) -> None:
    pairs(tmp_path / "good", ["z"])
    files(tmp_path / "x")
    for name in ("metadata.jsonl", "prompt.json"):
        write(tmp_path / "x" / name, content)
        dataset = opened(tmp_path)
        assert summary(dataset) == [(0, 100, "caption of z")]
        assert any(name in path for path, _ in dataset.broken)


def webdataset(count: int = 3) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for number in range(count):
        key = f"d\u00ef r/{number:04}"
        members |= {f"{key}.png": picture(number), f"{key}.hint.png": picture(100 + number)}
        text = f"t\u00ebxt {number}"
        members |= {f"{key}.txt": text.encode()} if number % 2 else {f"{key}.json": json.dumps({"text": text}).encode()}
    return members


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_shards_are_read_in_place(tmp_path: Path, layout: int) -> None:
    path = shard(tmp_path / "my sh\u00e4rd.TAR", webdataset(), format=layout)
    assert summary(opened(path)) == EXPECTED
    in_folder = opened(tmp_path)
    assert summary(in_folder) == EXPECTED and in_folder.broken == ()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name], "nothing was unpacked"


def test_shards_and_folders_of_the_same_files_have_the_same_keys(tmp_path: Path) -> None:
    for name, content in webdataset().items():
        write(tmp_path / "folder" / name, content)
    folder, packed = opened(tmp_path / "folder"), opened(shard(tmp_path / "x.tar", webdataset()))
    assert folder.fingerprint == packed.fingerprint
    assert torch.equal(folder.load(1).frames, packed.load(1).frames)


def test_shards_hold_folders_tables_long_names_and_links(tmp_path: Path) -> None:
    deep = "/".join(["a long name of a folder"] * 9)
    members = {f"{deep}/images/x.png": picture(3), f"{deep}/hints/x.png": picture(4)}
    members |= {"t/a.png": picture(5), "t/b.png": picture(6)}
    table = lines([{"file_name": "a.png", "hint": "b.png", "text": "row"}])
    path = shard(tmp_path / "x.tar", {**members, "t/metadata.jsonl": table.encode()})
    with tarfile.open(path, "a") as tar:
        for name, kind, target in (
            ("t/again.png", tarfile.LNKTYPE, "t/a.png"),
            ("t/again_hint.png", tarfile.SYMTYPE, "b.png"),
            ("t/lost.png", tarfile.SYMTYPE, "../../etc/x.png"),
            ("t/pipe.png", tarfile.FIFOTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    dataset = opened(path)
    assert sorted(summary(dataset)) == [(3, 4, ""), (5, 6, "row")]
    told = "\n".join(f"{path}: {why}" for path, why in dataset.broken)
    assert "t/lost.png: is not a plain file" in told and "t/pipe.png: is not a plain file" in told
    assert "does not name" in told and "t/again" in told


def test_damage_in_a_shard_costs_what_is_damaged_alone(tmp_path: Path) -> None:
    members = {f"{number}.png": picture(number) for number in range(6)} | {"bad.png": b"text"}
    path = shard(tmp_path / "x.tar", members)
    with tarfile.open(path) as tar:
        places = {member.name: (member.offset, member.offset_data, member.size) for member in tar}
    content = bytearray(path.read_bytes())
    content[places["2.png"][0] : places["2.png"][0] + 200] = b"\xaa" * 200  # its header
    content[places["4.png"][1] + 40 : places["4.png"][1] + 80] = b"\xaa" * 40  # its bytes
    path.write_bytes(content)
    dataset = opened(path, hint="gray")
    assert [mark for index in range(4) for mark in marks(dataset.load(index).frames)] == [0, 1, 3, 5]
    told = [f"{path}: {why}" for path, why in dataset.broken]
    assert len(told) == 3
    assert any(f"bytes {places['2.png'][0]:,} to {places['3.png'][0]:,}: hold no readable" in line for line in told)
    assert any("x.tar/4.png: is not a readable picture" in line for line in told)
    assert any("x.tar/bad.png: is not a readable picture" in line for line in told)


@pytest.mark.parametrize("part", ["in the middle of a member", "in a header"])
def test_a_shard_that_is_cut_off_gives_what_is_whole(tmp_path: Path, part: str) -> None:
    path = shard(tmp_path / "x.tar", {f"{number}.png": picture(number) for number in range(4)})
    with tarfile.open(path) as tar:
        last = tar.getmember("3.png")
    size = last.offset_data + 100 if part == "in the middle of a member" else last.offset + 200
    path.write_bytes(path.read_bytes()[:size])
    dataset = opened(path, hint="gray")
    assert len(dataset) == 3
    assert {path.removesuffix(": 3.png").split(": bytes")[0] for path, _ in dataset.broken} == {str(path)}


def test_what_is_no_plain_tar_is_listed_with_the_remedy(tmp_path: Path) -> None:
    pairs(tmp_path, ["z"])
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz"):
        pass
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(tmp_path / "images", "images")
    write(tmp_path / "text.tar", "hello " * 500)
    write(tmp_path / "empty.tar", "")
    dataset = opened(tmp_path)
    assert len(dataset) == 1
    told = {Path(path.split(": bytes")[0]).name: why for path, why in dataset.broken}
    assert "Unpack it" in told["x.tar.gz"]
    assert set(told) == {"x.tar.gz", "packed.tar", "text.tar", "empty.tar"}
