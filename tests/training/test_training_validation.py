"""Validation of a run: the loss at fixed noise, pictures with and without control, fewer where memory is short."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.fidelity import METRICS
from comfyui_controlnext.controlnext_training.base_model import preview
from comfyui_controlnext.controlnext_training.data.samples import BrokenSample, DatasetError
from comfyui_controlnext.controlnext_training.results import NO_EFFECT, RunFiles, show_validation
from comfyui_controlnext.controlnext_training.validation import Validation, Validator
from comfyui_controlnext.tests.fixtures.sampling_fixtures import SEED, Studio, relative
from comfyui_controlnext.tests.fixtures.training_fixtures import (
    Watcher,
    base_of,
    drawn,
    hashes,
    loop_on,
    same,
    shaken,
    small,
    take_steps,
    train_in,
)
from comfyui_controlnext.tests.training.test_training_base import SQUARE, controlled_on
from safetensors.torch import load_file

pytestmark = pytest.mark.comfy

LEARNING = {
    "trainable": "to_out",
    "batch_size": 2,
    "learning_rate": 1e-3,
    "control_learning_rate": 3e-3,
    "weight_decay": 0.0,
    "warmup_steps": 5,
}


def validator_on(loop: Any, watch: Watcher | None = None, count: int = 2, **changes: Any) -> Validator:
    return Validator(loop.samples.store, range(count), loop.config, loop.objective, watch or Watcher(), **changes)


def test_on_a_tiny_problem_the_loss_falls_and_the_control_is_heard(loaded_studio: Studio) -> None:
    """Eight drawn scenes, 30 steps: at fixed noise the loss ends well below where it began, and the control has part in
    it (measured: 0.49 -> 0.31, 0.33 without the control)."""
    loop = loop_on(base_of(loaded_studio), small(**LEARNING, steps=30, schedule="cosine"), drawn(8))
    looked_at = validator_on(loop, count=2)
    looked_at.pictures = 0
    before = looked_at.run(loop.controlled)
    take_steps(loop, 30)
    after = looked_at.run(loop.controlled)
    assert after.loss < 0.8 * before.loss and after.loss < after.loss_without
    assert after.effect > 10 * NO_EFFECT
    assert after.grid is None and after.fidelity is None


def test_looking_changes_nothing_and_gives_the_same_again(loaded_studio: Studio) -> None:
    loop = loop_on(base_of(loaded_studio), small(**LEARNING))
    take_steps(loop, 1)
    weights, mode = hashes(loop.parameters), loop.controlled.training
    numbers = torch.get_rng_state()
    looked_at = validator_on(loop, count=1)
    one, other = looked_at.run(loop.controlled), looked_at.run(loop.controlled)
    assert (one.loss, one.loss_without, one.fidelity) == (other.loss, other.loss_without, other.fidelity)
    assert one.grid is not None and other.grid is not None and one.grid.tobytes() == other.grid.tobytes()
    assert hashes(loop.parameters) == weights and loop.controlled.training == mode
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(parameter.grad is None for parameter in loop.parameters.values())


def test_a_run_that_looks_ends_with_the_weights_of_one_that_does_not(loaded_studio: Studio, tmp_path: Path) -> None:
    base, held_out = base_of(loaded_studio), drawn(2)
    blind = train_in(tmp_path / "blind", base, small(steps=2, ema_decay=0.5), held_out=held_out)
    watch = Watcher()
    looking = small(steps=2, ema_decay=0.5, validate_every=1, validation_samples=1)
    seeing = train_in(tmp_path / "seeing", base, looking, watch, held_out=held_out)
    assert same(load_file(blind), load_file(seeing))
    folder = tmp_path / "seeing/runs/control"
    assert sorted(p.name for p in folder.glob("*.png")) == [
        "loss.png",
        "validation-00000001.png",
        "validation-00000002.png",
    ]
    assert len(watch.pictures) == 2 and watch.logged("validation after 2 steps: loss ")
    assert [line for line in watch.lines if line.startswith("validating after step 2")] == [
        "validating after step 2: loss with and without the control",
        "validating after step 2: picture 1 of 1",
    ]
    assert len(watch.curves) == 2 and watch.curves[0]().size == (960, 540), "offered at each line of the log"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    validated = [line for line in lines if line["event"] == "validation"]
    assert [line["step"] for line in validated] == [1, 2]
    figures = {"loss", "loss_without", "effect", "fidelity", "fidelity_without", "distance", "distance_without"}
    assert figures <= validated[0].keys()


def test_the_distance_of_a_picture_is_that_of_its_latent_from_the_originals(
    loaded_studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero for the original itself, which the sampler is made to draw at strength 1; at 0 its mirror image."""
    loop = loop_on(base_of(loaded_studio), small())
    looked_at = validator_on(loop, count=1)
    original = loop.samples.store.data.load(0).frames[0]

    def drawn_before(self: Validator, controlled: Any, sample: Any, number: int, strength: float) -> Any:
        return (original if strength else original.flip(1))[None]

    monkeypatch.setattr(Validator, "_pictures_of", drawn_before)
    found = looked_at.run(loop.controlled)
    assert found.distance == 0.0 and found.fidelity == 1.0
    assert found.distance_without is not None and found.distance_without > 0.1


def test_an_average_is_what_is_looked_at(loaded_studio: Studio) -> None:
    loop = loop_on(base_of(loaded_studio), small(**LEARNING, ema_decay=0.999))
    take_steps(loop, 3)
    looked_at = validator_on(loop, count=1)
    looked_at.pictures = 0
    own, weights = looked_at.run(loop.controlled).loss, hashes(loop.parameters)
    with loop.averaged():
        assert looked_at.run(loop.controlled).loss != own
    assert hashes(loop.parameters) == weights and looked_at.run(loop.controlled).loss == own


def test_of_few_samples_none_is_held_out_and_of_many_some_do_not_train() -> None:
    from comfyui_controlnext.controlnext_training.split import split

    config = small(validate_every=1, validation_samples=4)
    few = split(drawn(9), 9, range(9), config, False)
    assert (few.training, few.validation) == (list(range(9)), [0, 1, 2, 3])
    for count, held in ((20, 2), (100, 4)):
        many = split(drawn(count), count, range(count), config, False)
        assert len(many.validation) == held
        assert many.training == [index for index in range(count) if index not in many.validation]
        assert many.validation != list(range(held)), "they are drawn, and not the first"
    for settings, own in ((config, True), (small(), False)):
        none = split(drawn(30), 30, range(30), settings, own)
        assert (none.training, none.validation) == (list(range(30)), [])


def test_a_control_without_effect_is_warned_of(loaded_studio: Studio, tmp_path: Path) -> None:
    """A zero convolution that never moves, through a whole run; and none where it moves."""
    for rate, warned in ((0.0, True), (1e-2, False)):
        watch = Watcher()
        settings = {"trainable": "none", "fusion": "zero_conv", "control_learning_rate": rate, "steps": 2}
        config = small(**settings, validate_every=2, validation_samples=1, output_name=f"rate {rate}")
        train_in(tmp_path, base_of(loaded_studio), config, watch)
        assert watch.logged("warning: the control has no effect yet") == warned


def test_a_validation_without_room_makes_fewer_pictures_and_goes_on(
    loaded_studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management

    picture = Validator._pictures_of

    def short_of_memory(self: Validator, controlled: Any, sample: Any, number: int, strength: float) -> Any:
        if number:
            raise comfy.model_management.OOM_EXCEPTION("no room")
        return picture(self, controlled, sample, number, strength)

    monkeypatch.setattr(Validator, "_pictures_of", short_of_memory)
    watch = Watcher()
    config = small(steps=2, validate_every=1, validation_samples=2)
    path = train_in(tmp_path, base_of(loaded_studio), config, watch, held_out=drawn(2))
    assert path.is_file() and watch.steps_done == 2
    (said,) = [line for line in watch.said if "not enough memory" in line]
    assert "from now on 1 pictures. Training continues." in said
    sizes = [image.size for image in watch.pictures]
    assert len(sizes) == 2 and sizes[0] == sizes[1]


def test_without_any_room_only_the_loss_is_looked_at(loaded_studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management
    from comfyui_controlnext.controlnext_training import validation

    def full(*args: Any, **kwargs: Any) -> Any:
        raise comfy.model_management.OOM_EXCEPTION("no room")

    monkeypatch.setattr(validation, "sample_pictures", full)
    loop, watch = loop_on(base_of(loaded_studio), small()), Watcher()
    looked_at = validator_on(loop, watch)
    found = looked_at.run(loop.controlled)
    assert found.grid is None and found.loss > 0
    assert "no more pictures, only the loss" in watch.said[-1]
    looked_at.run(loop.controlled)
    assert len(watch.said) == 2, "and it is not tried again"


def test_another_error_in_a_picture_is_not_hidden(loaded_studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfyui_controlnext.controlnext_training import validation

    def wrong(*args: Any, **kwargs: Any) -> Any:
        raise ArithmeticError("wrong")

    monkeypatch.setattr(validation, "sample_pictures", wrong)
    loop = loop_on(base_of(loaded_studio), small())
    with pytest.raises(ArithmeticError):
        validator_on(loop).run(loop.controlled)


def test_a_sample_that_breaks_on_the_way_is_left_out(loaded_studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, watch = loop_on(base_of(loaded_studio), small()), Watcher()
    looked_at = validator_on(loop, watch)
    looked_at.pictures = 0
    store, torn = loop.samples.store, {1}
    read = store.sample

    def sample(index: int, position: int, dropout: bool = True) -> Any:
        if index in torn:
            raise BrokenSample(f"scene {index}", "is cut off")
        return read(index, position, dropout)

    monkeypatch.setattr(store, "sample", sample)
    assert looked_at.run(loop.controlled).loss == validator_on(loop, count=1).run(loop.controlled).loss
    assert watch.said == ["from now on left out of the validation: scene 1: is cut off"]
    torn.add(0)
    with pytest.raises(DatasetError, match="None of the validation's samples"):
        looked_at.run(loop.controlled)


def test_a_picture_is_what_the_hosts_sampler_makes(loaded_studio: Studio) -> None:
    """Euler, the same noise, prompts and guidance, no control: the preview is the stock KSampler's latent."""
    controlled = controlled_on(loaded_studio.model)
    shaken(dict(controlled.net.named_parameters()))
    with torch.inference_mode():
        expected = loaded_studio.sample(steps=3, cfg=4.0).clone()
        noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(SEED))
    conditions = [
        [controlled.conditions(noise, {"context": prompt[0][0].clone()}, SQUARE)]
        for prompt in (loaded_studio.positive, loaded_studio.negative)
    ]
    hint = drawn().load(0).hints.movedim(-1, 1).contiguous()
    latents = preview.sample(controlled, noise.clone(), *conditions, hint, steps=3, cfg=4.0, strength=0.0)
    found = loaded_studio.model.model.process_latent_out(latents)
    assert relative(found, expected) < 1e-4
    with_control = preview.sample(controlled, noise.clone(), *conditions, hint, steps=3, cfg=4.0, strength=1.0)
    assert relative(with_control, latents) > 1e-3


def test_a_grid_names_its_figures_and_prompts_and_shows_four_rows(
    loaded_studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfyui_controlnext.controlnext_training import validation

    grids: list[Any] = []
    picture_grid = validation.picture_grid

    def kept(rows: Any) -> Any:
        grids.append(rows)
        return picture_grid(rows)

    monkeypatch.setattr(validation, "picture_grid", kept)
    monkeypatch.setattr(
        Validator, "_pictures_of", lambda self, controlled, sample, number, strength: sample.hint[:1].movedim(1, -1)
    )
    loop = loop_on(base_of(loaded_studio), small(validation_samples=5), drawn(5))
    found = validator_on(loop, count=5).run(loop.controlled)
    whole, short = grids
    assert len(whole) == 5 and short == whole[:4]
    assert found.grid is not None and found.short is not None and found.short.size[1] < found.grid.size[1]
    hint, original, without, with_it = whole[0]
    assert hint.caption == f"hint, prompt: {drawn(5).captions[0]}" and original.caption == "original"
    assert without.caption == "without control" and with_it.caption == "with control (strength 1)"
    assert re.fullmatch(r"edge F1 \d\.\d\d, distance \d+\.\d\d", with_it.metric)
    assert validation.METRIC_NAMES.keys() <= METRICS.keys()


def test_figures_are_told_in_words(tmp_path: Path) -> None:
    from comfyui_controlnext.controlnext_training.journal import Journal

    watch, run = Watcher(), RunFiles(tmp_path, tmp_path, tmp_path / "x", "")
    found = Validation(0.5, 0.6, 0.1667, 0.71, 0.32, None)
    show_validation(found, 7, run, Journal(tmp_path, True, False), watch)
    assert watch.said == [
        "validation after 7 steps: loss 0.5000 (without control 0.6000), follows the hint 0.71 (without 0.32)"
    ]
    assert not list(tmp_path.glob("validation-*.png")) and (tmp_path / "loss.png").is_file()


@pytest.mark.parametrize(("loss", "warned"), [(0.61, True), (0.6001, False), (0.5, False)])
def test_a_control_that_is_worse_than_none_is_warned_of(tmp_path: Path, loss: float, warned: bool) -> None:
    from comfyui_controlnext.controlnext_training.journal import Journal

    watch, run = Watcher(), RunFiles(tmp_path, tmp_path, tmp_path / "x", "")
    found = Validation(loss, 0.6, abs(loss - 0.6) / 0.6, None, None, None)
    show_validation(found, 7, run, Journal(tmp_path, True, False), watch)
    assert watch.logged("the control is worse than without") == warned
