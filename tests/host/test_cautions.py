"""Warnings about settings without effect or with harm: shown on the node, and logged once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.sampling_fixtures import Studio, picture
from comfyui_controlnext.tools.tiny_models import make_controlnext, make_unet_difference, unet_tensors
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy


@pytest.fixture(autouse=True)
def _unsaid() -> Iterator[None]:
    """Reset of the texts logged or shown so far."""
    from comfyui_controlnext.controlnext_core.comfy_adapter import feedback

    feedback.warn_once.cache_clear()
    yield
    feedback.warn_once.cache_clear()


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that nodes give the page to show, in the order of their runs."""
    from comfyui_controlnext.controlnext_core.comfy_adapter import feedback
    from comfyui_controlnext.nodes import apply as module

    texts: list[str] = []

    def report(text: str, cautions: Sequence[str] = ()) -> dict[str, list[str]]:
        given = feedback.report(text, cautions)
        texts.extend(given[feedback.REPORT])
        return given

    monkeypatch.setattr(module, "report", report)
    return texts


def apply(studio: Studio, control: Any = None, image: Any = None, model: Any = None, **inputs: Any) -> Any:
    """Apply ControlNeXt, called as by the host."""
    from comfyui_controlnext.nodes.apply import ControlNeXtApply

    given = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, **inputs}
    control = control or studio.load().control
    return ControlNeXtApply.execute(model or studio.model, control, picture() if image is None else image, **given)[0]


def options(control: Any, **inputs: Any) -> Any:
    from comfyui_controlnext.nodes.apply import ControlNeXtOptions

    return ControlNeXtOptions.execute(control, "auto", **inputs)[0]


CASES = {
    "start_percent 0.8 is after end_percent 0.2": {"start_percent": 0.8, "end_percent": 0.2},
    "the mask is 0 everywhere": {"mask": torch.zeros(1, 8, 8)},
    "the hint has one colour everywhere": {"image": torch.full((2, 64, 64, 3), 0.25)},
}


@pytest.mark.parametrize("words", CASES)
def test_a_control_that_does_nothing_is_told_on_the_node_and_once_in_the_log(
    words: str, studio: Studio, shown: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model = apply(studio, **CASES[words])
        studio.sample(model)  # the log has it already
    assert [text.count(words) for text in shown] == [1, 1]
    assert all(text.startswith("Warning: gen2.safetensors: ") for text in shown)
    assert caplog.text.count(words) == 1


def test_sound_settings_are_met_with_silence(
    studio: Studio, shown: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model = apply(studio, options(studio.load().control, schedule="0:1, 1:10", mask=torch.eye(8)[None]))
        studio.sample(model)
    assert shown == ["", ""] and caplog.text == "", "an empty text takes an earlier warning away"


def test_strengths_of_a_schedule_above_ten_are_a_slip(studio: Studio, shown: list[str]) -> None:
    options(studio.load().control, schedule="0:1, 0.4:12, 1:0")
    (text,) = shown
    assert text.startswith("Warning: schedule: strength 12 at 0.4 is above 10")


def test_the_stock_door_logs_the_same(studio: Studio, caplog: pytest.LogCaptureFixture) -> None:
    control = studio.load().control.copy()
    control.set_cond_hint(picture().movedim(-1, 1), 1.0, (0.9, 0.1))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            control.pre_run(studio.model.model, studio.model.model.model_sampling.percent_to_sigma)
    assert caplog.text.count("start_percent 0.9 is after end_percent 0.1") == 1


def test_a_model_that_went_past_the_loader_is_noticed(studio: Studio, shown: list[str], tmp_path: Path) -> None:
    make_controlnext(tmp_path / "controlnet.safetensors", "gen2")
    make_unet_difference(tmp_path / "unet.safetensors")
    loaded = studio.load(tmp_path / "controlnet.safetensors", "auto")
    assert loaded.cautions == ()
    apply(studio, loaded.control, model=loaded.model.clone())
    apply(studio, loaded.control)
    sound, text = shown
    assert sound == ""
    assert "the model lacks the weights that came with this control: its wire went past the loader" in text


def test_a_published_control_without_its_weights_is_told(studio: Studio, tmp_path: Path) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.whole_unets import load_unet

    make_controlnext(tmp_path / "controlnet.safetensors", "gen2")
    make_unet_difference(tmp_path / "unet.safetensors")
    (caution,) = studio.load(tmp_path / "controlnet.safetensors", "none").cautions
    assert caution.startswith("controlnet.safetensors: was published with UNet weights and is loaded without them")
    save_file({name: tensor.float() for name, tensor in unet_tensors("sd15").items()}, tmp_path / "whole.safetensors")
    whole = load_unet(tmp_path / "whole.safetensors")
    for model in (whole, whole.clone()):  # a LoRA loader clones it
        assert studio.load(tmp_path / "controlnet.safetensors", "none", model).cautions == ()


@pytest.mark.parametrize("kind", ["full", "difference"])
def test_differences_that_are_called_full_are_noticed(kind: str, studio: Studio, tmp_path: Path) -> None:
    make_controlnext(tmp_path / "controlnet.safetensors", "gen2")
    make_unet_difference(tmp_path / "unet.safetensors")
    cautions = studio.load(tmp_path / "controlnet.safetensors", "auto", weights_kind=kind).cautions
    wrong = [text for text in cautions if "weights_kind is full, but the weights look like difference" in text]
    assert len(wrong) == len(cautions) == (kind == "full")
