"""Multiply-adds and launches that a control adds to a forward, by torch's flop counter, at any size.

    python run.py bench counts

Computed only from shapes, so that it takes seconds and is the same everywhere. A launch is an operation that would
start work on a GPU; attention counts as its parts. First: hint and timestep are new; `run of 20`: the work done once
per hint is spread over a queue run; second: all features of the hint are cached.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.counting import Count, Scene, count, once_per_hint  # noqa: E402
from comfyui_controlnext.benchmarks.host_start import begin  # noqa: E402
from comfyui_controlnext.benchmarks.real_size import make_control, make_stock, make_xs  # noqa: E402
from comfyui_controlnext.benchmarks.recording import append_table  # noqa: E402

STEPS = 20
SCENES = (("sd15", 512, 512, 1), ("sdxl", 1024, 1024, 1), ("svd", 576, 1024, 14))
CONTROLS = {
    "sd15": ("sd15", "sd15_legacy", "sd15_53m"),
    "sdxl": ("sdxl", "sdxl_july", "sdxl_20m", "sdxl_48m"),
    "svd": ("svd_v2", "svd_v2_padded", "svd_v1"),
}
HEAD = ("case", "G multiply-adds", "first", "run of 20", "second", "launches", "more first", "more second")


def make(name: str, folder: Path) -> Any:
    """Make a control by its row in SPECS or RELEASED_XS."""
    return make_xs(name, folder) if name[-1] == "m" and name[-2].isdigit() else make_control(name, folder)


def rows_of(scene: Scene, names: tuple[str, ...], folder: Path) -> list[tuple[str, ...]]:
    bare = count(scene.forward())
    launches = sum(bare.launches.values())
    rows: list[tuple[str, ...]] = [("bare", f"{bare.macs / 1e9:,.0f}", "1", "1", "1", str(launches), "", "")]

    def row(name: str, first: Count, once: float, second: Count) -> tuple[str, ...]:
        run = (first.macs - once * (STEPS - 1) / STEPS) / bare.macs
        more = [str(sum(each.launches.values()) - launches) for each in (first, second)]
        cells = (f"{first.macs / bare.macs:.4f}", f"{run:.4f}", f"{second.macs / bare.macs:.4f}")
        return (name, f"{first.macs / 1e9:,.0f}", *cells, "", *more)

    for name in names:
        control = make(name, folder)
        scene.start([control])
        forward = scene.forward([control])
        first, second = count(forward), count(forward)
        rows.append(row(name, first, once_per_hint(control, scene, first.macs - second.macs), second))
    if scene.family != "svd":
        stock = count(scene.forward(stock=make_stock(scene.model, scene.dtype, "meta")))
        rows.append(row("stock ControlNet", stock, 0.0, stock))
    return rows


def main() -> None:
    options = begin(__doc__ or "")
    for family, height, width, latents in SCENES:
        if options.wants(family):
            scene = Scene(family, torch.float16, height, width, latents)
            rows = rows_of(scene, CONTROLS[family], options.scratch)
            title = f"{family}, {height}x{width}" + (f", {latents} frames" if latents > 1 else "") + ", CFG"
            append_table("counts", title, HEAD, rows, "counted, not timed", options.json, not options.quick)


if __name__ == "__main__":
    main()
