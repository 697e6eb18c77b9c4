"""Preset of the node and the precedence over it; the picture of a run on its node."""

from __future__ import annotations

from typing import Any

import pytest
from comfyui_controlnext.controlnext_training.config import ConfigError, TrainConfig
from comfyui_controlnext.controlnext_training.config_files import read_recipe
from PIL import Image

pytestmark = pytest.mark.comfy

DATASET = {"data": ("pictures",), "hint": "canny", "resolution": 256, "bucket_step": 64, "buckets": True}
WIDGETS = {
    key: getattr(TrainConfig(), key)
    for key in ("variant", "steps", "batch_size", "learning_rate", "control_learning_rate", "seed", "output_name")
} | {"resume": True}


@pytest.fixture(name="trainer")
def fixture_trainer() -> Any:
    from comfyui_controlnext.controlnext_training.nodes import trainer

    return trainer


def test_the_preset_comes_last_and_means_nothing_where_it_is_not_set(trainer: Any) -> None:
    last = trainer.ControlNeXtTrain.define_schema().inputs[-1]
    assert (last.id, last.default, last.optional) == ("preset", "none", True) and last.options == list(trainer.PRESETS)
    found = [trainer.config_of_node("gain = 0.5", preset, WIDGETS, DATASET) for preset in ("none", None)]
    assert found[0] == found[1] == TrainConfig(gain=0.5, **WIDGETS, **DATASET)


def test_every_recipe_is_a_preset_and_its_base_and_data_are_the_inputs(trainer: Any) -> None:
    assert trainer.PRESETS[0] == "none" and len(trainer.PRESETS) > 20 and "picture_sharp" not in trainer.PRESETS
    for name in trainer.PRESETS[1:]:
        recipe = read_recipe(trainer.RECIPES / f"{name}.toml")
        found = trainer.config_of_node("", name, WIDGETS, DATASET)
        own = {key: value for key, value in recipe.items() if key not in (*trainer.FROM_INPUTS, *DATASET)}
        assert {key: getattr(found, key) for key in own} == own, name
        assert found.data == ("pictures",) and found.base == "" and found.validation_data == ()
        assert (found.hint, found.resolution) == ("canny", 256), "as the dataset node says"


def test_the_config_box_wins_over_changed_widgets_and_these_over_the_preset(trainer: Any) -> None:
    recipe = read_recipe(trainer.RECIPES / "sd15.toml")
    changed = WIDGETS | {"steps": 77, "batch_size": 3}
    found = trainer.config_of_node("batch_size = 2\nmax_grad_norm = 0.5", "sd15", changed, DATASET)
    assert (found.batch_size, found.steps, found.max_grad_norm) == (2, 77, 0.5)
    assert found.gain == recipe["gain"] and found.output_name == recipe["output_name"] != WIDGETS["output_name"]


def test_a_preset_that_is_not_there_is_refused_before_anything_runs(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="preset: '../tiny' is unknown. Choose one of none, "):
        trainer.config_of_node("", "../tiny", WIDGETS, DATASET)
    check = trainer.ControlNeXtTrain.validate_inputs
    assert check(variant="sd15", config="", preset="flux") is True
    assert "preset: 'x' is unknown" in check(variant="sd15", config="", preset="x")
    assert "unknown for flux" in check(variant="sd15", config='trainable = "attn2_to_out"', preset="flux")


def picture(color: str, size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, color)


def test_the_curve_stands_above_the_last_grid() -> None:
    from comfyui_controlnext.controlnext_training.nodes.observer import NodeObserver

    observer = NodeObserver(None)
    assert observer.live() is None
    observer.curve(lambda: picture("red", (100, 50)))
    assert observer.live().size == (100, 50)  # type: ignore[union-attr]
    observer.picture(picture("blue", (200, 80)))
    shown = observer.live()
    assert shown is not None and shown.size == (200, 100 + 80)
    assert shown.getpixel((150, 50)) == (255, 0, 0) and shown.getpixel((150, 150)) == (0, 0, 255)


def test_the_curve_takes_little_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from comfyui_controlnext.controlnext_training.nodes import observer as module

    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    observer, drawn = module.NodeObserver(None), []

    def draw() -> Image.Image:
        drawn.append(now[0])
        now[0] += 0.5  # seconds
        return picture("red", (10, 10))

    for _ in range(400):
        now[0] += 0.1
        observer.curve(draw)
    spent, whole = 0.5 * len(drawn), now[0] - 100
    assert 3 <= len(drawn) and spent <= 1.5 * module.SHARE * whole
    observer.picture(picture("blue", (10, 10)))
    before = len(drawn)
    observer.curve(draw)
    assert len(drawn) == before + 1, "a validation is a new point"
