"""Memory of the encoders per pixel of the hint, and of the features of a video.

    python benchmarks/bench_video_memory.py [frames height width]

Every created tensor is counted, operation by operation, on torch's `meta` device: shapes without values, so that it
takes a moment at any size. Scratch space of convolutions is not included. The formula for a video
(controlnext_core/memory.py, docs/video.md) is then evaluated for the given frames and size.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.recording import Report  # noqa: E402
from comfyui_controlnext.controlnext_core.families import FAMILIES  # noqa: E402
from comfyui_controlnext.controlnext_core.feature_cache import DEVICE_BUDGET, HOST_BUDGET, pinned_bytes  # noqa: E402
from comfyui_controlnext.controlnext_core.injection import prepare  # noqa: E402
from comfyui_controlnext.controlnext_core.memory import (  # noqa: E402
    NUMBERS_PER_PIXEL,
    feature_bytes,
    rows_at_once,
)
from comfyui_controlnext.controlnext_core.specs import BUILDS, SPECS, Spec, config_of  # noqa: E402
from comfyui_controlnext.models.controlnext import ControlNeXt  # noqa: E402

MIB = 1024 * 1024
SIZES = ((512, 512), (576, 1024), (1024, 1024))
DTYPES = (torch.float32, torch.float16)


class Allocations(TorchDispatchMode):
    """Mode that counts the bytes of all living tensors made by operations inside its block; `peak` is the maximum.

    old: tensors from before, which are not counted, nor are views of them.
    """

    def __init__(self, old: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.old = [StorageWeakRef(tensor.untyped_storage()) for tensor in old]
        known = {reference.cdata for reference in self.old}
        self.is_new: Callable[[int], bool] = lambda cdata: cdata not in known
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if self.is_new(reference.cdata):
                    self.live.setdefault(reference.cdata, (reference, storage.nbytes()))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def encoder_peak(spec: Spec, height: int, width: int, dtype: torch.dtype, rows: int = 1, device: str = "meta") -> int:
    """Peak bytes while `rows` hints of height x width are encoded to features at the site; weights are not counted."""
    net = ControlNeXt(config_of(spec), dtype=dtype, device=device).eval().requires_grad_(False)
    cell = FAMILIES[spec.family].cells[spec.fusion.site]
    timestep = torch.zeros(1, device=device)
    with torch.no_grad(), Allocations(net.parameters()) as allocations:
        hint = torch.zeros(rows, 3, height, width, dtype=dtype, device=device)
        prepare(net(hint, timestep), (-(-height // cell), -(-width // cell)), spec.fusion).to(dtype)
    return allocations.peak


def numbers_per_pixel(spec: Spec, dtype: torch.dtype, height: int = 576, width: int = 1024, rows: int = 1) -> float:
    """Peak of `encoder_peak` in values of `dtype` per pixel of the hints."""
    return encoder_peak(spec, height, width, dtype, rows) / (rows * height * width * dtype.itemsize)


def plan(spec: Spec, frames: int, height: int, width: int) -> str:
    """Row of the table in docs/video.md, in MiB, for fp16."""
    row = NUMBERS_PER_PIXEL[spec.build] * 2 * height * width
    working = row * min(frames, rows_at_once(row))
    step = feature_bytes(spec, config_of(spec).out_channels, height, width, 2) * frames
    hint = 3 * 4 * frames * height * width
    features = step // frames
    kept = (DEVICE_BUDGET // features + HOST_BUDGET // pinned_bytes(features)) / frames
    cells = (working, step, 25 * step, hint)
    return f"{spec.name:14}" + "".join(f"{cell / MIB:12.1f}" for cell in cells) + f"{kept:10.1f}"


def spec_of(build: str) -> Spec:
    """Row of SPECS with that build; for a build without one, a row that could have it."""
    return next((spec for spec in SPECS.values() if spec.build == build), replace(SPECS["sd3"], build=build))


def main() -> None:
    frames, height, width = (int(word) for word in sys.argv[1:4]) if len(sys.argv) > 3 else (240, 576, 1024)
    report = Report("video_memory")
    report.line("numbers of the compute dtype per pixel of the hint, at the peak")
    heads = [f"{h}x{w} {str(dtype).removeprefix('torch.float')}" for h, w in SIZES for dtype in DTYPES]
    report.line(f"{'build':15}" + "".join(f"{head:>13}" for head in heads) + f"{'table':>8}")
    for build in BUILDS:
        spec = spec_of(build)
        cells = [numbers_per_pixel(spec, dtype, *size) for size in SIZES for dtype in DTYPES]
        report.line(f"{build:15}" + "".join(f"{cell:13.1f}" for cell in cells) + f"{NUMBERS_PER_PIXEL[build]:8}")
    report.line(f"\n{frames} frames of {height} x {width}, fp16, in MiB")
    report.line(f"{'variant':14}{'encoder':>12}{'a step':>12}{'25 steps':>12}{'hint (CPU)':>12}{'steps kept':>11}")
    for spec in SPECS.values():
        if spec.name.startswith("svd"):
            report.line(plan(spec, frames, height, width))
    report.save()


if __name__ == "__main__":
    main()
