"""Peak memory over the bare model.

    python run.py bench memory

Counted from shapes for every released base: bytes alive in a forward beside weights, with attention that needs no table
of all pairs. On a GPU also measured, by the allocator, over a queue run, beside the requirement reported to the host.
--measured: only the latter.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.bench_counts import make  # noqa: E402
from comfyui_controlnext.benchmarks.counting import META, Scene, peak  # noqa: E402
from comfyui_controlnext.benchmarks.host_start import Options, begin  # noqa: E402
from comfyui_controlnext.benchmarks.real_size import fits, make_stock, make_unet  # noqa: E402
from comfyui_controlnext.benchmarks.recording import append_table  # noqa: E402
from comfyui_controlnext.benchmarks.sampling import Setup, forget, queue  # noqa: E402
from comfyui_controlnext.controlnext_core.feature_cache import MIB  # noqa: E402

STEPS = 30
SCENES = (
    ("sd15", 512, 512, 1, ("sd15", "sd15_legacy", "sd15_53m")),
    ("sdxl", 1024, 1024, 1, ("sdxl", "sdxl_july", "sdxl_20m", "sdxl_48m")),
    ("svd", 576, 1024, 14, ("svd_v2", "svd_v1")),
)
HEAD = ("case", "peak MiB", "over bare", "weights", "kept for the next run")
MEASURED = ("case", "peak MiB", "over bare without weights", "told to the host", "enough")


def weights_of(*networks: torch.nn.Module) -> str:
    """Size in MiB of the networks' weights at full size, as text."""
    every = (p for network in networks for _, p in network.named_parameters(remove_duplicate=False))
    return f"{sum(p.nbytes for p in every) / MIB:.0f}"


def counted(family: str, height: int, width: int, latents: int, names: tuple[str, ...], options: Options) -> None:
    """Write a table computed from shapes, for fp16."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.features import CACHE

    scene = Scene(family, torch.float16, height, width, latents)
    unet = list(scene.model.model.diffusion_model.parameters())
    bare = peak(scene.forward(), unet)
    rows = [("bare", f"{bare / MIB:.0f}", "", "", "")]
    for name in names:
        control = make(name, options.scratch)
        scene.start([control])
        models = [patcher.model for patcher in control.get_models()]
        old = [*unet, *(p for model in models for p in model.parameters())]
        forward = scene.forward([control])
        first = peak(forward, old)
        kept = CACHE.used["device"]
        again = peak(forward, old)
        over = f"{(first - bare) / MIB:+.0f} first step, {(again - bare) / MIB:+.0f} later ({again / bare:.3f})"
        rows.append((name, f"{first / MIB:.0f}", over, weights_of(*models), f"{kept / MIB:.1f} a step"))
    if family != "svd":
        stock = make_stock(scene.model, scene.dtype, META)
        weights = list(stock.control_model.parameters())
        found = peak(scene.forward(stock=stock), [*unet, *weights])
        rows.append(
            (
                "stock ControlNet",
                f"{found / MIB:.0f}",
                f"{(found - bare) / MIB:+.0f}",
                weights_of(stock.control_model),
                "",
            )
        )
    title = f"{family}, {height}x{width}, {latents} latents, CFG, fp16"
    append_table("memory", title, HEAD, rows, "counted from shapes", options.json, not options.quick)


def networks(setup: Setup) -> list[torch.nn.Module]:
    """Networks of the case's controls."""
    return [patcher.model for control in setup.controls for patcher in control.get_models()]


def reported_bytes(setup: Setup, dtype: torch.dtype) -> int:
    """Bytes beside their weights that the case's controls report to the host's memory manager."""
    conds = setup.prepare()[0][0][1]
    return int(conds["control"].inference_memory_requirements(dtype)) if setup.controls else 0


def measured(family: str, height: int, width: int, latents: int, names: tuple[str, ...], options: Options) -> None:
    """Write a table of the allocator's peaks over queue runs, on a GPU."""
    import comfy.model_management

    if options.small:
        height, width, latents = 64, 64, min(latents, 2)
    bare = Setup(family, make_unet(family, options.dtype), height, width, latents)
    chosen = [name for name in names if fits(name, options.small)]
    cases = [("bare", bare)] + [(name, bare.with_controls(make(name, options.scratch))) for name in chosen]
    if family != "svd":
        cases.append(("stock ControlNet", bare.with_controls(make_stock(bare.model, options.dtype))))
    rows, least = [], 0
    for name, setup in cases:
        comfy.model_management.unload_all_models()
        if name != "bare" and name != "stock ControlNet":
            forget(setup)
        queue(setup, 1)
        if not options.cpu:
            torch.cuda.reset_peak_memory_stats()
        queue(setup, 1 if options.small else 4 if options.quick else STEPS)
        found = 0 if options.cpu else torch.cuda.max_memory_allocated()
        least = least or found
        over = found - least - sum(p.nbytes for net in networks(setup) for p in net.parameters())
        told = reported_bytes(setup, options.dtype)
        enough = "" if options.cpu or not setup.controls else "yes" if over <= told else "NO"
        rows.append((name, f"{found / MIB:.0f}", f"{over / MIB:+.0f}", f"{told / MIB:.0f}", enough))
    title = f"{family}, {height}x{width}, {latents} latents, CFG, measured"
    settings = f"{str(options.dtype)[6:]}, {STEPS} steps"
    append_table("memory", title, MEASURED, rows, settings, options.json, not options.quick)


def main() -> None:
    options = begin(__doc__ or "", "--measured")
    for family, height, width, latents, names in SCENES:
        if options.wants(family) and not (options.small and family != "sd15"):
            alone = "--measured" in options.switches
            if not alone:
                counted(family, height, width, latents, names, options)
            if alone or not options.cpu:
                measured(family, height, width, latents, names, options)


if __name__ == "__main__":
    main()
