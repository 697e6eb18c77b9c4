"""Measures of the super-resolution's evidence against formulas written out, and its command."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from comfyui_controlnext.benchmarks import super_resolution
from comfyui_controlnext.tools import bench, cli

GRAY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue by ITU-R BT.601."""


def pictures(side: int = 24) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    one = random.random((side, side, 3)).astype(np.float32)
    return one, (0.7 * one + 0.3 * random.random((side, side, 3))).astype(np.float32)


def test_psnr_is_that_of_the_mean_square() -> None:
    one, _ = pictures()
    assert super_resolution.psnr(np.full_like(one, 0.6), np.full_like(one, 0.5)) == pytest.approx(20, abs=1e-4)


def reference_ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity by Wang et al. 2004, equation 13, window by window: 11 x 11, mirrored at the edges
    including the edge pixel.
    """
    x, y = (np.pad(picture.astype(np.float64) @ GRAY, 5, mode="symmetric") for picture in (one, other))
    line = np.array([math.exp(-(place**2) / (2 * 1.5**2)) for place in range(-5, 6)])
    window = np.outer(line, line) / line.sum() ** 2
    found = []
    for top in range(one.shape[0]):
        for left in range(one.shape[1]):
            a, b = (part[top : top + 11, left : left + 11] for part in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            both = (window * (a - mean_a) * (b - mean_b)).sum()
            top_half = (2 * mean_a * mean_b + 0.01**2) * (2 * both + 0.03**2)
            found.append(top_half / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2)))
    return float(np.mean(found))


def test_ssim_is_the_published_formula() -> None:
    one, other = pictures()
    found = super_resolution.ssim(one, other)
    assert found == pytest.approx(reference_ssim(one, other), abs=1e-3) and 0.3 < found < 0.99
    assert super_resolution.ssim(one, one) == pytest.approx(1)


def test_the_table_has_the_means_of_all_scenes() -> None:
    scenes = [{"bicubic": {"PSNR": 20.0, "SSIM": 0.5}}, {"bicubic": {"PSNR": 30.0, "SSIM": 0.7}}]
    assert super_resolution.table(scenes) == ["| | PSNR | SSIM |", "|---|---|---|", "| bicubic | 25.0 | 0.60 |"]


def test_it_runs_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(bench, "_run", lambda name, arguments: started.append(name) or 0)
    bench.run_benchmarks(cli.parse(["bench"]), lambda: Path("host"))
    assert started == list(bench.BENCHMARKS) and "super_resolution" not in started
    assert all((Path(super_resolution.__file__).parent / f"{name}.py").is_file() for name in bench.ON_REQUEST)


def test_the_command_hands_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: dict[str, list[str]] = {}
    monkeypatch.setattr(bench, "_run", lambda name, arguments: started.update({name: arguments}) or 0)
    given = ["bench", "super_resolution", "--parts", "measure", "--steps", "7", "--scenes", "3"]
    options = cli.parse(given)
    assert bench.run_benchmarks(options, lambda: tmp_path) == 0
    parsed = super_resolution.parse(started["super_resolution"])
    assert (parsed.parts, parsed.steps, parsed.scenes, parsed.comfyui) == (("measure",), 7, 3, tmp_path)
    with pytest.raises(SystemExit):
        super_resolution.parse([*started["super_resolution"], "--parts", "walk"])


def test_the_recipe_is_of_the_sources_that_are_not_measured() -> None:
    from comfyui_controlnext.controlnext_training.config_files import make_config, read_recipe

    config = make_config({}, read_recipe(super_resolution.RECIPE))
    assert (config.hint, config.gain, config.variant) == ("low_resolution", 1.0, "sd3")
    assert all(not source.endswith(f":{super_resolution.SEED}") for source in config.data)
