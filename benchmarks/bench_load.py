"""Loader node against the stock LoRA loader: SDXL, a difference of 205 MB, equal keys and bytes on both sides.

    python run.py bench load

The stock side is a LoRA file that holds the same tensors as `.diff` and `.diff_b`. Two times are measured: loading, and
loading plus the host's patching of the model, which is the same for both: the time until sampling may begin. The
control's weights are read into memory of their own, as the host reads files with --disable-mmap; the same LoRA read in
that way has a separate row. The last row is a control of rank 32. Freed memory is returned to the system before each
load, so that every load allocates fresh memory, as the first one of a session does.
"""

from __future__ import annotations

import ctypes
import gc
import runpy
import sys
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.host_start import Options, begin  # noqa: E402
from comfyui_controlnext.benchmarks.real_size import UNETS, make_unet  # noqa: E402
from comfyui_controlnext.benchmarks.recording import append_table, spread  # noqa: E402
from comfyui_controlnext.controlnext_core.feature_cache import MIB  # noqa: E402
from comfyui_controlnext.tools.tiny_models import attention_layers, make_controlnext  # noqa: E402
from comfyui_controlnext.tools.tiny_models.storage import random_tensor, save  # noqa: E402

HEAD = ("loader", "goal", "wall s", "load", "load, processor time", "load and put in", "memory kept, MiB")
RANK = 32
Load = Callable[[Any], Any]


def make_files(folder: Path) -> dict[str, Path]:
    """Make the files: the control with its difference, and the LoRAs."""
    difference, stock, low = {}, {}, {}
    for ldm, diffusers, channels in attention_layers(UNETS["sdxl"]):
        name = f"lora_unet_{ldm}.attn2.to_out.0".replace(".", "_")
        for leaf, shape, tail in (("weight", (channels, channels), "diff"), ("bias", (channels,), "diff_b")):
            tensor = random_tensor(f"{ldm} {leaf}", shape, 1e-3, 0).half()
            difference[f"{diffusers}.attn2.to_out.0.{leaf}"] = stock[f"{name}.{tail}"] = tensor
        low[f"{name}.lora_up.weight"] = random_tensor(f"{ldm} up", (channels, RANK), 0.01, 0).half()
        low[f"{name}.lora_down.weight"] = random_tensor(f"{ldm} down", (RANK, channels), 0.01, 0).half()
    make_controlnext(folder / "controlnet.safetensors", "gen2")
    return {
        "difference": save(folder / "unet.safetensors", difference),
        "stock": save(folder / "stock.safetensors", stock),
        "low": save(folder / "low.safetensors", low),
    }


def loaders(folder: Path, files: dict[str, Path]) -> dict[str, Load]:
    """Loading functions by name, each from a MODEL to a MODEL, as a node's `execute`."""
    import comfy.sd
    import comfy.utils
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_controlnext

    def lora(path: Path, mapped: bool = True) -> Load:
        def load(model: Any) -> Any:
            with unittest.mock.patch.object(comfy.utils, "DISABLE_MMAP", not mapped):
                tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
            return comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)[0]

        return load

    return {
        "stock LoRA, the same tensors": lora(files["stock"]),
        "stock LoRA, the same tensors, --disable-mmap": lora(files["stock"], mapped=False),
        "ControlNeXtLoader": lambda model: load_controlnext(model, folder / "controlnet.safetensors").model,
        f"stock LoRA, rank {RANK}": lora(files["low"]),
    }


def timed(model: Any, load: Load) -> tuple[float, float, float, float, Any]:
    """Time one load: wall and processor seconds, wall seconds with the model patched, memory it keeps, the MODEL."""
    import comfy.model_management
    import psutil

    comfy.model_management.unload_all_models()
    gc.collect()
    give_back()
    before = psutil.Process().memory_info().rss
    started, started_cpu = time.perf_counter(), time.process_time()
    loaded = load(model)
    wall, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    kept = (psutil.Process().memory_info().rss - before) / MIB
    comfy.model_management.load_models_gpu([loaded])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return wall, cpu, time.perf_counter() - started, kept, loaded


def give_back() -> None:
    """Return the process's freed memory to the system, where the C library can."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def main() -> None:
    options = begin(__doc__ or "")
    files = make_files(options.scratch)
    model = make_unet("sdxl", options.dtype)
    chosen = loaders(options.scratch, files)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in chosen}
    with torch.inference_mode():
        for repeat in range(options.repeats + 1):
            for name, load in chosen.items():
                *numbers, loaded = timed(model, load)
                keys = len(loaded.patches)
                del loaded
                if repeat:  # the first repeat reads the files from the disk
                    found[name].append(tuple(numbers))
                assert keys in (140, 70), f"{name}: {keys} keys"
    rows = [row(name, runs, found["stock LoRA, the same tensors"]) for name, runs in found.items()]
    write(rows, options)


def row(name: str, runs: list[tuple[float, ...]], stock: list[tuple[float, ...]]) -> tuple[str, ...]:
    ratios = [[run[column] / peer[column] for run, peer in zip(runs, stock, strict=True)] for column in range(3)]
    kept = f"{sorted(run[3] for run in runs)[len(runs) // 2]:.0f}"
    goal = "1.15" if name == "ControlNeXtLoader" else ""
    return (name, goal, f"{min(run[0] for run in runs):.3f}", *(spread(column) for column in ratios), kept)


def write(rows: list[tuple[str, ...]], options: Options) -> None:
    settings = f"{str(options.dtype)[6:]}, {options.repeats} interleaved repeats, files in the system's cache"
    title = "SDXL, 140 keys, 205 MB; ratios to the stock LoRA loader"
    append_table("load", title, HEAD, rows, settings, options.json, not options.quick)


if __name__ == "__main__":
    main()
