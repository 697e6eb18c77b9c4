"""Growth of a control's cost with resolution, batch, frames and number of controls.

    python run.py bench growth

Two tables: counted from shapes at all sizes, and timed on this machine.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.counting import Scene, count, once_per_hint  # noqa: E402
from comfyui_controlnext.benchmarks.host_start import Options, begin  # noqa: E402
from comfyui_controlnext.benchmarks.paired import RUN_STEPS, Case, measure  # noqa: E402
from comfyui_controlnext.benchmarks.real_size import make_control, make_unet  # noqa: E402
from comfyui_controlnext.benchmarks.recording import append_table  # noqa: E402
from comfyui_controlnext.benchmarks.sampling import Setup, watching  # noqa: E402

Size = tuple[str, int, int, int, int]
"""One size: family, height, width, number of images or frames, number of controls."""

COUNTED: tuple[Size, ...] = (
    *(("sd15", side, side, 1, 1) for side in (256, 512, 768, 1024)),
    *(("sdxl", side, side, 1, 1) for side in (512, 768, 1024, 1536, 2048)),
    *(("sdxl", 1024, 1024, batch, 1) for batch in (2, 4, 8)),
    *(("sdxl", 1024, 1024, 1, number) for number in (2, 3, 5)),
    *(("svd", 576, 1024, frames, 1) for frames in (2, 14, 25)),
)
TIMED_GPU: tuple[Size, ...] = (
    *(("sd15", side, side, 1, 1) for side in (512, 768, 1024)),
    *(("sd15", 512, 512, batch, 1) for batch in (4, 16)),
    *(("sd15", 512, 512, 1, number) for number in (2, 3, 5)),
    *(("svd", 576, 1024, frames, 1) for frames in (2, 14)),
)
TIMED_CPU: tuple[Size, ...] = (
    *(("sd15", side, side, 1, 1) for side in (128, 256, 384)),
    ("sd15", 128, 128, 4, 1),
    ("sd15", 128, 128, 1, 3),
    ("svd", 64, 128, 2, 1),
    ("svd", 64, 128, 6, 1),
)
VARIANT = {"sd15": "sd15", "sdxl": "sdxl", "svd": "svd_v2"}
HEAD = (
    "base",
    "size",
    "images or frames",
    "controls",
    "first step",
    "run of 20",
    "second run",
    "launches more, second",
)


def name_of(size: Size) -> str:
    family, height, width, latents, number = size
    return f"{family} {height}x{width}, {latents} latents, {number} controls"


def counted(size: Size, options: Options) -> tuple[str, ...]:
    """A row of the first table."""
    family, height, width, latents, number = size
    scene = Scene(family, torch.float16, height, width, latents)
    controls = [make_control(VARIANT[family], options.scratch, seed) for seed in range(number)]
    scene.start(controls)
    bare, forward = count(scene.forward()), scene.forward(controls)
    first, second = count(forward), count(forward)
    once = sum(once_per_hint(control, scene, 0) for control in controls)
    ratios = (first.macs, first.macs - once * (RUN_STEPS - 1) / RUN_STEPS, second.macs)
    more = sum(second.launches.values()) - sum(bare.launches.values())
    cells = [f"{macs / bare.macs:.4f}" for macs in ratios]
    return (family, f"{height}x{width}", str(latents), str(number), *cells, str(more))


def timed(size: Size, options: Options) -> None:
    """A table of one size."""
    family, height, width, latents, number = size
    bare = Setup(family, make_unet(family, options.dtype), height, width, latents)
    controls = tuple(make_control(VARIANT[family], options.scratch, seed) for seed in range(number))
    setup = bare.with_controls(*controls)
    cases = [Case("bare", bare), Case("first run", setup, first=True), Case("second run", setup, second=True)]
    measure("growth", name_of(size), cases, options)


def main() -> None:
    options = begin(__doc__ or "")
    sizes = [size for size in COUNTED if options.wants(name_of(size))]
    rows = [counted(size, options) for size in (sizes[::4] if options.quick else sizes)]
    if rows:
        title = "multiply-adds, as ratios to the bare model"
        append_table("growth", title, HEAD, rows, "counted, not timed", options.json, not options.quick)
    with watching():
        for size in TIMED_CPU if options.cpu else TIMED_GPU:
            if options.wants(name_of(size)) and not (options.quick and size != TIMED_CPU[0]):
                timed(size, options)


if __name__ == "__main__":
    main()
