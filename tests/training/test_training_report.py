"""Report on a dataset: its counts and names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from comfyui_controlnext.controlnext_training.data import TensorDataset, open_dataset, report
from comfyui_controlnext.tests.fixtures.data_fixtures import broken_files, coordinates, pairs, write


def test_counts_sizes_captions_masks_duplicates_and_broken_files(tmp_path: Path) -> None:
    root = pairs(tmp_path / "my d\u00e4ta", ["a", "b"])
    for name, size in (("large", (200, 300)), ("small", (20, 30))):
        write(root / "images" / f"{name}.png", coordinates(*size))
        write(root / "hints" / f"{name}.png", coordinates(*size))
    for name in ("twin", "another twin"):
        write(root / "images" / f"{name}.png", coordinates(64, 64, 7))
        write(root / "hints" / f"{name}.png", coordinates(64, 64, 7))
    write(root / "masks" / "a.png", coordinates(64, 64))
    broken_files(root / "images")
    found = report(open_dataset(root, resolution=64, bucket_step=8))
    assert found.items == 6 and sum(found.buckets.values()) == 6
    assert found.buckets == {(48, 80): 2, (64, 64): 4}
    assert found.originals == {(20, 30): 1, (64, 64): 4, (200, 300): 1}
    assert found.enlarged == 1 and found.with_mask == 1 and len(found.broken) == 3
    assert [Path(path).stem for path in found.without_caption] == ["another twin", "large", "small", "twin"]
    assert [[Path(path).stem for path in group] for group in found.duplicates] == [["another twin", "twin"]]
    for part in (
        "6 samples",
        "64x64: 4",
        "from 30x20 to 300x200",
        "1 are smaller",
        "1 have a mask",
        "4 have no caption",
    ):
        assert part in found.text
    for part in ("1 groups of files are the same", "another twin.png", "3 files are left out", "nothing.PNG: is empty"):
        assert part in found.text
    places = [found.text.index(part) for part in ("files are left out", "are the same", "no caption", "6 samples")]
    assert places == sorted(places), "problems first"


def test_long_lists_are_cut_in_the_text_and_whole_in_the_report(tmp_path: Path) -> None:
    for number in range(30):
        write(tmp_path / f"{number:03}.png", coordinates(8, 8, number))
    found = report(open_dataset(tmp_path, hint="gray", resolution=8, bucket_step=8))
    assert len(found.without_caption) == 30 and "  and 10 more" in found.text


def test_images_from_the_graph_are_reported_too() -> None:
    images = np.stack([coordinates(64, 64, mark) for mark in range(3)]).astype(np.float32) / 255
    found = report(TensorDataset(torch.from_numpy(images), torch.from_numpy(images), ["a", "", "c"]))
    assert found.items == 3 and found.without_caption == ("sample 1",) and "64x64: 3" in found.text


def test_hints_of_another_aspect_and_coarse_hints_are_named_first(tmp_path: Path) -> None:
    for name, size in (("alike", (64, 64)), ("wide", (64, 96)), ("small", (24, 24)), ("half", (32, 32))):
        write(tmp_path / "images" / f"{name}.png", coordinates(64, 64))
        write(tmp_path / "hints" / f"{name}.png", coordinates(*size))
    found = report(open_dataset(tmp_path, resolution=64))
    assert [Path(path).stem for path in found.stretched] == ["wide"]
    assert [Path(path).stem for path in found.coarse] == ["small"]
    lines = found.text.splitlines()
    assert lines[0] == "1 have a hint of another aspect, which is stretched over the picture:"
    assert next(n for n, line in enumerate(lines) if "much smaller" in line) < lines.index("  64x64: 4")


def test_kinds_of_pictures_that_are_not_read_are_said(tmp_path: Path) -> None:
    pairs(tmp_path)
    for name in ("images/a.gif", "images/b.GIF", "hints/c.tiff"):
        write(tmp_path / name, b"x")
    said = {Path(path).name: why for path, why in open_dataset(tmp_path, resolution=64).broken}
    assert said.keys() == {"a.gif", "c.tiff"} and "(.gif)" in said["a.gif"] and "as 1 more" in said["a.gif"]
    assert "Save it as png, jpg, webp or bmp" in said["c.tiff"]


def test_pictures_that_share_one_hint_are_said(tmp_path: Path) -> None:
    root = pairs(tmp_path / "d")
    one, other = (write(root / "images" / f"i.{suffix}", coordinates(64, 64, 5)) for suffix in ("JPG", "png"))
    write(root / "hints" / "i.png", coordinates(64, 64, 6))
    found = report(open_dataset(root, resolution=64))
    assert found.shared == ((str(one), str(other)),)
    assert f"1 groups of pictures share one hint:\n  {one}, {other}" in found.text
