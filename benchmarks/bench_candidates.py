"""Candidates (benchmarks/candidates) against the product: time of a step, and difference of the latents.

python run.py bench candidates
"""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.bench_counts import make  # noqa: E402
from comfyui_controlnext.benchmarks.candidates.encoder_and_fuse import channels_last, one_kernel  # noqa: E402
from comfyui_controlnext.benchmarks.candidates.merged_products import merged_products  # noqa: E402
from comfyui_controlnext.benchmarks.candidates.one_graph import one_graph  # noqa: E402
from comfyui_controlnext.benchmarks.candidates.streams import beside_the_base, fetched_ahead  # noqa: E402
from comfyui_controlnext.benchmarks.host_start import Options, begin  # noqa: E402
from comfyui_controlnext.benchmarks.paired import RUN_STEPS  # noqa: E402
from comfyui_controlnext.benchmarks.real_size import make_unet  # noqa: E402
from comfyui_controlnext.benchmarks.recording import append_table, spread  # noqa: E402
from comfyui_controlnext.benchmarks.sampling import Setup, forget, queue  # noqa: E402

HEAD = ("candidate", "control", "a step against the product", "difference of latents", "pays")
SIZES = {"sd15": 512, "sdxl": 1024}
PAYS = 0.995
"""Largest ratio of a candidate's slowest repeat to the product at which it pays."""


@dataclass(frozen=True)
class Candidate:
    """Candidate for one change. around:

    (MODEL, the control's network, device) -> context in which the product has the change.
    """

    name: str
    controls: tuple[str, ...]
    """Names of rows of SPECS or RELEASED_XS."""
    around: Callable[[Any, Any, Any], AbstractContextManager[None]]
    first: bool = False
    """True: it changes the cost of a first run. False: only of later ones."""
    from_host: bool = False
    """True: the cache keeps features in host memory. False: on the device."""


XS = ("sdxl_20m", "sdxl_48m", "sd15_53m")
CANDIDATES = (
    Candidate("merged products", XS, lambda model, net, device: merged_products(net)),
    Candidate("block on a second stream", XS, lambda model, net, device: beside_the_base(device)),
    Candidate("one CUDA graph", ("sdxl_20m", "sd15_53m"), lambda model, net, device: one_graph(model)),
    Candidate("one kernel to add", ("sdxl", "sd15"), lambda model, net, device: one_kernel(device)),
    Candidate("encoder in channels last", ("sdxl", "sd15"), lambda model, net, device: channels_last(net), first=True),
    Candidate(
        "features a step ahead", ("sdxl", "sd15"), lambda model, net, device: fetched_ahead(device), from_host=True
    ),
)


def compare(candidate: Candidate, setup: Setup, options: Options) -> tuple[list[float], float]:
    """Ratios of a step's time to the product's, one per repeat; and the largest relative difference of the latents, or
    NaN.
    """
    net, steps = setup.controls[0].network.model, 2 if options.cpu else RUN_STEPS
    ratios: list[float] = []
    differences: list[float] = []
    if not options.small:
        queue(setup, steps, seed=99)
    for repeat in range(1 if options.small else options.repeats + 1):
        if candidate.first:
            forget(setup)
        plain = queue(setup, steps, seed=repeat)
        if candidate.first:
            forget(setup)
        with candidate.around(setup.model, net, options.device):
            if not repeat and not options.cpu:  # compiled, captured and joined once
                queue(setup, steps, seed=repeat)
                if candidate.first:
                    forget(setup)
            found = queue(setup, steps, seed=repeat)
        if repeat or options.small:
            ratios.append(found.per_step(steps).wall / plain.per_step(steps).wall)
        differences.append(float((found.latent - plain.latent).norm() / plain.latent.norm()))
        if options.left < 0:
            break
    return ratios, max(differences, key=lambda value: (math.isnan(value), value))


def rows_of(family: str, options: Options) -> list[tuple[str, ...]]:
    """Rows of one base's table; the error of a candidate is shown in its row."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.features import CACHE

    side = 64 if options.small else 128 if options.cpu else SIZES[family]
    bare, budgets = Setup(family, make_unet(family, options.dtype), side, side), dict(CACHE.budgets)
    rows: list[tuple[str, ...]] = []
    for candidate in CANDIDATES:
        for name in (name for name in candidate.controls if name.startswith(family)):
            setup = bare.with_controls(make(name, options.scratch))
            CACHE.budgets["device"] = 0 if candidate.from_host else budgets["device"]
            try:
                ratios, difference = compare(candidate, setup, options)
                pays = "yes" if ratios and max(ratios) < PAYS else "no"
                rows.append((candidate.name, name, spread(ratios), f"{difference:.1e}", pays))
            except Exception as error:  # an error on the GPU is the result
                rows.append((candidate.name, name, "failed", "", f"{type(error).__name__}: {error}".split("\n")[0]))
            finally:
                CACHE.budgets = dict(budgets)
    return rows


def main() -> None:
    options = begin(__doc__ or "")
    for family in ("sdxl", "sd15"):
        if options.wants(family) and not (options.small and family != "sd15"):
            settings = f"{str(options.dtype)[6:]}, {options.repeats} interleaved repeats"
            title = f"candidates, {family}, CFG"
            append_table("candidates", title, HEAD, rows_of(family, options), settings, options.json, not options.quick)


if __name__ == "__main__":
    main()
