"""Samples per second that reach a training step, from photographs of 12 megapixels with a hint each.

    python run.py bench reading

Beside the old path, which decoded picture and hint of every sample of every step in one thread: latents and hints in
the cache, the encoding before the first step, and training with the cache off on hints that are computed from the
picture; with 0, 1 and 2 worker processes each. A mean over 8x8 pixels replaces the VAE. Each case has a separate
process; memory is the increase over that process with everything imported, plus the resident memory of its workers.
"""

from __future__ import annotations

import json
import runpy
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.host_start import begin, bring_in  # noqa: E402
from comfyui_controlnext.benchmarks.recording import append_table  # noqa: E402

if TYPE_CHECKING:
    from comfyui_controlnext.controlnext_training.encoded import Store

HEAD = ("case", "samples/s", "against the old path", "processor s a sample", "MiB more", "MiB of its workers")
PHOTO, HINT = (3000, 4000), (768, 1024)
SMALL_PHOTO = (300, 400)
PICTURES = 12
ALONE = "--one"
"""First argument of a process that measures one case; host, folder, case and workers follow."""
OLD, CACHED, ENCODING, UNCACHED = "old path", "from the cache", "encoding", "cache off, canny"


@dataclass(frozen=True)
class Case:
    """Case: a way of reading, and the number of worker processes."""

    kind: str
    workers: int = 0

    @property
    def title(self) -> str:
        return self.kind if self.kind == OLD else f"{self.kind}, {self.workers} workers"


CASES = (Case(OLD), *(Case(kind, workers) for kind in (CACHED, ENCODING, UNCACHED) for workers in (0, 1, 2)))


class Encoders:
    """Encoders of a base in which a mean replaces the VAE, without captions."""

    def __init__(self) -> None:
        empty: dict[str, Tensor] = {}
        conditioning = SimpleNamespace(
            encoded_while_training=False,
            frame_key=lambda base, frame: None,
            prepare=lambda base, cached, caption: None,
            encode=lambda base, cached, sample, drop, rate: empty,
        )
        self.family = SimpleNamespace(conditioning=conditioning, one_latent=False)

    def identity(self, what: str) -> str:
        return what

    def latent(self, frames: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(frames.movedim(-1, 1), 8)


def write_photos(folder: Path, size: tuple[int, int]) -> None:
    """Write pictures with the detail of photographs, each with a hint."""
    from PIL import Image

    random = np.random.default_rng(0)
    grain = random.integers(-12, 12, (*size, 3), dtype=np.int16)
    for number in range(PICTURES):
        coarse = Image.fromarray(random.integers(0, 255, (30, 40, 3), dtype=np.uint8)).resize(size[::-1], 3)
        photo = Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))
        for kind, picture, suffix in (("images", photo, "jpg"), ("hints", coarse.resize(HINT[::-1]), "png")):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            picture.save(folder / kind / f"{number}.{suffix}", quality=92)


class Memory:
    """Peak resident memory of this process, above its present one, and of its children."""

    def __init__(self) -> None:
        import psutil

        self.process = psutil.Process()
        self.start, self.own, self.workers, self.on = self.process.memory_info().rss, 0, 0, True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while self.on:
            self.own = max(self.own, self.process.memory_info().rss - self.start)
            self.workers = max(self.workers, sum(child.memory_info().rss for child in self.children()))
            time.sleep(0.05)

    def children(self) -> list[Any]:
        return [child for child in self.process.children() if "resource_tracker" not in " ".join(child.cmdline())]

    def processor(self) -> float:
        """Processor seconds of this process and of its running children."""
        every = [self.process.cpu_times(), *(child.cpu_times() for child in self.children())]
        return sum(times.user + times.system for times in every)


def steps_of(store: Store, count: int) -> Callable[[], int]:
    """Function that reads the samples of `count` steps of batch 1, as a run does."""
    from comfyui_controlnext.controlnext_training.encoded import Prefetcher

    def run() -> int:
        ahead = Prefetcher(store, range(PICTURES), print)
        requests = [((step % PICTURES, step),) for step in range(count)]
        for step, wanted in enumerate(requests):
            ahead.get(wanted, requests[step + 1 : step + 1 + ahead.steps_ahead(1)])
        ahead.close()
        return count

    return run


def old_path(store: Store, count: int) -> Callable[[], int]:
    """Function that decodes picture and hint of each sample, and reads its latent from the cache."""

    def run() -> int:
        for step in range(count):
            sample = store.data.load(step % PICTURES, 0, step)
            store._latent(store.begin(step % PICTURES, step, 0))
            sample.hints.movedim(-1, 1).contiguous()
        return count

    return run


def measure(host: Path, folder: Path, case: Case) -> dict[str, float]:
    """Measure one case in this process."""
    bring_in(host, True, folder)
    torch.set_num_threads(1)
    from comfyui_controlnext.controlnext_training.config import TrainConfig
    from comfyui_controlnext.controlnext_training.data import Cache, open_dataset
    from comfyui_controlnext.controlnext_training.distributed import ProcessGroup
    from comfyui_controlnext.controlnext_training.encoded import MemoryCache, Store
    from comfyui_controlnext.tools.reader_processes import ProcessReaders

    def encode(store: Store) -> int:
        quiet = SimpleNamespace(stopping=lambda: False, progress=lambda *told: None)
        return len(store.prepare(range(PICTURES), ProcessGroup(), quiet)[0])

    hint = "canny" if case.kind == UNCACHED else "paired"
    data = open_dataset(folder / "data", hint=hint, index=folder / "index.json")
    data.load(0)  # imports the libraries that read pictures
    readers, on_disk = ProcessReaders(case.workers), case.kind in (OLD, CACHED)
    cache = Cache(folder / "cache") if on_disk else MemoryCache()
    store = Store(Encoders(), data, TrainConfig(cache=on_disk), cache, readers)  # type: ignore[arg-type]
    if case.kind != ENCODING:
        encode(store)
    long = 20 * PICTURES if case.kind == CACHED else PICTURES
    run = {ENCODING: lambda: encode(store), OLD: old_path(store, long)}.get(case.kind, steps_of(store, long))
    memory = Memory()
    if case.workers and case.kind != CACHED:  # they start with the first file, once per run
        for future in [readers.submit(data.job(number, 0, 0, True)) for number in range(2 * case.workers)]:
            future.result()
    began, processor = time.perf_counter(), memory.processor()
    count = run()
    seconds, work = time.perf_counter() - began, memory.processor() - processor
    memory.on = False
    memory.thread.join()
    readers.close()
    return {"rate": count / seconds, "work": work / count, "own": memory.own, "workers": memory.workers}


def in_own_process(host: Path, folder: Path, case: Case) -> dict[str, float]:
    """Measure one case in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), ALONE, str(host), str(folder), case.kind]
    done = subprocess.run([*command, str(case.workers)], capture_output=True, encoding="utf-8", check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("MEASURED")]
    if done.returncode or not found:
        raise SystemExit(f"{case.title}: {done.stderr[-2000:]}")
    return json.loads(found[0].removeprefix("MEASURED"))


def row(case: Case, runs: list[dict[str, float]], old: float) -> tuple[str, ...]:
    """Row of the table, from medians; old: samples per second of the old path."""
    rate, work, own, workers = (statistics.median(run[key] for run in runs) for key in runs[0])
    cells = f"{rate:.2f}", f"{rate / old:.2f}x", f"{work:.3f}", f"{own / 2**20:.0f}", f"{workers / 2**20:.0f}"
    return (case.title, *cells)


def main() -> None:
    if sys.argv[1:2] == [ALONE]:
        host, folder, kind, workers = sys.argv[2:]
        found = measure(Path(host), Path(folder), Case(kind, int(workers)))
        print("MEASURED" + json.dumps(found), flush=True)
        return
    options = begin(__doc__ or "")
    write_photos(options.scratch / "data", SMALL_PHOTO if options.small else PHOTO)
    cases = [case for case in CASES if case.kind == OLD or options.wants(case.title)]
    runs: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(options.repeats):
        for case in cases:
            runs[case].append(in_own_process(options.comfyui, options.scratch, case))
    old = statistics.median(run["rate"] for run in runs[cases[0]])
    rows = [row(case, found, old) for case, found in runs.items()]
    size = SMALL_PHOTO if options.small else PHOTO
    settings = f"JPEGs of {size[1]}x{size[0]}, hints of {HINT[1]}x{HINT[0]}, trained at 512; a thread a process"
    append_table("reading", "Reading of training data", HEAD, rows, settings, options.json, keep=not options.quick)


if __name__ == "__main__":
    main()
