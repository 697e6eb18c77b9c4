"""Benchmarks without timing: multiply-adds, launches and peak memory of the released networks."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.benchmarks import recording
from comfyui_controlnext.tools import bench, cli

MIB = 1024 * 1024
STEPS = 20
SIZES = {"sd15": (512, 512, 1), "sdxl": (1024, 1024, 1), "svd": (576, 1024, 14)}
# what a queue run of 20 steps adds at most, and a second one: multiply-adds as a part of the bare model's; launches
GOALS = {
    ("sd15", "sd15"): (0.045, 0.0, 3),
    ("sd15", "sd15_legacy"): (0.185, 0.0, 3),
    ("sdxl", "sdxl"): (0.0215, 0.0, 3),
    ("svd", "svd_v2"): (0.025, 0.0, 11),
    ("sd15", "sd15_53m"): (0.06, 0.06, 480),
    ("sdxl", "sdxl_20m"): (0.06, 0.06, 1250),
}


def scene(family: str) -> Any:
    from comfyui_controlnext.benchmarks.counting import Scene

    return Scene(family, torch.float16, *SIZES[family])


@pytest.mark.comfy
@pytest.mark.parametrize(("family", "name"), GOALS, ids=lambda value: value)
def test_multiply_adds_and_launches_stay_within_the_goals(family: str, name: str, tmp_path: Path) -> None:
    from comfyui_controlnext.benchmarks.bench_counts import make
    from comfyui_controlnext.benchmarks.counting import count, once_per_hint

    of_a_run, of_a_second, launches = GOALS[family, name]
    base, control = scene(family), make(name, tmp_path)
    base.start([control])
    bare, forward = count(base.forward()), base.forward([control])
    first, second = count(forward), count(forward)
    once = once_per_hint(control, base, first.macs - second.macs)
    assert (first.macs - bare.macs - once * (STEPS - 1) / STEPS) / bare.macs <= of_a_run
    assert (second.macs - bare.macs) / bare.macs <= of_a_second
    assert sum(second.launches.values()) - sum(bare.launches.values()) <= launches


# published size -> parameters in 1e9, and what a step adds at most: its hint new, in a run of 20, in a second run
TRANSFORMERS = {
    "SD3-medium": (2.03, 0.050, 0.034),
    "SD3.5-medium": (2.24, 0.039, 0.027),
    "SD3.5-large": (8.06, 0.015, 0.010),
    "Flux.1": (11.90, 0.01, 0.005),
    "Chroma": (8.90, 0.01, 0.005),
    "Qwen-Image": (20.43, 0.01, 0.005),
    "Lumina2": (2.61, 0.026, 0.013),
    "Z-Image": (6.15, 0.01, 0.006),
    "Wan 2.1 1.3B": (1.42, 0.031, 0.021),
    "Wan 2.1 14B": (14.29, 0.004, 0.003),
    "Wan 2.2 5B": (5.00, 0.043, 0.030),
}
SHORT = ("SD3.5-medium", "Z-Image")


@pytest.mark.comfy
@pytest.mark.parametrize("name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.long) for n in TRANSFORMERS])
def test_a_control_of_a_transformer_stays_within_the_goals(name: str, tmp_path: Path) -> None:
    """Goals for one encoder pass per step at batch 1, CFG 1, and for launches."""
    from comfyui_controlnext.benchmarks.bench_transformer_counts import SIDE, counts_of
    from comfyui_controlnext.benchmarks.real_transformers import PUBLISHED, TransformerScene

    published, *most = TRANSFORMERS[name]
    scene = TransformerScene(PUBLISHED[name], SIDE)
    parameters = sum(parameter.numel() for parameter in scene.model.diffusion_model.parameters())
    assert parameters == pytest.approx(published * 1e9, rel=0.005)
    counts = counts_of(scene, tmp_path)
    assert 0 < counts.second.macs - counts.bare.macs < counts.first.macs - counts.bare.macs
    for ratio, more in zip(counts.ratios(), (*most, 0.0005), strict=True):
        assert ratio <= 1 + more
    assert counts.second.launches.total() - counts.bare.launches.total() <= 13


@pytest.mark.comfy
@pytest.mark.long
def test_controls_of_others_are_counted_where_the_host_has_them(tmp_path: Path) -> None:
    from comfyui_controlnext.benchmarks.bench_transformer_counts import rows_of

    ratios = {row[1]: float(row[3]) for row in rows_of("Flux.1", tmp_path)}
    assert ratios["union, 5 + 10 blocks"] == pytest.approx(1.279, abs=0.002)
    assert ratios["union pro 2.0, 6 + 0 blocks"] == pytest.approx(1.112, abs=0.002)


@pytest.mark.comfy
def test_the_multiply_adds_are_those_of_the_released_networks(tmp_path: Path) -> None:
    from comfyui_controlnext.benchmarks.counting import count
    from comfyui_controlnext.benchmarks.real_size import make_stock

    base = scene("sd15")
    bare = count(base.forward()).macs
    assert bare == pytest.approx(803e9, rel=0.001)
    assert count(base.forward(stock=make_stock(base.model, torch.float16, "meta"))).macs / bare == pytest.approx(
        1.353, abs=0.001
    )


@pytest.mark.comfy
@pytest.mark.parametrize(("name", "most"), [("sdxl", 40), ("sdxl_20m", 0.05), ("sdxl_48m", 0.05)])
def test_the_peak_over_the_bare_sdxl_stays_within_the_goals(name: str, most: float, tmp_path: Path) -> None:
    """Goals in MiB for a ControlNeXt, as a share of the base's activations for a ControlNet-XS; weights are not
    counted.
    """
    from comfyui_controlnext.benchmarks.bench_counts import make
    from comfyui_controlnext.benchmarks.counting import peak

    base, control = scene("sdxl"), make(name, tmp_path)
    base.start([control])
    weights = [*base.model.model.diffusion_model.parameters(), *control.get_models()[0].model.parameters()]
    bare, forward = peak(base.forward(), weights), base.forward([control])
    over = peak(forward, weights) - bare
    assert 0 < over <= (most * bare if most < 1 else most * MIB)


def test_a_table_is_appended_with_what_it_was_measured_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recording, "FOLDER", tmp_path)
    for title in ("first", "second"):
        recording.append_table("speed", title, ("case", "ratio"), [("bare", "1")], "fp16", tmp_path / "all.json")
    (page,) = tmp_path.glob("speed_*.md")
    text = page.read_text("utf-8")
    assert text.startswith("# speed\n") and text.count("| bare | 1     |") == 2
    assert f"## second\n\n{recording.facts()}; fp16\n" in text and torch.__version__ in text
    entries = [json.loads(line) for line in (tmp_path / "all.json").read_text("utf-8").splitlines()]
    assert [entry["title"] for entry in entries] == ["first", "second"]
    assert entries[0]["rows"] == [{"case": "bare", "ratio": "1"}]
    assert "| case | ratio |" in capsys.readouterr().out


def test_a_spread_is_median_and_range() -> None:
    assert recording.spread([1.1, 1.0, 1.3]) == "1.100 (1.000 to 1.300)"
    assert recording.spread([1.05]) == "1.050"


def test_every_benchmark_has_its_script_and_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    scripts = Path(recording.__file__).parent
    assert all((scripts / f"bench_{name}.py").is_file() for name in bench.BENCHMARKS)
    options = cli.parse(["bench", "fly", "--quick"])
    assert bench.run_benchmarks(options, lambda: Path("nowhere")) == 2
    assert "no benchmark 'fly'. There are: machine, counts" in capsys.readouterr().err


def test_without_diffusers_training_is_left_out_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from comfyui_controlnext.benchmarks import bench_train

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else found(name))
    monkeypatch.setattr(bench_train, "begin", lambda _: pytest.fail("nothing is begun"))
    monkeypatch.setattr(sys, "argv", ["bench_train.py"])
    bench_train.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert "left out" in line and "diffusers" in line and "requirements-test.txt" in line


def test_the_number_of_pictures_in_a_step_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, list[str]] = {}
    monkeypatch.setattr(bench, "_run", lambda name, arguments: started.update({name: arguments}) or 0)
    assert bench.run_benchmarks(cli.parse(["bench", "train", "load", "--batch", "4"]), lambda: Path("host")) == 0
    assert "--batch 4" in " ".join(started["train"]) and "--batch" not in started["load"]


def test_a_loop_is_set_against_the_plain_one() -> None:
    from comfyui_controlnext.benchmarks.bench_train import Case, Times, cases_of, rows_of

    assert [case.title for case in cases_of("fp32")] == [
        "plain",
        "ours, fp16 file",
        "ours, fp32 file",
        "ours, checkpointing, fp16 file",
        "ours, checkpointing, fp32 file",
    ]
    assert [case.title for case in cases_of("bf16")] == ["plain", "ours, fp16 file", "ours, checkpointing, fp16 file"]
    slow = {"wall": [4.0, 4.0, 40.0], "processor": [8.0, 8.0, 8.0], "peak": 4 * 2**30}
    quick = {"wall": [2.0, 2.0], "processor": [3.0, 3.0], "peak": 2**30}
    rows = rows_of({Case("plain"): [slow], Case("ours", "fp16"): [quick]}, 2)
    assert rows == [
        ("plain", "0.5000", "1.00x", "4.0", "4.00", "1.00x"),
        ("ours, fp16 file", "1.0000", "2.00x", "1.5", "1.00", "0.25x"),
    ]
    times = Times(wall=[0.0, 9.0, 10.0, 12.0], processor=[0.0, 1.0, 2.0, 3.0])
    assert times.of_steps() == {"wall": [1.0, 2.0], "processor": [1.0, 1.0]}, "the first step warms up"


@pytest.mark.comfy
def test_the_parameters_are_those_of_the_papers_table_5(tmp_path: Path) -> None:
    from comfyui_controlnext.benchmarks import bench_parameters

    told = [row for row in bench_parameters.table(tmp_path) if row[3] and row[2]]
    assert len(told) == 5, "two ControlNets, three ControlNeXts"
    for _, name, learnable, of_paper, total, total_of_paper, _ in told:
        assert abs(float(learnable) - int(of_paper)) < 1 and abs(float(total) - int(total_of_paper)) < 1, name
