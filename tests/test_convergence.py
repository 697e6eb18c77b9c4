"""The evidence's runs: what is compared is what it says it is, and a run that is done is not run again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.benchmarks import convergence
from comfyui_controlnext.benchmarks import evidence_runs as runs
from comfyui_controlnext.tests.sampling_fixtures import Studio
from comfyui_controlnext.tests.training_fixtures import (
    SIDE,
    Watcher,
    base_of,
    frozen,
    gradients_of,
    hashes,
    loop_on,
    small,
    take_steps,
)
from comfyui_controlnext.tools import bench, cli

MAIN_PAIR = ("released", "zero_conv")


def plan_in(folder: Path) -> runs.Plan:
    changes = {
        "data": (f"synthetic:edges:3:{SIDE}",),
        "validation_data": ("synthetic:edges:1",),
        "resolution": SIDE,
        "precision": "fp32",
    }
    return replace(runs.quick(runs.Plan(folder, Path("tiny.ckpt"))), steps=2, batch=1, pictures=1, changes=changes)


def stock_loop(studio: Studio) -> Any:
    from comfyui_controlnext.benchmarks.stock_copy import copy_of

    return loop_on(base_of(studio), small(trainable="none"), make=copy_of(studio.model))


def outputs(loop: Any) -> list[torch.Tensor]:
    """The UNet's output for one sample at strengths 0 and 1."""
    from comfyui_controlnext.controlnext_training.step import draw

    config, controlled = loop.config, loop.controlled
    batch = draw([loop.samples.store.sample(0, 0)], [0], loop.law, config, controlled)
    with torch.no_grad():
        return [controlled(batch.noise, batch.sigma, batch.conditions, batch.hint, s) for s in (0.0, 1.0)]


@pytest.mark.comfy
def test_a_stock_style_copy_starts_as_the_bare_model_and_is_heard_after_two_steps(loaded_studio: Studio) -> None:
    """The zero convolutions move in the first step; only then does anything reach the hint's stem."""
    loop = stock_loop(loaded_studio)
    bare, controlled = outputs(loop)
    assert torch.equal(bare, controlled)
    take_steps(loop, 2)
    again, controlled = outputs(loop)
    assert torch.equal(bare, again) and not torch.equal(bare, controlled)


@pytest.mark.comfy
def test_a_stock_style_copy_trains_its_own_weights_alone(loaded_studio: Studio) -> None:
    loop = stock_loop(loaded_studio)
    before = hashes(frozen(loop.controlled))
    take_steps(loop, 2)
    gradients = gradients_of(loop, 2)
    assert gradients and all(name.startswith("control.") for name in gradients)
    silent = [name for name, gradient in gradients.items() if not gradient.any()]
    assert silent == [], "after two steps every weight of the copy has part in the loss"
    assert gradients.keys() == loop.parameters.keys()
    assert hashes(frozen(loop.controlled)) == before


@pytest.mark.comfy
def test_a_stock_style_copy_is_the_bases_encoder_and_a_new_stem(loaded_studio: Studio) -> None:
    loop = stock_loop(loaded_studio)
    unet = loaded_studio.model.model.diffusion_model.state_dict()
    copied = {name: value for name, value in loop.controlled.net.state_dict().items() if name in unet}
    assert {name.split(".")[0] for name in copied} == {"time_embed", "input_blocks", "middle_block"}
    assert all(torch.equal(value, unet[name].float()) for name, value in copied.items())
    assert torch.equal(
        stock_loop(loaded_studio).controlled.net.input_hint_block[0].weight,
        loop.controlled.net.input_hint_block[0].weight,
    ), "of one seed"


@pytest.mark.comfy
def test_the_hosts_own_loader_takes_a_trained_copy(loaded_studio: Studio, tmp_path: Path) -> None:
    import comfy.controlnet

    loop = stock_loop(loaded_studio)
    path = loop.controlled.control.save(tmp_path / "copy", {}, "single", torch.float32, {})
    loaded = comfy.controlnet.load_controlnet(str(path))
    assert type(loaded) is comfy.controlnet.ControlNet


@pytest.mark.comfy
def test_a_run_leaves_its_figures_and_is_not_run_again(loaded_studio: Studio, tmp_path: Path) -> None:
    plan, base, watch = plan_in(tmp_path), base_of(loaded_studio), Watcher()
    for name in ("released", "stock"):
        result = runs.run_case(name, 0, plan, base, watch)
        assert [set(values) for values in result["figures"].values()] == [{1, 2}] * len(runs.FIGURES)
        assert result["trained"] > 0 and result["steps"] == 2
    assert not list(tmp_path.glob("runs/*/state-*")) and len(list(tmp_path.glob("files/*.safetensors"))) == 2
    before, steps = runs.result_file(plan, "released", 0).stat().st_mtime_ns, watch.steps_done
    watch.steps_done = 0
    assert runs.run_case("released", 0, plan, base, watch)["figures"].keys() == set(runs.FIGURES)
    assert watch.told("released:0 is done") and (watch.steps_done, steps) == (0, 2)
    assert runs.result_file(plan, "released", 0).stat().st_mtime_ns == before
    runs.run_case("released", 0, replace(plan, steps=1), base, watch)
    assert watch.steps_done == 1, "of other settings it is run again"


def test_the_cases_differ_in_what_they_are_about_alone(tmp_path: Path) -> None:
    plan = runs.Plan(tmp_path, Path("shapes.ckpt"))
    found = {name: json.loads(runs.config_of(name, 0, plan).to_json()) for name in runs.CASES}

    def differ(one: str, other: str) -> set[str]:
        return {key for key, value in found[one].items() if value != found[other][key]} - {"output_name"}

    for name in ("zero_conv", "paper", "add"):
        assert differ("released", name) == {"fusion"}
        assert found[name]["fusion"] == name
    assert differ("released", "stock_fast") == {"trainable"}
    assert differ("stock_fast", "stock") == {"control_learning_rate"}
    assert found["stock"]["control_learning_rate"] == found["stock"]["learning_rate"]
    assert {"steps", "batch_size", "data", "validation_data", "max_samples", "seed"}.isdisjoint(
        differ("released", "xs")
    )
    assert found["released"]["schedule"] == "constant" and found["released"]["ema_decay"] == 0


def test_cases_are_named_with_and_without_a_seed() -> None:
    everything = list(runs.chosen(()))
    assert everything[:6] == [(name, seed) for name in MAIN_PAIR for seed in range(3)]
    assert {name for name, _ in everything} == runs.CASES.keys() and len(everything) == len(runs.CASES) + 4
    assert list(runs.chosen(["xs", "released:2"])) == [("xs", 0), ("released", 2)]
    for wrong in ("fast", "xs:a"):
        with pytest.raises(SystemExit, match=r"--cases .*there are released, zero_conv"):
            list(runs.chosen([wrong]))


def test_it_runs_by_name_only_and_its_options_are_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: dict[str, list[str]] = {}
    monkeypatch.setattr(bench, "_run", lambda name, arguments: started.update({name: arguments}) or 0)
    bench.run_benchmarks(cli.parse(["bench"]), lambda: Path("host"))
    assert started.keys() == bench.BENCHMARKS.keys()
    started.clear()
    given = cli.parse(["bench", "convergence", "counts", "--steps", "3", "--cases", "xs:0", "--parts", "runs"])
    assert bench.run_benchmarks(given, lambda: Path("host")) == 0
    assert started["counts"] == ["--comfyui", "host", "--cases", "xs:0"]
    options = convergence.parse(started["convergence"])
    assert (options.steps, options.cases, options.parts) == (3, "xs:0", ("runs",))
    assert all((Path(convergence.__file__).parent / f"{name}.py").is_file() for name in bench.ON_REQUEST)
    with pytest.raises(SystemExit):
        convergence.parse([*started["convergence"], "--parts", "walk"])
    assert "--parts walk: there are runs" in capsys.readouterr().err
