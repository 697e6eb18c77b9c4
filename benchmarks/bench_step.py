"""Cost of a control per step: first queue run, second queue run, beside stock ControlNet.

    python run.py bench step [--quick] [--cases sd15,..]

Cases are interleaved; a ratio is a case's step over the bare step of the same repeat. `own` is (bare + own) / bare
within the same step, from the processor time spent in this pack's code; noise of other programs cancels in it.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.host_start import Options, begin  # noqa: E402
from comfyui_controlnext.benchmarks.paired import Case, measure, measure_own  # noqa: E402
from comfyui_controlnext.benchmarks.published_transformers import TRANSFORMERS, make_model, width_of  # noqa: E402
from comfyui_controlnext.benchmarks.real_size import make_control, make_stock, make_unet, make_xs  # noqa: E402
from comfyui_controlnext.benchmarks.sampling import Setup, watching  # noqa: E402


@dataclass(frozen=True)
class Family:
    """Base model with its controls. size: height, width, batch; quick: a smaller size."""

    name: str
    size: tuple[int, int, int]
    quick: tuple[int, int, int]
    controls: Callable[[Any, Options], list[tuple[str, tuple[Any, ...], str, str]]]
    """(MODEL, options) -> (name, controls, goal of the first run, goal of the second) of each case."""
    minutes: bool = False
    """True: a step takes minutes on a CPU, where only `own` is measured. False: all is measured."""


def sd15(model: Any, options: Options) -> list[tuple[str, tuple[Any, ...], str, str]]:
    folder = options.scratch
    three = tuple(make_control("sd15", folder, seed) for seed in range(3))
    return [
        ("ControlNeXt", three[:1], "1.03 / 1.05", "1.005 / noise"),
        ("ControlNeXt legacy", (make_control("sd15_legacy", folder),), "1.06 / 1.19", "1.005 / noise"),
        ("three ControlNeXts", three, "", "1.015"),
        ("ControlNet-XS 53m", (make_xs("sd15_53m", folder),), "", ""),
        ("stock ControlNet", (make_stock(model, options.dtype),), "", ""),
    ]


def sdxl(model: Any, options: Options) -> list[tuple[str, tuple[Any, ...], str, str]]:
    folder = options.scratch
    three = tuple(make_control("sdxl", folder, seed) for seed in range(3))
    return [
        ("ControlNeXt", three[:1], "1.02 / 1.03", "1.005 / noise"),
        ("three ControlNeXts", three, "", "1.015"),
        ("ControlNet-XS 20m", (make_xs("sdxl_20m", folder),), "", "1.10 / 1.06"),
        ("ControlNet-XS 48m", (make_xs("sdxl_48m", folder),), "", "1.10 / 1.06"),
        ("stock ControlNet", (make_stock(model, options.dtype),), "", ""),
    ]


def svd(model: Any, options: Options) -> list[tuple[str, tuple[Any, ...], str, str]]:
    return [
        ("ControlNeXt v2", (make_control("svd_v2", options.scratch),), "1.03", "1.01"),
        ("ControlNeXt v1", (make_control("svd_v1", options.scratch),), "1.03", "1.01"),
    ]


def transformer(family: str) -> Callable[[Any, Options], list[tuple[str, tuple[Any, ...], str, str]]]:
    """Function that makes the cases of one transformer family."""

    def cases(model: Any, options: Options) -> list[tuple[str, tuple[Any, ...], str, str]]:
        control = make_control(family, options.scratch, width=width_of(family, options.small))
        return [("ControlNeXt", (control,), "1.02", "1.005")]

    return cases


FAMILIES = (
    Family("sd15", (512, 512, 1), (128, 128, 1), sd15),
    Family("sdxl", (1024, 1024, 1), (256, 256, 1), sdxl),
    Family("svd", (576, 1024, 14), (64, 128, 4), svd, minutes=True),
    *(Family(name, (1024, 1024, 1), (64, 64, 1), transformer(name), minutes=True) for name in TRANSFORMERS),
)


WIDE = ("ControlNeXt legacy", "ControlNeXt v1")
"""Controls that need more channels than small networks have."""


def size_of(family: Family, options: Options) -> tuple[int, int, int]:
    """Height, width and number of latents."""
    if options.small:
        return 64, 64, min(2, family.size[2])
    return family.quick if options.quick else family.size


def cases_of(family: Family, options: Options) -> list[Case]:
    """Cases of a base: the bare model first, then each control's first and second run."""
    if family.name in TRANSFORMERS:
        half = options.dtype is torch.float16  # its range is too small for some of them
        model = make_model(family.name, torch.bfloat16 if half else options.dtype, options.small)
    else:
        model = make_unet(family.name, options.dtype)
    bare = Setup(family.name, model, *size_of(family, options))
    cases = [Case("bare", bare)]
    for name, controls, first, second in family.controls(model, options):
        if options.small and name in WIDE:
            continue
        setup = bare.with_controls(*controls)
        stock = name.startswith("stock")
        if first:
            cases.append(Case(f"{name}, first run", setup, first=True, goal=first))
        again = name if stock else f"{name}, second run"
        cases.append(Case(again, setup, second=not stock and not first, goal=second))
    return [case for case in cases if case.name == "bare" or options.wants(f"{family.name} {case.name}")]


def main() -> None:
    options = begin(__doc__ or "")
    with watching():
        for family in FAMILIES:
            if options.wants(family.name) or any(family.name in word for word in options.cases):
                height, width, batch = size_of(family, options)
                size = f"{family.name}, {height}x{width}" + (f", {batch} frames" if batch > 1 else "")
                alone = family.minutes and options.cpu and not options.quick
                (measure_own if alone else measure)("step", f"{size}, CFG", cases_of(family, options), options)


if __name__ == "__main__":
    main()
