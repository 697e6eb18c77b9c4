"""Stacking of controls: 1, 2, 3 and 5 ControlNeXts, first and second queue run, beside as many stock ControlNets.

python run.py bench stacking
"""

from __future__ import annotations

import runpy
from pathlib import Path

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.host_start import Options, begin  # noqa: E402
from comfyui_controlnext.benchmarks.paired import Case, measure  # noqa: E402
from comfyui_controlnext.benchmarks.real_size import make_control, make_stock, make_unet  # noqa: E402
from comfyui_controlnext.benchmarks.sampling import Setup, watching  # noqa: E402

SIZES = {"sd15": (512, 256, 128), "sdxl": (1024, 512, 256)}
"""Sides of the pictures on a GPU, on a CPU and in a quick run, in pixels."""
NUMBERS = (1, 2, 3, 5)


def cases_of(family: str, options: Options) -> list[Case]:
    side = 64 if options.small else SIZES[family][2 if options.quick else int(options.cpu)]
    bare = Setup(family, make_unet(family, options.dtype), side, side)
    controls = [make_control(family, options.scratch, seed) for seed in range(max(NUMBERS))]
    cases = [Case(f"bare, {side}x{side}", bare)]
    for number in NUMBERS[:1] if options.small else NUMBERS:
        setup = bare.with_controls(*controls[:number])
        cases.append(Case(f"{number} ControlNeXt, first run", setup, first=True))
        cases.append(Case(f"{number} ControlNeXt, second run", setup, second=True, goal="1.015" if number == 3 else ""))
    stock = make_stock(bare.model, options.dtype)
    for number in NUMBERS[: 1 if options.quick else 3]:
        cases.append(Case(f"{number} stock ControlNet", bare.with_controls(*[stock] * number)))
    return cases


def main() -> None:
    options = begin(__doc__ or "")
    with watching():
        for family in SIZES:
            if options.wants(family):
                measure("stacking", f"{family}, several controls, CFG", cases_of(family, options), options)


if __name__ == "__main__":
    main()
