"""Rates of this machine that limit the cost of a control: arithmetic, memory, copies and launches.

python run.py bench machine
"""

from __future__ import annotations

import functools
import runpy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.host_start import Options, begin  # noqa: E402
from comfyui_controlnext.benchmarks.recording import append_table  # noqa: E402

HEAD = ("what", "found", "unit")
TIMES = 5
LAUNCHES = 1000


def seconds(work: Callable[[], object], device: torch.device, times: int = TIMES) -> float:
    """Median seconds of several calls, after two warm-up calls."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    return statistics.median([once() for _ in range(times + 2)][2:])


def rates(options: Options) -> list[tuple[str, str, str]]:
    """Rows of the table."""
    device, side = options.device, 64 if options.small else 512 if options.cpu else 8192
    rows = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        rate = 2 * side**3 / seconds(functools.partial(torch.matmul, a, b), device) / 1e12
        rows.append((f"product of matrices, {str(dtype)[6:]}", f"{rate:.3f}", "TFLOP/s"))
    size = (4 if options.cpu else 2048) * 2**20
    block = torch.zeros(size, dtype=torch.uint8, device=device)
    copied = seconds(block.clone, device)
    rows.append(("copy inside the memory, read and written", f"{2 * size / copied / 1e9:.1f}", "GB/s"))
    small = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(LAUNCHES):
            small.add_(1)

    rows.append(("launch", f"{seconds(launch, device) / LAUNCHES * 1e6:.2f}", "us"))
    if device.type == "cuda":
        part, pinned = block[: size // 8], torch.empty(size // 8, dtype=torch.uint8, pin_memory=True)
        for name, to, of in (("to the GPU", part, pinned), ("from the GPU", pinned, part)):
            took = seconds(functools.partial(to.copy_, of, non_blocking=True), device)
            rows.append((f"pinned memory {name}", f"{pinned.nbytes / took / 1e9:.1f}", "GB/s"))
        free, whole = torch.cuda.mem_get_info(device)
        rows.append(("memory, free and whole", f"{free / 2**30:.1f} of {whole / 2**30:.1f}", "GiB"))
        rows.append(("compute capability", ".".join(map(str, torch.cuda.get_device_capability(device))), ""))
    return rows


def main() -> None:
    options = begin(__doc__ or "")
    settings = f"medians of {TIMES}, {torch.get_num_threads()} threads"
    append_table("machine", "rates of this machine", HEAD, rates(options), settings, options.json, not options.quick)


if __name__ == "__main__":
    main()
