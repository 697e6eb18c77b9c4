"""Configuration: every bound and choice, one dataclass behind recipes, flags and metadata."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from comfyui_controlnext.controlnext_core.families import UNET_SUBSETS
from comfyui_controlnext.controlnext_core.specs import SPECS
from comfyui_controlnext.controlnext_training.choices import FUSIONS, XS, parse_blocks
from comfyui_controlnext.controlnext_training.config import SETTINGS, ConfigError, TrainConfig
from comfyui_controlnext.controlnext_training.config_files import (
    KINDS,
    add_flags,
    as_toml,
    checked,
    flags_given,
    make_config,
    parse_recipe,
    read_recipe,
)
from hypothesis import given, settings
from hypothesis import strategies as st

CHOICES = {key: facts.choices for key, facts in SETTINGS.items() if facts.choices}
LISTS = ("repeats", "weights", "crops")
"""Settings with a number for each source, which has bounds."""
BOUNDS = {
    key: (facts.low, facts.high) for key, facts in SETTINGS.items() if math.isfinite(facts.low) and key not in LISTS
}
FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
UNBOUND = {
    *("xs_own_time", "buckets", "stratified_timesteps", "ema_on_cpu", "checkpointing", "offload"),
    *("compile", "cache", "zero", "resume", "tensorboard"),
}
"""Switches: there is nothing to be out of."""
OF_XS = ("xs_official", "xs_diffusers")

CHANGED: dict[str, Any] = {
    "variant": "sdxl",
    "base": 'C:\\models\\a "base".safetensors',
    "data": ("one", "zw\u00f6lf/\u4e8c", "a\nb\t\x7f"),
    "validation_data": ("only",),
    "trainable": r"re:attn2.*to_(out|v)\.",
    "blocks": "input.0-5, middle",
    "gain": 0.35,
    "hint": "canny",
    "buckets": False,
    "learning_rate": 1e-05,
    "adam_eps": 1e-16,
    "steps": 10_000_000,
    "seed": 2**64 - 1,
    "checkpointing": True,
    "offload": True,
    "layout": "published",
    "resume": False,
    "weights": (1.0, 0.25, 3.0),
    "crops": (4,),
    "flip": (True, False, True),
    "output_name": "\u63a7\u5236 1",
}


def flags_of(config: TrainConfig) -> list[str]:
    """Command line with a flag for every setting."""
    line: list[str] = []
    for key, value in dataclasses.asdict(config).items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            line.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, tuple):
            line += [flag, *(str(v).lower() if v is True or v is False else str(v) for v in value)] if value else []
        else:
            line.append(f"{flag}={value}")
    return line


def from_flags(line: list[str]) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return make_config(flags_given(parser.parse_args(line)))


@pytest.mark.parametrize("config", [TrainConfig(), TrainConfig(**CHANGED)], ids=["defaults", "changed"])
def test_recipe_flags_and_json_say_the_same_as_the_configuration(config: TrainConfig) -> None:
    assert make_config(parse_recipe(as_toml(config))) == config
    assert from_flags(flags_of(config)) == config
    assert make_config({key: checked(key, value) for key, value in json.loads(config.to_json()).items()}) == config


def test_what_is_given_to_others_does_not_say_where_files_lie() -> None:
    config = TrainConfig(
        base="/home/someone/m\u00fd models/base.safetensors",
        vae="C:\\Users\\someone\\vae.pt",
        data=("/home/someone/pictures/", "synthetic:edges:200", "shards/*.tar"),
        runs_folder="/home/someone/runs",
    )
    shared = json.loads(config.to_shared_json())
    assert "someone" not in config.to_shared_json()
    assert (shared["base"], shared["vae"], shared["runs_folder"]) == ("base.safetensors", "vae.pt", "runs")
    assert shared["data"] == ["pictures", "synthetic:edges:200", "*.tar"] and shared["cache_folder"] == ""
    own = json.loads(config.to_json())
    assert {key for key in own if own[key] != shared[key]} == {"base", "vae", "data", "runs_folder"}


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")), st.floats(0, 1e3), st.integers(1, 10_000_000))
def test_any_text_and_number_survives_a_recipe(text: str, gain: float, steps: int) -> None:
    config = TrainConfig(base=text, data=(text,), gain=gain, steps=steps)
    assert make_config(parse_recipe(as_toml(config))) == config


def test_every_setting_has_a_description_that_the_help_and_the_recipe_show(capsys: pytest.CaptureFixture[str]) -> None:
    docs = {key: facts.doc for key, facts in SETTINGS.items()}
    assert docs.keys() == FIELDS.keys() == KINDS.keys()
    assert all(len(text) > 10 and text.endswith(".") for text in docs.values())
    parser = argparse.ArgumentParser()
    add_flags(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for key, text in docs.items():
        assert f"--{key.replace('_', '-')}" in shown and text[:20] in shown
        assert f"# {text}\n{key} = " in as_toml(TrainConfig())


@pytest.mark.parametrize("key", BOUNDS)
def test_a_number_may_be_at_its_bounds_and_not_beyond(key: str) -> None:
    low, high = BOUNDS[key]
    kind = KINDS[key]
    others = {"bucket_step": {"resolution": 4096}, "resolution": {"bucket_step": 8}}.get(key, {})
    if key == "bucket_step":
        high = 512
    for value in (low, high):
        assert getattr(TrainConfig(**{key: kind(value)}, **others), key) == value
    beyond = (kind(low) - 1, kind(high) + (1 if kind is int else kind(high)))
    for value in (*beyond, *((math.nan, math.inf, -math.inf) if kind is float else ())):
        with pytest.raises(ConfigError, match=rf"^{key}: .* out of range\. Set it to {low:g} to "):
            TrainConfig(**{key: value}, **others)


@pytest.mark.parametrize("key", LISTS)
def test_each_number_of_a_list_is_within_its_bounds(key: str) -> None:
    facts, kind = SETTINGS[key], float if key == "weights" else int
    good = (kind(facts.low), kind(facts.high))
    assert getattr(TrainConfig(data=("a", "b"), **{key: good}), key) == good
    for beyond in (kind(facts.low) - 1, kind(facts.high) * 2):
        with pytest.raises(ConfigError, match=rf"^{key}: "):
            TrainConfig(data=("a", "b"), **{key: (good[0], beyond)})


def test_every_number_has_bounds_and_every_switch_none() -> None:
    numbers = {key for key, kind in KINDS.items() if kind in (int, float)}
    assert numbers == set(BOUNDS)
    assert {key for key, kind in KINDS.items() if kind is bool} == UNBOUND
    for key, (low, high) in BOUNDS.items():
        assert low <= FIELDS[key].default <= high


@pytest.mark.parametrize("key", CHOICES)
def test_every_choice_is_allowed_and_nothing_else(key: str) -> None:
    for value in CHOICES[key]:
        needs = {"variant": XS} if value in OF_XS else {"variant": "sd3"} if value == "lora" else {}
        assert getattr(TrainConfig(**{key: value} | needs), key) == value
    for wrong in ("", "no_such", CHOICES[key][0].upper() + "x"):
        with pytest.raises(ConfigError, match=rf"^{key}: '{wrong}' is unknown\. Choose one of .*{CHOICES[key][-1]}"):
            TrainConfig(**{key: wrong})
    with pytest.raises(ConfigError) as refused:
        TrainConfig(**{key: 5000 * "9"})
    assert len(str(refused.value)) < 700 and "(5,002 letters) is unknown" in str(refused.value)
    assert FIELDS[key].default in CHOICES[key]


def test_the_choices_are_those_of_the_tables_they_come_from() -> None:
    assert CHOICES["variant"] == (*SPECS, XS)
    assert CHOICES["fusion"] == tuple(FUSIONS) == ("released", "paper", "zero_conv", "add")
    assert FIELDS["trainable"].default in UNET_SUBSETS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload": True}, r"offload: .*Set checkpointing = true as well"),
        ({"output_name": "a/b"}, "output_name: .*is not a file name"),
        ({"output_name": ".."}, "output_name: .*is not a file name"),
        ({"output_name": ""}, "output_name: .*is not a file name"),
        ({"resolution": 100, "bucket_step": 8}, "resolution: 100 is not a multiple of 8"),
        ({"resolution": 520}, r"resolution: 520 is not a multiple of bucket_step \(64\)"),
        ({"layout": "xs_official"}, "layout: xs_official is not for sd15. Choose single or published"),
        ({"layout": "published", "variant": "xs"}, "layout: published is not for xs. Choose single or xs_official"),
        ({"trainable": "re:("}, "trainable: '.' is not a supported regular expression"),
        ({"trainable": "to_in"}, "trainable: 'to_in' is unknown for sd15. Choose none, to_out"),
        ({"blocks": "input, input.2"}, "blocks: 'input.2' is not understood"),
        ({"blocks": "down"}, "blocks: 'down' is not understood. Write each of input, middle, output"),
        (
            {"trainable": "up_to_out", "variant": "sd3"},
            "trainable: 'up_to_out' is unknown for sd3. Choose none, to_out",
        ),
        ({"layout": "published", "variant": "sd3"}, "layout: published is not for sd3. Choose single or lora"),
        ({"layout": "published", "rank": 8}, "rank: 8 has no published layout. Set layout = single, or rank = 0"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


def test_blocks_are_sides_and_ranges() -> None:
    assert parse_blocks("") == {} == parse_blocks(" , ")
    assert parse_blocks("input.0-5, middle,output.3") == {
        "input": range(0, 6),
        "middle": None,
        "output": range(3, 4),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", "^stepz: is not a setting. Did you mean steps\\?"),
        ("qqq = 3", "^qqq: is not a setting\\.$"),
        ("steps = 1.5", "^steps: 1.5 is not a whole number"),
        ("steps = true", "^steps: True is not a whole number"),
        ("gain = true", "^gain: True is not a number"),
        ('gain = "1"', "^gain: '1' is not a number"),
        ("buckets = 1", "^buckets: 1 is not true or false"),
        ("base = 1", "^base: 1 is not a text"),
        ("data = [1]", "^data: \\[1\\] is not texts"),
        ("steps = 1\n[more]\nsteps = 2", "^steps: stands there twice"),
        ("steps 1", "^is not TOML"),
    ],
)
def test_a_recipe_with_a_mistake_names_the_key(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_recipe(text)


def test_headings_mean_nothing_and_whole_numbers_are_numbers() -> None:
    found = parse_recipe('steps = 2\n[a]\ngain = 1\n[a.b]\ndata = "one"\n')
    assert found == {"steps": 2, "gain": 1.0, "data": ("one",)}
    assert isinstance(found["gain"], float)


def test_a_recipe_file_with_a_mistake_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("stepz = 1\n", "utf-8")
    for wrong in (path, tmp_path / "absent.toml"):
        with pytest.raises(ConfigError, match=re.escape(str(wrong))):
            read_recipe(wrong)
    path.write_bytes(b"base = '\xff'\n")
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        read_recipe(path)


def test_the_earlier_source_wins() -> None:
    assert make_config({"steps": 1}, {"steps": 2, "seed": 3}, {"seed": 4, "gain": 0.5}) == TrainConfig(
        steps=1, seed=3, gain=0.5
    )


def test_flags_that_are_not_given_leave_the_recipe_alone() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert flags_given(parser.parse_args([])) == {}
    assert flags_given(parser.parse_args(["--no-resume", "--steps", "7"])) == {"resume": False, "steps": 7}
    with pytest.raises(SystemExit):
        parser.parse_args(["--steps", "many"])


def test_derived_facts() -> None:
    assert TrainConfig(batch_size=2, accumulation=3).effective_batch == 6


def test_names_of_other_trainers_lead_to_the_right_key() -> None:
    from comfyui_controlnext.controlnext_training.config_files import FOREIGN, KINDS, checked

    for key, advice in FOREIGN.items():
        assert key not in KINDS
        named = advice.replace(",", " ").replace(":", " ").split()[0]
        assert named in KINDS or named == "nothing", key
        with pytest.raises(ConfigError, match=f"^{key}: is not a setting here. Write {named}"):
            checked(key, 1)
    for key, meant in (("lr", "learning_rate"), ("epochs", "steps"), ("mixed_precision", "precision")):
        assert FOREIGN[key].startswith(meant)
