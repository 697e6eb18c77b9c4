"""The evidence's runs: what is compared is what it says it is, and a run that is done is not run again."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.benchmarks import convergence
from comfyui_controlnext.benchmarks import evidence_pairs as pairs
from comfyui_controlnext.benchmarks import evidence_runs as runs
from comfyui_controlnext.benchmarks import evidence_tables as tables
from comfyui_controlnext.controlnext_training.synthetic import draw
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
    return replace(
        runs.quick(runs.Plan(folder, Path("tiny.ckpt"))), steps=2, batch=1, pictures=1, looks=1, changes=changes
    )


def stock_loop(studio: Studio) -> Any:
    from comfyui_controlnext.benchmarks.stock_copy import copy_of

    return loop_on(base_of(studio), small(trainable="none"), make=copy_of(studio.model))


def outputs(loop: Any) -> list[torch.Tensor]:
    """The UNet's output for one sample at strengths 0 and 1."""
    from comfyui_controlnext.controlnext_training.step import draw

    config, controlled = loop.config, loop.controlled
    batch = draw([loop.samples.store.sample(0, 0)], [0], loop.objective, config, controlled)
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
    path = loop.controlled.control.save(tmp_path / "copy", loop.controlled.differences, "single", torch.float32, {})
    loaded = comfy.controlnet.load_controlnet(str(path))
    assert type(loaded) is comfy.controlnet.ControlNet


@pytest.mark.comfy
def test_a_run_leaves_its_figures_and_is_not_run_again(loaded_studio: Studio, tmp_path: Path) -> None:
    from comfyui_controlnext.controlnext_training.train import Stopped

    plan, base, watch = plan_in(tmp_path), base_of(loaded_studio), Watcher()
    for name in ("released", "stock"):
        result = runs.run_case(name, 0, plan, base, watch)
        assert [set(values) for values in result["figures"].values()] == [{2}] * len(runs.FIGURES)
        assert result["trained"] > 0 and result["steps"] == 2
    assert not list(tmp_path.glob("runs/*/state-*")) and len(list(tmp_path.glob("files/*.safetensors"))) == 2
    before, steps = runs.result_file(plan, "released", 0).stat().st_mtime_ns, watch.steps_done
    watch.steps_done = 0
    assert runs.run_case("released", 0, plan, base, watch)["figures"].keys() == set(runs.FIGURES)
    assert watch.told("released:0 is done") and (watch.steps_done, steps) == (0, 2)
    assert runs.result_file(plan, "released", 0).stat().st_mtime_ns == before
    with pytest.raises(Stopped):  # of other settings it would run again
        runs.run_case("released", 0, replace(plan, steps=1), base, Watcher(stop_at=0))


def test_the_cases_differ_in_what_they_are_about_alone(tmp_path: Path) -> None:
    plan = runs.Plan(tmp_path, Path("shapes.ckpt"))
    found = {name: json.loads(runs.config_of(name, 0, plan).to_json()) for name in runs.CASES}

    def differ(one: str, other: str) -> set[str]:
        return {key for key, value in found[one].items() if value != found[other][key]} - {"output_name"}

    for name in ("zero_conv", "paper", "add"):
        assert differ("released", name) == {"fusion"}
        assert found[name]["fusion"] == name
    assert differ("released", "stock") == {"trainable", "control_learning_rate"}
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


def finished(plan: runs.Plan, name: str, seed: int, ends: float, **changes: Any) -> None:
    """Leave what a run leaves: curves over the steps 200 and 400 that end there."""
    halves = {"200": ends / 2, "400": ends}
    result = {"case": name, "seed": seed, "steps": 400, "batch": 4, "precision": "bf16", "base": "a"}
    result |= {"trained": 4_348_160, "seconds_per_step": 0.5, "figures": dict.fromkeys(runs.FIGURES, halves)}
    plan.folder.mkdir(exist_ok=True)
    runs.result_file(plan, name, seed).write_text(json.dumps(result | changes), "utf-8")


@pytest.fixture
def done(tmp_path: Path) -> runs.Plan:
    """A folder in which three runs are done."""
    plan = runs.Plan(tmp_path / "runs", Path("shapes.ckpt"))
    for name, seed, ends in (("released", 0, 0.6), ("released", 1, 0.8), ("xs", 0, 0.4)):
        finished(plan, name, seed, ends)
    return plan


def test_tables_are_made_of_the_runs_that_are_there(done: runs.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "HEARD", 0.5)
    made = tables.tables(done)
    _, rows = made["summary"]
    assert [row[:4] for row in rows] == [
        ("ControlNeXt as released", "2", "4.35", "0.70 (0.60 to 0.80)"),
        ("ControlNet-XS", "1", "4.35", "0.40"),
    ]
    assert [row[-2] for row in rows] == ["400, 400", "never"]
    assert made["fidelity"] == (
        ("control", "step 200", "step 400"),
        [("ControlNeXt as released", "0.35", "0.70"), ("ControlNet-XS", "0.20", "0.40")],
    )
    assert made["pair"][1] == [
        ("ControlNeXt as released", str(s), f"{e / 2:.2f}", f"{e:.2f}") for s, e in ((0, 0.6), (1, 0.8))
    ]
    assert "together" not in made, "nothing was sampled"


def test_runs_of_two_bases_stand_in_no_table_together(done: runs.Plan) -> None:
    finished(done, "add", 0, 0.5, base="b")
    with pytest.raises(SystemExit, match=r"cannot stand in one table: released:0, released:1, xs:0 with .*add:0 with"):
        tables.tables(done)


def test_the_page_takes_its_tables_between_the_markers_again_and_again() -> None:
    page = "a\n<!-- table: one -->\n<!-- end -->\nb\n<!-- table: two -->\nold\n<!-- end -->\nc\n"
    once = tables.pasted(page, {"one": (("x", "y"), [("1", "2")])})
    assert once == page.replace("one -->\n", "one -->\n| x | y |\n|---|---|\n| 1 | 2 |\n")
    assert tables.pasted(once, {"one": (("x", "y"), [("1", "2")])}) == once
    assert "old" not in tables.pasted(once, {"two": (("z",), [])})


def test_every_place_of_the_page_has_a_table_and_every_chart_is_shown(done: runs.Plan, tmp_path: Path) -> None:
    page = tables.PAGE.read_text("utf-8")
    made = {*tables.tables(done), *pairs.tables([]), "parameters"}
    assert set(re.findall(r"<!-- table: (\w+) -->", page)) == made
    charts = tables.draw_charts(done, tmp_path)
    assert all(path.stat().st_size < 200_000 for path in charts)
    for path in charts:
        assert path.name in page


def test_a_picture_that_follows_both_hints_scores_in_both_and_another_in_none() -> None:
    first, second, *_ = pairs.scenes()
    scene, other = (draw(pairs.SCENE_SEED, index, pairs.SHAPES.side) for index in (first, second))
    hint = pairs.draw_hint(pairs.SHAPES, first)
    true, wrong = scene.image / 255.0, other.image / 255.0
    assert pairs.near_f1(true, hint.some_edges) > 0.95 > 0.6 > pairs.near_f1(wrong, hint.some_edges)
    assert (
        pairs.elsewhere_iou(true, scene, hint.other_mask)
        > 0.9
        > 0.4
        > pairs.elsewhere_iou(wrong, scene, hint.other_mask)
    )
    assert (
        pairs.no_background(true)[scene.mask > 127].mean()
        > 0.95
        > 0.05
        > pairs.no_background(true)[scene.mask == 0].mean()
    )


@pytest.mark.comfy
def test_the_parameters_are_those_of_the_papers_table_5(tmp_path: Path) -> None:
    from comfyui_controlnext.benchmarks import evidence_parameters

    rows = evidence_parameters.table(tmp_path)
    told = [row for row in rows if row[3] and row[2]]
    assert len(told) == 5, "two ControlNets, three ControlNeXts"
    for _, name, learnable, of_paper, total, total_of_paper, _ in told:
        assert abs(float(learnable) - int(of_paper)) < 1 and abs(float(total) - int(total_of_paper)) < 1, name
