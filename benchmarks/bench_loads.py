"""Loading of every kind of control on bases in every dtype: that it works, has an effect, and works again after
unloading.

    python benchmarks/bench_loads.py --comfyui PATH [--dynamic]

Small files through the loaders of host and pack. `effect` is the relative change of the latent against the bare model;
a second run, and one after everything was unloaded, must give the first one's latent again, bit for bit. --dynamic:
with the host's dynamic VRAM, where the host and the machine support it.
"""

from __future__ import annotations

import runpy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.host_start import Options, begin, has_dynamic_vram  # noqa: E402
from comfyui_controlnext.benchmarks.recording import append_table  # noqa: E402
from comfyui_controlnext.benchmarks.sampling import Setup, forget, queue  # noqa: E402
from comfyui_controlnext.tools import tiny_models  # noqa: E402

HEAD = ("base", "dtype", "control", "s to load", "effect", "second run", "after unloading")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
BASES: dict[str, Callable[[Path], Path]] = {
    "sd15": tiny_models.make_sd15_deep,
    "sdxl": tiny_models.make_sdxl_deep,
    "svd": tiny_models.make_svd_deep,
}
BUILDS = {"sd15": ("gen2", "sd15_legacy"), "sdxl": ("gen2", "sdxl_june", "sdxl_july"), "svd": ("gen2", "svd_v1")}
SIDE = 64
Load = Callable[[Any], tuple[Any, Any]]
"""(MODEL) -> (MODEL with the control's changes, control)."""


def loads_of(family: str, folder: Path) -> dict[str, Load]:
    """Loading functions by name, for every kind of control for that base."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_controlnext
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

    def controlnext(build: str, weights: Path | None = None) -> Load:
        home = folder / f"{family} {build} {weights is not None}"
        home.mkdir()
        path = tiny_models.make_controlnext(home / "controlnet.safetensors", build)
        if weights is not None:
            tiny_models.make_unet_difference(home / "unet.safetensors", f"{family}_deep", scale=0.005)

        def load(model: Any) -> tuple[Any, Any]:
            loaded = load_controlnext(model, path, "auto" if weights else "none")
            return loaded.model, loaded.control

        return load

    def xs(own_time: bool) -> Load:
        path = tiny_models.make_controlnet_xs(
            folder / f"{family} xs {own_time}.safetensors", f"{family}_deep", own_time
        )
        return lambda model: (model, load_controlnet_xs(path).control)

    found = {f"ControlNeXt {build}": controlnext(build) for build in BUILDS[family]}
    if family != "svd":
        found["ControlNeXt gen2 with UNet weights"] = controlnext("gen2", folder)
        found |= {"ControlNet-XS": xs(False), "ControlNet-XS, own time": xs(True)}
    return found


def base_of(path: Path, dtype: torch.dtype) -> Any:
    """Load the MODEL of a checkpoint file, with its weights in that dtype."""
    import comfy.sd

    given = {"dtype": dtype}
    return comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False, model_options=given)[0]


def row(family: str, model: Any, name: str, load: Load, bare: torch.Tensor) -> tuple[str, ...]:
    """Load one control and sample with it three times."""
    import comfy.model_management

    started = time.perf_counter()
    with torch.inference_mode():
        changed, control = load(model)
    took = time.perf_counter() - started
    setup = Setup(family, changed, SIDE, SIDE, 2 if family == "svd" else 1).with_controls(control)
    first, second = queue(setup, 1).latent, queue(setup, 1).latent
    comfy.model_management.unload_all_models()
    forget(setup)
    third = queue(setup, 1).latent
    assert first.isfinite().all(), f"{family}, {name}: the latent is not finite"
    effect = float((first - bare).norm() / bare.norm())
    assert effect > 1e-4, f"{family}, {name}: has no effect"
    same = [
        "the same" if torch.equal(first, other) else f"off by {_off(other, first):.1e}" for other in (second, third)
    ]
    return (family, str(model.model_dtype())[6:], name, f"{took:.2f}", f"{effect:.3f}", *same)


def _off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def rows_of(options: Options) -> list[tuple[str, ...]]:
    """Rows of the table; a failure is a row with its error."""
    rows = []
    for family, make in BASES.items():
        if not options.wants(family) or (options.small and family != "sd15"):
            continue
        file = make(options.scratch / f"{family}.ckpt")
        loads = loads_of(family, options.scratch)
        for dtype in DTYPES[-1:] if options.small else DTYPES:
            model = base_of(file, dtype)
            bare = queue(Setup(family, model, SIDE, SIDE, 2 if family == "svd" else 1), 1).latent
            for name, load in loads.items() if not options.small else tuple(loads.items())[2:3]:
                try:
                    rows.append(row(family, model, name, load, bare))
                except (AssertionError, RuntimeError, ValueError) as error:
                    rows.append((family, str(dtype)[6:], name, "", "", "FAILED", str(error).partition("\n")[0]))
    return rows


def main() -> None:
    options = begin(__doc__ or "", "--dynamic")
    dynamic = has_dynamic_vram()
    rows: list[tuple[str, ...]]
    if "--dynamic" in options.switches and not dynamic:
        rows = [("", "", "left out: this host or this machine has no dynamic VRAM", "", "", "", "")]
    else:
        rows = rows_of(options)
    title = f"loads, dynamic VRAM {'on' if dynamic else 'off'}"
    append_table("loads", title, HEAD, rows, "1 step, CFG", options.json, not options.quick)
    failed = [line for line in rows if line[-2] == "FAILED"]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(rows)} loads failed; the first: {', '.join(failed[0])}")


if __name__ == "__main__":
    main()
