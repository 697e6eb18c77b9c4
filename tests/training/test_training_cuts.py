"""Crops, mirror images, repeats and weights: hint and mask like their picture, and each sample as
often as configured.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_training.config import ConfigError, TrainConfig
from comfyui_controlnext.controlnext_training.config_files import as_toml, make_config, parse_recipe
from comfyui_controlnext.controlnext_training.data import Cache, Subset, open_dataset, order
from comfyui_controlnext.controlnext_training.data.samples import Share
from comfyui_controlnext.controlnext_training.distributed import ProcessGroup
from comfyui_controlnext.tests.fixtures.data_fixtures import coordinates, pairs, write
from comfyui_controlnext.tests.fixtures.training_fixtures import Watcher, base_of, drawn, loop_on, small, train_in
from comfyui_controlnext.tests.training.test_training_encoded import store_of

MANY = 300


def wide(root: Path, names: tuple[str, ...] = ("x",)) -> Path:
    """Pictures twice as wide as high, with hints of half the size and a mask, all encoding their coordinates."""
    for number, name in enumerate(names):
        write(root / "images" / f"{name}.png", coordinates(64, 128, number))
        write(root / "hints" / f"{name}.png", coordinates(32, 64, 100 + number))
        write(root / "masks" / f"{name}.png", coordinates(128, 256)[..., 0])
        write(root / "images" / f"{name}.txt", f"{name}, its left hand")
    return root


def opened(root: Path, crops: int = 1, flip: bool = False) -> Any:
    return open_dataset(root, resolution=64, buckets=False, shares=[Share(crops=crops, flip=flip)])


def test_a_crop_and_its_mirror_image_are_cut_alike_from_picture_hint_and_mask(tmp_path: Path) -> None:
    data = opened(wide(tmp_path), crops=4, flip=True)
    assert data.share(0).variants == 8 and len(data) == 1
    lefts = set()
    for number in range(8):
        sample = data.job(0, 0, 0, True, number)()
        shown = sample.frames[0, ..., 0] * 128 - 0.5  # red tells the column in the whole picture
        place = data.place(0, number)
        columns = torch.arange(place.crop[1], place.crop[1] + 64.0)
        expected = columns.flip(0) if number % 2 else columns
        assert (shown - expected).abs().max() < 1, "each column is the one that the crop says"
        assert (sample.hints[0, ..., :2] - sample.frames[0, ..., :2]).abs().max() < 1 / 60
        assert sample.mask is not None and (sample.mask[0] - sample.frames[0, ..., 0]).abs().max() < 1 / 60
        assert sample.crop == place.seen_crop == (0, 64 - place.crop[1] if number % 2 else place.crop[1])
        assert sample.frame_keys == data.frame_keys(0, 0, 0, number)
        lefts.add(place.crop[1])
    assert 32 in lefts and len(lefts) >= 3 and all(0 <= left <= 64 for left in lefts)
    assert len({data.frame_keys(0, 0, 0, number) for number in range(8)}) == 2 * len(lefts)
    assert data.frame_keys(0) == opened(tmp_path).frame_keys(0), "the plain cut is as it was"
    assert opened(tmp_path, crops=4, flip=True).place(0, 5) == data.place(0, 5)
    assert Subset(data, [0]).frame_keys(0, 0, 0, 3) == data.frame_keys(0, 0, 0, 3)


@pytest.mark.comfy
def test_positions_draw_every_cut_and_all_are_encoded_before(tmp_path: Path) -> None:
    data = opened(wide(tmp_path / "data"), crops=2, flip=True)
    store = store_of(data, Cache(tmp_path / "cache"), cache=True)
    store.prepare([0], ProcessGroup(), Watcher())
    assert store.base.calls.count("latent") == 4
    crops = Counter(store.sample(0, position).crop for position in range(MANY))
    assert store.base.calls.count("latent") == 4 and 3 <= len(crops) <= 4
    assert min(Counter(store.variant(0, position) for position in range(MANY)).values()) > MANY / 4 - 40
    plain = data.load(0)
    assert store.sample(0, 7, dropout=False).crop == plain.crop, "validation sees the plain cut"


@pytest.mark.comfy
def test_captions_that_name_a_side_are_told(loaded_studio: Any, tmp_path: Path) -> None:
    watch = Watcher()
    data = opened(wide(tmp_path / "data", ("x", "y")), flip=True)
    train_in(tmp_path, base_of(loaded_studio), small(steps=1), watch, data=data)
    assert watch.logged("flip: 2 captions name a side, which is wrong when mirrored: x, its left hand")


def test_each_item_comes_as_often_as_it_is_repeated() -> None:
    found = order([(64, 64)] * 3 + [(64, 128)], 2, 5, [1, 3, 2, 4])
    assert found.steps_per_epoch == 5
    for epoch in range(2):
        steps = range(5 * epoch, 5 * epoch + 5)
        assert Counter(index for step in steps for index in found.batch(step)) == {0: 1, 1: 3, 2: 2, 3: 4}


@pytest.mark.comfy
def test_sources_repeat_and_weigh_as_the_recipe_says(loaded_studio: Any, tmp_path: Path) -> None:
    from comfyui_controlnext.controlnext_training.command import open_data
    from comfyui_controlnext.controlnext_training.step import draw, losses

    one, other = pairs(tmp_path / "one", ("a",)), pairs(tmp_path / "other", ("b", "c"))
    settings = {"data": (str(one), str(other)), "repeats": (5, 1), "weights": (1.0, 0.25), "batch_size": 3}
    config = small(**settings)
    data = open_data(config.data, config)
    assert [tuple(data.share(index)[:2]) for index in range(3)] == [(5, 1.0), (1, 0.25), (1, 0.25)]
    assert open_data((str(other),), config).share(0) == Share(), "validation's own"
    loop = loop_on(base_of(loaded_studio), config, data)
    assert loop.order.steps_per_epoch == 3
    samples = [loop.samples.store.sample(index, index) for index in range(3)]
    assert [sample.weight for sample in samples] == [1.0, 0.25, 0.25]
    assert loop.samples.store.sample(1, 1, dropout=False).weight == 1.0
    weighed, plain = (
        losses(loop.model, draw(batch, [0, 1, 2], loop.objective, config, loop.controlled), loop.objective, config)
        for batch in (samples, [loop.samples.store.sample(index, index, dropout=False) for index in range(3)])
    )
    assert torch.allclose(weighed, plain * torch.tensor([1.0, 0.25, 0.25]))


def test_lists_of_numbers_are_read_written_and_refused() -> None:
    recipe = 'data = ["a", "b"]\nrepeats = [2, 1]\nweights = [1, 0.5]\n'
    config = make_config(parse_recipe(recipe))
    assert config.repeats == (2, 1) and config.weights == (1.0, 0.5)
    assert make_config(parse_recipe(as_toml(config))) == config
    for text, words in (
        ("repeats = [2.5]", "repeats: .* is not whole numbers"),
        ('weights = ["x"]', "weights: .* is not numbers"),
        ("repeats = [true]", "is not whole numbers"),
        ("flip = [true, 1]", "flip: .* is not true or false"),
        ("crops = true", "crops: True is not whole numbers"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_recipe(text)
    for wrong, words in (
        ({"data": ("a",), "repeats": (1, 2)}, "repeats: are 2 for 1 of data. Give one for each, or one"),
        ({"data": ("a", "b"), "flip": (True, False, True)}, "flip: are 3 for 2 of data"),
        ({"repeats": (0,)}, "repeats: 0 is out of range"),
        ({"weights": (-1.0,)}, "weights: -1.0 is out of range"),
    ):
        with pytest.raises(ConfigError, match=words):
            TrainConfig(**wrong)  # type: ignore[arg-type]


TABLES = {
    "tables": """
[[data]]
path = "a"
repeats = 3
[[data]]
path = "b"
weight = 0.5
crops = 2
flip = true
""",
    "inline, among texts": 'data = ["a", {path = "b", weight = 0.5, crops = 2, flip = true}]\nrepeats = [3, 1]',
    "below a heading": '[f]\ndata = [{path = "a", repeats = 3}, {path = "b", weight = 0.5, crops = 2, flip = true}]',
    "lists": 'data = ["a", "b"]\nrepeats = [3, 1]\nweights = [1, 0.5]\ncrops = [1, 2]\nflip = [false, true]',
}


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES.keys())
def test_sources_are_written_as_tables_too(text: str) -> None:
    found = make_config(parse_recipe(text))
    expected = TrainConfig(data=("a", "b"), repeats=(3, 1), weights=(1.0, 0.5), crops=(1, 2), flip=(False, True))
    assert found == expected == make_config(parse_recipe(as_toml(found)))


@pytest.mark.parametrize("text", ['data = {path = "a", flip = true}', '[data]\npath = "a"\nflip = true'])
def test_one_source_may_be_one_table_and_a_heading_data_stays_one(text: str) -> None:
    assert make_config(parse_recipe(text)) == TrainConfig(data=("a",), flip=(True,))
    assert make_config(parse_recipe('[data]\ndata = "a"\ncrops = 2')) == TrainConfig(data=("a",), crops=(2,))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '[[data]]\npath = "a"\nmirror = true',
            "data: mirror of source 1 is unknown. A source has path, repeats, weight",
        ),
        ('data = ["a", {flip = true}]', 'data: source 2 names no file or folder. Write path = "faces".'),
        ('data = [{path = "a"}, 5]', "data: source 2 names no file"),
        ('[[data]]\npath = "a"\nrepeats = "x"', "repeats: .* is not whole numbers"),
        ('crops = 2\n[[data]]\npath = "a"\ncrops = 4', "crops: stands there twice"),
        ('validation_data = [{path = "a"}]', "validation_data: .* is not texts"),
    ],
)
def test_tables_that_are_no_sources_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_recipe(text)


@pytest.mark.comfy
def test_each_source_is_cut_as_its_table_says(tmp_path: Path) -> None:
    from comfyui_controlnext.controlnext_training.command import open_data, seen_from

    wide(tmp_path / "one"), wide(tmp_path / "other", ("y",))
    write(tmp_path / "other" / "images" / "y.png", coordinates(64, 128, 9))
    recipe = 'crops = 3\nbuckets = false\nresolution = 64\ndata = ["one", {path = "other", flip = true}]'
    config = seen_from(tmp_path, make_config(parse_recipe(recipe)))
    data = open_data(config.data, config)
    assert [data.share(index).variants for index in range(2)] == [3, 6]
    store = store_of(data)
    drawn_cuts = [{store.variant(index, position) for position in range(MANY)} for index in range(2)]
    assert drawn_cuts == [set(range(3)), set(range(6))]
    store.prepare(range(2), ProcessGroup(), Watcher())
    keys = {data.frame_keys(index, 0, 0, cut) for index, cuts in enumerate(drawn_cuts) for cut in cuts}
    assert store.base.calls.count("latent") == len(keys) > 6
    assert not any(data.place(0, cut).flipped for cut in range(3)) and data.place(1, 5).flipped


@pytest.mark.comfy
def test_drawn_sources_have_none_of_these() -> None:
    from comfyui_controlnext.controlnext_training.command import open_data

    config = TrainConfig(data=("synthetic:edges:3",), flip=(True,))
    with pytest.raises(ConfigError, match="flip: are for files"):
        open_data(config.data, config)
    assert drawn(2).share(1) == Share() and drawn(2).share(1).variants == 1
