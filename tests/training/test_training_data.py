"""Datasets of folders and tables: matching of files, files left out, and the content of samples."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_controlnext.controlnext_core.hints import HINTS
from comfyui_controlnext.controlnext_training.data import BrokenSample, DatasetError, FileDataset, Subset, open_dataset
from comfyui_controlnext.tests.fixtures.data_fixtures import (
    NAMES,
    broken_files,
    coordinates,
    lines,
    marks,
    pairs,
    write,
)

SMALL: dict[str, Any] = {"resolution": 64, "bucket_step": 8}


def opened(*sources: Path, **options: Any) -> FileDataset:
    return open_dataset(sources, **{**SMALL, **options})


def summary(dataset: FileDataset) -> list[tuple[int, int, str]]:
    """Summary of each item: (mark of the picture, mark of its hint, caption)."""
    samples = [dataset.load(index) for index in range(len(dataset))]
    return [(*marks(s.frames), *marks(s.hints), s.caption) for s in samples]


EXPECTED = [(0, 100, "caption of a b"), (1, 101, "caption of \u00fcmlaut"), (2, 102, "caption of \u4e2d\u6587")]


def test_folders_of_images_and_hints_are_paired_by_name(tmp_path: Path) -> None:
    dataset = opened(pairs(tmp_path / "my d\u00e4ta \u4e2d"))
    assert summary(dataset) == EXPECTED
    assert dataset.captions == [caption for _, _, caption in EXPECTED]
    assert dataset.broken == () and dataset.sizes == [(64, 64)] * 3
    sample = dataset.load(0)
    assert sample.frames.shape == sample.hints.shape == (1, 64, 64, 3)
    assert sample.frames.dtype == sample.hints.dtype == torch.float32
    assert sample.mask is None and sample.original_size == (64, 64) and sample.crop == (0, 0)
    assert torch.equal(sample.frames[0], torch.from_numpy(coordinates(64, 64)).float() / 255)


@pytest.mark.parametrize("folder", ["hint", "Conditioning_Images", "conditioning", "control"])
@pytest.mark.parametrize("images", ["images/", "image/", ""])
def test_the_common_names_of_folders_are_understood(tmp_path: Path, folder: str, images: str) -> None:
    for name, mark in (("x", 1), ("deep er/x", 2)):
        write(tmp_path / f"{images}{name}.png", coordinates(64, 64, mark))
        write(tmp_path / folder / f"{name}.JPG", np.full((64, 64, 3), 50 * mark, np.uint8))
    assert [(a, round(b, -1)) for a, b, _ in summary(opened(tmp_path))] == [(2, 100), (1, 50)]


@pytest.mark.parametrize("ending", ["_hint.png", ".hint.png", ".Conditioning.PNG"])
def test_hints_and_masks_may_lie_beside_the_picture(tmp_path: Path, ending: str) -> None:
    write(tmp_path / "a b" / "x.PNG", coordinates(64, 64, 7))
    write(tmp_path / "a b" / f"x{ending}", coordinates(64, 64, 8))
    write(tmp_path / "a b" / "x_mask.png", np.full((64, 64), 255, np.uint8))
    write(tmp_path / "a b" / "x.TXT", "\ufeffa c\u00e4t\r\n")
    dataset = opened(tmp_path)
    assert summary(dataset) == [(7, 8, "a c\u00e4t")]
    mask = dataset.load(0).mask
    assert mask is not None and torch.equal(mask, torch.ones(1, 64, 64))
    assert opened(tmp_path, mask="none").load(0).mask is None


def test_an_ending_counts_only_where_the_picture_without_it_is_there(tmp_path: Path) -> None:
    write(tmp_path / "gas_mask.png", coordinates(64, 64, 1))
    assert len(opened(tmp_path, hint="gray")) == 1


def test_of_two_hints_the_one_with_the_pictures_suffix_counts(tmp_path: Path) -> None:
    write(tmp_path / "images" / "x.png", coordinates(64, 64))
    write(tmp_path / "hints" / "x.bmp", coordinates(64, 64, 1))
    write(tmp_path / "hints" / "x.png", coordinates(64, 64, 2))
    dataset = opened(tmp_path)
    assert summary(dataset)[0][:2] == (0, 2)
    ((path, why),) = dataset.broken
    assert path.endswith("x.bmp") and "without a picture" in why


@pytest.mark.parametrize("kind", sorted(HINTS))
def test_hints_are_computed_from_the_frame_as_it_is_cut(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "x.png", np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8))
    sample = opened(tmp_path, hint=kind).load(0)
    assert torch.equal(sample.hints[0], torch.from_numpy(HINTS[kind](sample.frames[0].numpy())))


def test_the_mask_hint_shows_the_mask_file_or_the_alpha_channel(tmp_path: Path) -> None:
    half = np.zeros((64, 64), np.uint8)
    half[:, 32:] = 255
    write(tmp_path / "images" / "a.png", coordinates(64, 64))
    write(tmp_path / "masks" / "a.png", half)
    write(tmp_path / "images" / "b.png", np.dstack([coordinates(64, 64), half.T]))
    wanted = torch.from_numpy(half).bool()
    for mask in ("auto", "none", "alpha"):
        dataset = opened(tmp_path, hint="mask", mask=mask)
        assert torch.equal(dataset.load(0).hints[0, ..., 0].bool(), wanted)
        assert torch.equal(dataset.load(1).hints[0, ..., 0].bool(), wanted.T)
        regions = [dataset.load(index).mask is not None for index in (0, 1)]
        assert regions == {"auto": [True, False], "none": [False, False], "alpha": [True, True]}[mask]
    region = opened(tmp_path, hint="gray", mask="alpha").load(1).mask
    assert region is not None and torch.equal(region[0].bool(), wanted.T)


def test_picture_hint_and_mask_of_different_sizes_are_cut_alike(tmp_path: Path) -> None:
    write(tmp_path / "images" / "x.png", coordinates(120, 200))
    write(tmp_path / "hints" / "x.png", coordinates(60, 100))
    write(tmp_path / "masks" / "x.png", coordinates(240, 400)[..., 0])
    for buckets in (True, False):
        dataset = opened(tmp_path, buckets=buckets)
        sample = dataset.load(0)
        assert sample.frames.shape[1:3] == sample.hints.shape[1:3] == dataset.sizes[0]
        assert sample.original_size == (120, 200) and (dataset.sizes[0] == (64, 64)) is not buckets
        difference = (sample.frames - sample.hints)[..., :2].abs().max()
        assert difference < 1 / 60
        assert sample.mask is not None
        assert (sample.frames[..., 0] - sample.mask).abs().max() < 1 / 100
    assert sample.crop == (0, (107 - 64) // 2)


def test_small_pictures_are_enlarged_smoothly_and_their_hints_are_not(tmp_path: Path) -> None:
    halves = np.zeros((16, 16, 3), np.uint8)
    halves[:, 8:] = 255
    write(tmp_path / "images" / "x.png", halves)
    write(tmp_path / "hints" / "x.png", halves)
    sample = opened(tmp_path).load(0)
    assert len(sample.hints.unique()) == 2 < len(sample.frames.unique())


def test_broken_files_are_listed_with_their_reason_and_skipped(tmp_path: Path) -> None:
    root = pairs(tmp_path / "d")
    reasons = broken_files(root / "images")
    for name in reasons:
        write(root / "hints" / name.replace(".jpg", ".png"), coordinates(64, 64))
    write(root / "images" / "no hint.png", coordinates(64, 64))
    write(root / "hints" / "no image.png", coordinates(64, 64))
    write(root / "images" / "good.png", coordinates(64, 64))
    broken_files(root / "hints" / "deep")
    write(root / "images" / "deep" / "nothing.png", coordinates(64, 64))
    write(root / "images" / "latin.png", coordinates(64, 64))
    write(root / "hints" / "latin.png", coordinates(64, 64))
    write(root / "images" / "latin.txt", "sch\u00f6n".encode("latin-1"))
    dataset = opened(root)
    assert summary(dataset) == EXPECTED
    told = {Path(path).relative_to(root).as_posix(): why for path, why in dataset.broken}
    for name, reason in reasons.items():
        assert reason in told[f"images/{name}"]
    assert "has no hint" in told["images/no hint.png"] and "has no hint" in told["images/good.png"]
    assert "without a picture" in told["hints/no image.png"]
    assert "0 bytes" in told["hints/deep/nothing.PNG"]
    assert "UTF-8" in told["images/latin.txt"]
    assert len(told) == len(dataset.broken)


def test_nothing_usable_is_an_error_that_names_files_and_the_remedy(tmp_path: Path) -> None:
    broken_files(tmp_path / "x")
    with pytest.raises(
        DatasetError, match=r"nothing usable of 3 files.*nothing.PNG: is empty .0 bytes.*Pairs are images/NAME"
    ):
        opened(tmp_path / "x")
    (tmp_path / "y").mkdir()
    with pytest.raises(DatasetError, match="no pictures there"):
        opened(tmp_path / "y")
    with pytest.raises(DatasetError, match=r"gone: no such folder"):
        opened(tmp_path / "gone")
    with pytest.raises(DatasetError, match=r"notes.md: is not a dataset"):
        opened(write(tmp_path / "notes.md", "x"))
    for name in ("hint", "mask", "reference"):
        with pytest.raises(DatasetError, match=f"{name}: 'x' is unknown. Choose one of "):
            opened(tmp_path, **{name: "x"})


def test_a_file_that_changes_or_goes_after_opening_is_a_broken_sample(tmp_path: Path) -> None:
    root = pairs(tmp_path)
    dataset = opened(root)
    write(root / "hints" / "a b.png", coordinates(64, 64, 55))
    (root / "images" / "\u4e2d\u6587.png").unlink()
    with pytest.raises(BrokenSample, match=r"hints.a b.png: has changed"):
        dataset.load(0)
    with pytest.raises(BrokenSample) as caught:
        dataset.load(2)
    assert caught.value.path.endswith("\u4e2d\u6587.png")
    assert dataset.load(1).caption == EXPECTED[1][2]


def test_hidden_files_and_links_in_a_circle_are_passed_over(tmp_path: Path) -> None:
    root = pairs(tmp_path / "d")
    write(root / "images" / "._a b.png", b"x")
    write(root / ".cache" / "x.png", coordinates(64, 64))
    write(root / "__MACOSX" / "x.png", b"x")
    os.symlink(root, root / "images" / "again", target_is_directory=True)
    elsewhere = write(tmp_path / "other" / "z.png", coordinates(64, 64, 9)).parent
    os.symlink(elsewhere, root / "images" / "linked", target_is_directory=True)
    write(root / "hints" / "linked" / "z.png", coordinates(64, 64, 99))
    dataset = opened(root)
    assert summary(dataset) == [*EXPECTED[:1], (9, 99, ""), *EXPECTED[1:]] and dataset.broken == ()


def test_files_outside_of_the_roots_are_not_read(tmp_path: Path) -> None:
    root = pairs(tmp_path / "d")
    outside = write(tmp_path / "secret.png", coordinates(64, 64))
    os.symlink(outside, root / "images" / "link.png")
    write(root / "hints" / "link.png", coordinates(64, 64))
    assert len(opened(root)) == 4
    dataset = opened(root, roots=[root])
    assert summary(dataset) == EXPECTED
    assert any("link.png" in path and "is outside of" in why for path, why in dataset.broken)
    for name in (str(outside), "../secret.png", "images/link.png"):
        table = write(root / "list.jsonl", lines([{"file_name": name}, {"file_name": "images/a b.png"}]))
        dataset = opened(table, roots=[root], hint="gray")
        assert len(dataset) == 1 and "is outside of" in dataset.broken[0].why


def test_the_order_is_that_of_names_without_case_and_the_same_for_every_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("B", "a", "C/x", "\u00c4", "10", "9", "c")
    root = pairs(tmp_path, names)
    one = opened(root)
    real = os.walk

    def reversed_walk(*args: Any, **kwargs: Any) -> Any:
        for folder, folders, files in real(*args, **kwargs):
            folders.reverse()
            yield folder, folders, files[::-1]

    monkeypatch.setattr(os, "walk", reversed_walk)
    other = opened(root)
    assert one.captions == other.captions == [f"caption of {n}" for n in ("10", "9", "a", "B", "c", "C/x", "\u00c4")]
    assert one.fingerprint == other.fingerprint


def test_fingerprint_and_keys_tell_contents_apart_and_not_places(tmp_path: Path) -> None:
    one, same = opened(pairs(tmp_path / "one")), opened(pairs(tmp_path / "two"))
    assert one.fingerprint == same.fingerprint
    assert one.frame_keys(0) == same.frame_keys(0) == one.load(0).frame_keys == (one.load(0).key,)
    keys = {one.frame_keys(index) for index in range(3)}
    assert len(keys) == 3
    others = [
        opened(tmp_path / "one", resolution=128),
        opened(tmp_path / "one", hint="canny"),
        opened(tmp_path / "one", hint="gray"),
    ]
    write(tmp_path / "two" / "hints" / "a b.png", coordinates(64, 64, 77))
    others.append(opened(tmp_path / "two"))
    write(tmp_path / "two" / "masks" / "a b.png", coordinates(64, 64, 77))
    others.append(opened(tmp_path / "two"))
    assert len({one.frame_keys(0), *(other.frame_keys(0) for other in others)}) == 6
    write(tmp_path / "one" / "images" / "a b.txt", "another caption")
    assert opened(tmp_path / "one").fingerprint not in {one.fingerprint, *(other.fingerprint for other in others)}
    assert opened(tmp_path / "one").frame_keys(0) == one.frame_keys(0)


def test_several_sources_come_one_after_the_other_and_a_subset_is_a_dataset(tmp_path: Path) -> None:
    one, two = pairs(tmp_path / "one"), pairs(tmp_path / "two", ["z"], (64, 128))
    dataset = opened(two, one)
    assert dataset.captions == ["caption of z", *(f"caption of {name}" for name in NAMES)]
    part = Subset(dataset, [3, 0])
    assert len(part) == 2 and part.sizes == [dataset.sizes[3], dataset.sizes[0]]
    assert part.captions == [dataset.captions[3], "caption of z"]
    assert torch.equal(part.load(1).frames, dataset.load(0).frames) and part.frame_keys(1) == dataset.frame_keys(0)
    assert part.fingerprint != Subset(dataset, [0, 3]).fingerprint != dataset.fingerprint
    with pytest.raises(DatasetError, match="No items are left"):
        Subset(dataset, [])
