"""Profile of a step: this pack's operations by kind, beside the whole step, by torch's profiler.

    python run.py bench profile

First: a step that encodes its hint for two timesteps; second: one with all features cached. On a GPU the times are
those of the kernels, and the synchronisations of the host with the device are counted.
"""

from __future__ import annotations

import runpy
import unittest.mock
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.bench_counts import make  # noqa: E402
from comfyui_controlnext.benchmarks.host_start import Options, begin  # noqa: E402
from comfyui_controlnext.benchmarks.real_size import fits, make_unet  # noqa: E402
from comfyui_controlnext.benchmarks.recording import append_table  # noqa: E402
from comfyui_controlnext.benchmarks.sampling import OWN_RANGE, Setup, forget, queue, watching  # noqa: E402

SIZES = {"sd15": (512, 256), "sdxl": (1024, 512)}
"""Sides of the pictures on a GPU and on a CPU, in pixels."""
CONTROLS = {"sd15": ("sd15", "sd15_legacy", "sd15_53m"), "sdxl": ("sdxl", "sdxl_20m", "sdxl_48m")}
HEAD = ("control", "run", "ms of a run", "ms of ours", "share", "of it the addition", "the largest parts, ms")
ON_GPU = ("launches over bare", "waits over bare")
SHOWN = 7
FUSE_RANGE = "controlnext: fuse"
"""Name of the addition in the profile."""


@dataclass
class StepProfile:
    """Profile of one queue run: milliseconds in total, by operation of this pack, and of the
    addition; kernel launches.
    """

    total: float = 0.0
    own: Counter[str] = field(default_factory=Counter)
    fuse: float = 0.0
    launches: int = 0


@contextmanager
def named_fuse() -> Iterator[None]:
    """Context in which the addition has the name FUSE_RANGE in profiles."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling import next_forward

    plain = next_forward.fuse

    def fuse(*given: Any) -> torch.Tensor:
        with record_function(FUSE_RANGE):
            return plain(*given)

    with unittest.mock.patch.object(next_forward, "fuse", fuse):
        yield


def profile_run(setup: Setup, steps: int, options: Options) -> StepProfile:
    """Profile a queue run."""
    activities = [ProfilerActivity.CPU] + ([] if options.cpu else [ProfilerActivity.CUDA])
    with profile(activities=activities) as profiled:
        queue(setup, steps)
    found = StepProfile()
    for event in profiled.events():
        if event.device_type != DeviceType.CPU:
            continue  # kernels: their times are also with the operations that launched them
        time = (event.self_cpu_time_total if options.cpu else event.self_device_time_total) / 1000
        found.launches += len(event.kernels)
        if event.name.startswith(("aten::", "mkldnn")) or not options.cpu:
            found.total += time
            if _inside(event, OWN_RANGE):
                found.own[event.name] += time
            if _inside(event, FUSE_RANGE):
                found.fuse += time
    return found


def _inside(event: Any, name: str) -> bool:
    while event is not None:
        if event.name == name:
            return True
        event = event.cpu_parent
    return False


def count_synchronisations(setup: Setup, steps: int, options: Options) -> int:
    """Count the synchronisations of a queue run with the GPU."""
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


def cells(found: StepProfile) -> tuple[str, ...]:
    """Cells of the table's columns from `ms of a run` on."""
    ours = sum(found.own.values())
    parts = ", ".join(f"{key.removeprefix('aten::')} {ms:.1f}" for key, ms in found.own.most_common(SHOWN))
    total = found.total or 1.0
    return (f"{found.total:.0f}", f"{ours:.1f}", f"{ours / total:.4f}", f"{found.fuse / total:.4f}", parts)


def main() -> None:
    options = begin(__doc__ or "")
    with watching(), named_fuse():
        for family, sides in SIZES.items():
            if not options.wants(family) or (options.small and family != "sd15"):
                continue
            side = 64 if options.small else 128 if options.quick else sides[int(options.cpu)]
            bare = Setup(family, make_unet(family, options.dtype), side, side)
            queue(bare, 1)
            quiet = {
                steps: (profile_run(bare, steps, options).launches, count_synchronisations(bare, steps, options))
                for steps in (1, 2)
            }
            rows = []
            for name in (name for name in CONTROLS[family] if fits(name, options.small)):
                setup = bare.with_controls(make(name, options.scratch))
                for run, steps in (("first", 2), ("second", 1)):
                    if run == "first":
                        forget(setup)
                    found = profile_run(setup, steps, options)
                    launches, waited = quiet[steps]
                    more = (
                        ()
                        if options.cpu
                        else (found.launches - launches, count_synchronisations(setup, steps, options) - waited)
                    )
                    rows.append((name, run, *cells(found), *map(str, more)))
            settings = f"{str(options.dtype)[6:]}, runs of 2 steps and of 1, {torch.get_num_threads()} threads"
            title = f"{family}, {side}x{side}, CFG, by operation"
            head = HEAD if options.cpu else (*HEAD, *ON_GPU)
            append_table("profile", title, head, rows, settings, options.json, not options.quick)


if __name__ == "__main__":
    main()
