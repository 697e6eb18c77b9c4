"""Profile of a step: this pack's operations by kind, beside the whole step, by torch's profiler.

    python run.py bench profile

First: a step that encodes its hint for two timesteps; second: one that finds everything kept. On a GPU the times are
those of the kernels, and the places where the host waits for the device are counted.
"""

from __future__ import annotations

import runpy
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.bench_counts import make  # noqa: E402
from comfyui_controlnext.benchmarks.host import Options, begin  # noqa: E402
from comfyui_controlnext.benchmarks.real_size import make_unet  # noqa: E402
from comfyui_controlnext.benchmarks.report import append_table  # noqa: E402
from comfyui_controlnext.benchmarks.sampling import OWN_RANGE, Setup, forget, queue, watching  # noqa: E402

SIZES = {"sd15": (512, 256), "sdxl": (1024, 512)}
"""Pictures' sides on a GPU and on a CPU."""
CONTROLS = {"sd15": ("sd15", "sd15_legacy", "sd15_53m"), "sdxl": ("sdxl", "sdxl_20m", "sdxl_48m")}
HEAD = ("control", "run", "ms of a run", "ms of ours", "share", "the largest parts, ms", "waits over bare")
SHOWN = 7


def spent(setup: Setup, steps: int, options: Options) -> tuple[float, Counter[str]]:
    """Milliseconds of a queue run, and of operations inside this pack's code by name."""
    activities = [ProfilerActivity.CPU] + ([] if options.cpu else [ProfilerActivity.CUDA])
    with profile(activities=activities) as found:
        queue(setup, steps)
    total, own = 0.0, Counter[str]()
    for event in found.events():
        time = (event.self_cpu_time_total if options.cpu else event.self_device_time_total) / 1000
        if event.name.startswith(("aten::", "mkldnn")) or not options.cpu:
            total += time
            if _inside(event):
                own[event.name] += time
    return total, own


def _inside(event: Any) -> bool:
    while event is not None:
        if event.name == OWN_RANGE:
            return True
        event = event.cpu_parent
    return False


def waits(setup: Setup, steps: int, options: Options) -> int:
    """Number of times that a queue run waits for the GPU."""
    if options.cpu:
        return 0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            queue(setup, steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def main() -> None:
    options = begin(__doc__ or "")
    with watching():
        for family, sides in SIZES.items():
            if not options.wants(family):
                continue
            side = 128 if options.quick else sides[int(options.cpu)]
            bare = Setup(family, make_unet(family, options.dtype), side, side)
            queue(bare, 1)
            quiet = {steps: waits(bare, steps, options) for steps in (1, 2)}
            rows = []
            for name in CONTROLS[family]:
                setup = bare.with_controls(make(name, options.scratch))
                for run, steps in (("first", 2), ("second", 1)):
                    if run == "first":
                        forget(setup)
                    total, own = spent(setup, steps, options)
                    ours = sum(own.values())
                    parts = ", ".join(f"{key.removeprefix('aten::')} {ms:.1f}" for key, ms in own.most_common(SHOWN))
                    more = "" if options.cpu else str(waits(setup, steps, options) - quiet[steps])
                    rows.append((name, run, f"{total:.0f}", f"{ours:.1f}", f"{ours / total:.4f}", parts, more))
            settings = f"{str(options.dtype)[6:]}, runs of 2 steps and of 1, {torch.get_num_threads()} threads"
            title = f"{family}, {side}x{side}, CFG, by operation"
            append_table("profile", title, HEAD, rows, settings, options.json, not options.quick)


if __name__ == "__main__":
    main()
