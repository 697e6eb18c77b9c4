"""Synthetic scenes: the caption matches the picture, and the hints match it exactly."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_controlnext.controlnext_core.picturebook import HINTS, PLANES, Picture
from comfyui_controlnext.controlnext_training.data.samples import DatasetError
from comfyui_controlnext.controlnext_training.drawn import HINTS_OF, SCHEMES, open_drawn
from comfyui_controlnext.controlnext_training.synthetic import COLORS, KINDS, draw, write_folder

SCENES = range(40)
WORDS = re.compile(rf"an? ({'|'.join(COLORS)}) ({'|'.join(KINDS)}|background)")


def named(scene: Picture) -> tuple[list[tuple[str, str]], str]:
    """Colours and kinds of the shapes, and the background's colour, from the caption."""
    found = WORDS.findall(scene.caption)
    assert found[-1][1] == "background"
    return found[:-1], found[-1][0]


def nearest_color(pixels: np.ndarray) -> str:
    """Colour whose shades are closest to the mean of (n, 3) pixels."""
    mean = pixels.astype(float).mean(axis=0)
    return min(COLORS, key=lambda name: float(np.abs(np.asarray(COLORS[name]) - mean).sum()))


def parts(scene: Picture) -> list[np.ndarray]:
    """Masks (H, W) of the connected parts of the mask, largest first."""
    import cv2

    count, labels = cv2.connectedComponents((scene.mask > 250).astype(np.uint8))
    return sorted((labels == i for i in range(1, count)), key=lambda part: -int(part.sum()))


def test_a_scene_is_the_same_on_every_system() -> None:
    """The numbers of one machine, pinned: no library's random numbers or sines are in a scene."""
    digest = hashlib.sha256()
    for index in range(12):
        scene = draw(7, index, (96, 128))
        for array in (scene.image, scene.edges, scene.mask, scene.depth):
            digest.update(array.tobytes())
        digest.update(scene.caption.encode())
    assert digest.hexdigest() == "c61c1b07737302b43a918d955ab9622380b22238bd3321decbce72aae9a5e917"


def test_captions_read_like_sentences() -> None:
    captions = [draw(0, index, 32).caption for index in range(200)]
    shape = rf"an? (?:{'|'.join(COLORS)}) (?:{'|'.join(KINDS)})"
    sentence = re.compile(rf"(?:{shape}|{shape} and {shape}|{shape}, {shape} and {shape}) on an? \w+ background")
    assert all(sentence.fullmatch(caption) for caption in captions)
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", caption) for caption in captions)


def test_scenes_differ_and_show_every_colour_kind_and_count() -> None:
    scenes = [draw(0, index, 32) for index in range(200)]
    assert len({scene.image.tobytes() for scene in scenes}) == 200
    shapes = [named(scene) for scene in scenes]
    assert {color for found, _ in shapes for color, _ in found} == set(COLORS) == {back for _, back in shapes}
    assert {kind for found, _ in shapes for _, kind in found} == set(KINDS)
    assert {len(found) for found, _ in shapes} == {1, 2, 3}
    areas = [scene.mask.mean() / 255 / len(found) for scene, (found, _) in zip(scenes, shapes, strict=True)]
    assert max(areas) > 4 * min(areas), "several sizes"
    assert (
        draw(1, 0, 32).caption != draw(0, 0, 32).caption or draw(1, 0, 32).image.tobytes() != scenes[0].image.tobytes()
    )


@pytest.mark.parametrize("index", SCENES)
def test_the_colours_of_the_caption_are_on_the_picture(index: int) -> None:
    scene = draw(3, index, 128)
    shapes, background = named(scene)
    assert nearest_color(scene.image[scene.mask == 0]) == background
    colors = {color for color, _ in shapes}
    inside = scene.image[scene.mask == 255].astype(float)
    distances = np.abs(inside[:, None] - np.asarray(list(COLORS.values()), float)).sum(axis=2)
    counts = np.bincount(distances.argmin(axis=1), minlength=len(COLORS))
    assert colors <= {name for name, count in zip(COLORS, counts, strict=True) if count > 0.01 * len(inside)}
    assert len(shapes) == len(colors)


def kind_of(part: np.ndarray) -> str:
    """Kind of a shape, from the ratio of its area to that of its smallest enclosing circle."""
    import cv2

    contours, _ = cv2.findContours(part.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    _, radius = cv2.minEnclosingCircle(contours[0])
    share = float(part.sum() / (np.pi * (radius + 0.5) ** 2))
    shares = {"circle": 1.0, "square": 2 / np.pi, "triangle": 0.75 * np.sqrt(3) / np.pi}
    return min(shares, key=lambda kind: abs(shares[kind] - share))


def test_shapes_that_stand_alone_are_what_the_caption_calls_them() -> None:
    apart = 0
    for index in SCENES:
        scene = draw(5, index, 256)
        shapes, _ = named(scene)
        separate = parts(scene)
        if len(separate) == len(shapes):
            apart += 1
            assert sorted((nearest_color(scene.image[p]), kind_of(p)) for p in separate) == sorted(shapes)
    assert apart > len(SCENES) // 2


@pytest.mark.parametrize("index", SCENES)
@pytest.mark.parametrize("size", [64, (192, 256)], ids=str)
def test_the_edges_are_where_mask_or_colour_change(index: int, size: int | tuple[int, int]) -> None:
    """Outlines cover every border of the mask, and no edge is away from a border of a shape."""
    import cv2

    scene = draw(0, index, size)
    inside = (scene.mask > 127).astype(np.uint8)
    border = cv2.morphologyEx(inside, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    edges = scene.edges > 127
    near_edges = cv2.dilate(edges.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert near_edges[border].mean() > 0.98
    change = np.abs(np.diff(scene.image.astype(int), axis=0, prepend=scene.image[:1])).sum(axis=2)
    change = np.maximum(
        change, np.abs(np.diff(scene.image.astype(int), axis=1, prepend=scene.image[:, :1])).sum(axis=2)
    )
    near_change = cv2.dilate((change > 8).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert near_change[edges].all()
    assert edges.any() and edges.mean() < 0.25


@pytest.mark.parametrize("index", range(10))
def test_shapes_are_nearer_than_the_floor_and_the_floor_comes_nearer(index: int) -> None:
    scene = draw(2, index, 96)
    floor = scene.mask == 0
    assert scene.depth[scene.mask == 255].min() > scene.depth[floor].max()
    rows = [scene.depth[y][floor[y]] for y in range(96) if floor[y].any()]
    assert all(int(np.ptp(row)) <= 1 for row in rows) and rows[0][0] + 30 < rows[-1][0]  # 1: beside a soft outline
    assert np.ptp(scene.depth[scene.mask == 255].astype(int)) > 20, "shapes bulge"


def test_outlines_are_soft() -> None:
    scene = draw(0, 1, 64)
    between = (scene.mask > 0) & (scene.mask < 255)
    assert 20 < between.sum() < 400
    assert len(np.unique(scene.mask)) > 20


@pytest.mark.parametrize("size", [1, 8, 64, (64, 96), (96, 64), (40, 200)], ids=str)
def test_sizes_are_as_asked(size: int | tuple[int, int]) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    scene = draw(0, 0, size)
    assert scene.image.shape == (height, width, 3)
    for name in HINTS:
        assert scene.hint(name).shape == (height, width, 3)
    assert all(getattr(scene, name).shape == (height, width) for name in PLANES)
    assert all(array.dtype == np.uint8 for array in (scene.image, scene.edges, scene.mask, scene.depth))


def test_a_larger_picture_shows_the_same_scene() -> None:
    import cv2

    for index in range(8):
        small, large = draw(4, index, 64), draw(4, index, 256)
        assert small.caption == large.caption
        shrunk = cv2.resize(large.image, (64, 64), interpolation=cv2.INTER_AREA).astype(int)
        assert np.abs(shrunk - small.image).mean() < 1.0


def test_an_unknown_hint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hint: 'normal' is unknown. A drawn picture has edges, mask, depth, pose"):
        write_folder(tmp_path, 1, 32, hint="normal")


@pytest.mark.parametrize("hint", HINTS)
def test_a_written_folder_is_read_as_pairs(tmp_path: Path, hint: str) -> None:
    from comfyui_controlnext.controlnext_training.data import open_dataset

    folder = write_folder(tmp_path / "größe 1", 5, 64, seed=3, hint=hint)
    assert len(list(folder.rglob("*.*"))) == 15
    dataset = open_dataset([folder], hint="paired", resolution=64)
    assert len(dataset) == 5 and not dataset.broken
    samples = [dataset.load(i) for i in range(5)]
    scenes = [draw(3, i, 64) for i in range(5)]
    assert [sample.caption for sample in samples] == [scene.caption for scene in scenes]
    for sample, scene in zip(samples, scenes, strict=True):
        assert torch.equal((sample.frames[0] * 255).round().byte(), torch.from_numpy(scene.image))
        assert torch.equal((sample.hints[0] * 255).round().byte(), torch.from_numpy(scene.hint(hint)))


def test_a_folder_is_written_the_same_twice(tmp_path: Path) -> None:
    first, second = (write_folder(tmp_path / name, 3, (48, 64), 1) for name in "ab")
    paths = [path.relative_to(first) for path in sorted(first.rglob("*.*"))]
    assert all((first / path).read_bytes() == (second / path).read_bytes() for path in paths)


@pytest.mark.parametrize(("scheme", "hint"), [(scheme, hint) for scheme in SCHEMES for hint in HINTS_OF[scheme]])
def test_a_drawn_source_holds_the_pictures_of_its_seed(scheme: str, hint: str) -> None:
    dataset = open_drawn(f"{scheme}:{hint}:3:5", 64, "paired")
    assert len(dataset) == 3
    for index in range(3):
        picture, sample = SCHEMES[scheme](5, index, 64), dataset.load(index)
        assert dataset.captions[index] == sample.caption == picture.caption
        assert torch.equal((sample.frames[0] * 255).round().byte(), torch.from_numpy(picture.image))
        assert torch.equal((sample.hints[0] * 255).round().byte(), torch.from_numpy(picture.hint(hint)))


def test_sources_of_two_schemes_are_told_apart() -> None:
    opened = [open_drawn(f"{scheme}:edges:3", 64, "paired") for scheme in SCHEMES]
    assert len({dataset.fingerprint for dataset in opened}) == len(SCHEMES)
    assert len({dataset.frame_keys(0) for dataset in opened}) == len(SCHEMES)


@pytest.mark.parametrize("wrong", ["picturebook", "picturebook:pose:3", "picturebook:edges:0", "picturebook:edges:3:x"])
def test_a_drawn_source_that_is_not_understood_says_how_to_write_it(wrong: str) -> None:
    with pytest.raises(DatasetError, match="Write picturebook:HINT:COUNT, HINT one of edges, mask, depth"):
        open_drawn(wrong, 64, "paired")
