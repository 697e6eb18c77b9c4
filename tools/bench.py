"""`python run.py bench`: runs the scripts of benchmarks/, each in a separate process. Standard library only."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .environment import PATIENT_THREADS, ROOT

BENCHMARKS = {
    "machine": "rates of arithmetic, memory, copies and launches",
    "counts": "multiply-adds and launches of each control, from shapes alone",
    "parameters": "parameters of each control, trained and in all, beside the paper's table 5",
    "transformer_counts": "the same of transformers' controls, beside those of others for the same base",
    "clip_memory": "memory and multiply-adds of controls for clips in one latent, from shapes alone",
    "memory": "peak memory over the bare model; on a GPU also measured",
    "import": "how long the import of the pack takes beyond the host",
    "load": "the loader node against the stock LoRA loader on as many keys",
    "step": "a step with each control, first and second queue run, beside stock ControlNet",
    "stacking": "several controls at once",
    "transformer_own": "processor time of this pack's code in a forward of narrow transformers",
    "profile": "where a step's time goes, by operation",
    "reading": "training samples a second from photographs of 12 megapixels, by number of workers",
    "train": "pictures a second and peak memory of the trainer against a plain loop",
    "loads": "every kind of control on fp32, fp16, bf16 and fp8 bases",
    "candidates": "changes that only a GPU can judge, against the product",
}
"""Benchmark -> the question it answers, slow ones last; the script is benchmarks/bench_<name>.py."""
ON_REQUEST = {
    "demo_controls": "edges, depth, masks and colours of the demo's pictures on unseen scenes: draws for 20 minutes",
    "super_resolution": "a picture from its low-resolution copy, on the demo's SD3 base: trains for most of an hour",
    "convergence": "edges controls on the demo's SD3 base, by join, rank and place: trains for half an hour",
    "video_outpainting": "clips painted beyond their frame, on a small base of Wan's shape: trains for three hours",
}
"""Benchmarks of the same form that run only when they are named."""
REPORT = "report"
"""Word used in place of a benchmark's name: writes the tables of docs/performance.md from the results of GPUs."""
FIRST_SIGN, LONGEST_PAUSE = 4.0, 60.0
"""Seconds before the first line of progress, and the longest interval between two lines."""
SHARED = ("quick", "cpu")
VALUES = ("json", "dtype", "repeats", "cases", "threads")
OF_REQUEST = {
    "demo_controls": ("scenes", "cases", "folder"),
    "super_resolution": ("threads", "parts", "base", "steps", "batch", "scenes", "folder"),
    "convergence": ("threads", "cases", "folder"),
    "video_outpainting": ("threads", "parts", "start", "steps", "scenes", "cfg", "folder"),
}
"""Benchmark of ON_REQUEST -> its options, by name."""
OWN = {"train": ("batch",)}
"""Benchmark of BENCHMARKS -> its further options, by name."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command; benchmarks/host_start.py has the same for a single script."""
    listing = "; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items())
    listing += f"; {REPORT}: fills docs/performance.md from results of gpu-day, --folder DIR keeps those in DIR first"
    listing += "; and only by name " + "; ".join(f"{name}: {what}" for name, what in ON_REQUEST.items())
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which, in this order; default all. {listing}")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats: a look, not a result")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also append every table to this file, as JSON lines")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="default fp16 on a GPU, fp32 on a CPU")
    parser.add_argument("--repeats", type=int, metavar="N", help="interleaved repeats; default 5, quick 2")
    parser.add_argument("--cases", metavar="WORD,..", help="only cases whose name holds one of these words")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU; default all")
    training = parser.add_argument_group("of super_resolution and video_outpainting", "--help of the script says more")
    training.add_argument("--parts", metavar="WORD,..", help="of the script; default all")
    training.add_argument("--base", type=Path, metavar="FILE", help="checkpoint to train on; default the demo's")
    training.add_argument("--start", type=Path, metavar="FILE", help="a control that the training goes on from")
    training.add_argument("--steps", type=int, metavar="N", help="of the training")
    training.add_argument("--batch", type=int, metavar="N", help="pictures of a step; train has it too")
    training.add_argument("--scenes", type=int, metavar="N", help="how many scenes or clips are measured")
    training.add_argument("--cfg", type=float, metavar="NUMBER", help="guidance of the measured clips")
    training.add_argument("--folder", type=Path, metavar="FOLDER", help="where all of it is kept; of report: see there")


def run_benchmarks(options: argparse.Namespace, host: Callable[[], Path]) -> int:
    """Run the chosen benchmarks; returns 0 if all succeeded, 1 if one failed, 2 for an unknown name."""
    if options.names == [REPORT]:
        from .bench_report import write_report

        print(write_report(options.folder))
        return 0
    known = {**BENCHMARKS, **ON_REQUEST}
    unknown = [name for name in options.names if name not in known]
    if unknown:
        print(f"run.py bench: no benchmark '{unknown[0]}'. There are: {', '.join(known)}.", file=sys.stderr)
        return 2
    comfyui = host()
    failed = [name for name in options.names or BENCHMARKS if _run(name, _arguments(name, options, comfyui)) != 0]
    if failed:
        print(f"run.py bench: did not end well: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _arguments(name: str, options: argparse.Namespace, comfyui: Path) -> list[str]:
    """Arguments for the script of a benchmark."""
    arguments = ["--comfyui", str(comfyui), *(f"--{switch}" for switch in SHARED if getattr(options, switch))]
    own = OF_REQUEST[name] if name in ON_REQUEST else (*VALUES, *OWN.get(name, ()))
    for key in own:
        value = getattr(options, key)
        if value is not None:
            arguments += [f"--{key}", str(value.resolve() if isinstance(value, Path) else value)]
    return arguments


def _run(name: str, arguments: list[str]) -> int:
    print(f"== {name}: {BENCHMARKS.get(name) or ON_REQUEST[name]}", flush=True)
    script = ROOT / "benchmarks" / (f"bench_{name}.py" if name in BENCHMARKS else f"{name}.py")
    environment = {**PATIENT_THREADS, **os.environ, "PYTHONSAFEPATH": "1"}
    return _watch(name, [sys.executable, str(script), *arguments], environment)


def _watch(name: str, command: list[str], environment: dict[str, str]) -> int:
    """Run a benchmark and report at growing intervals, from seconds to a minute, that it runs;
    returns its exit status.
    """
    began, pause = time.monotonic(), FIRST_SIGN
    with subprocess.Popen(command, env=environment) as process:
        try:
            while True:
                try:
                    return process.wait(timeout=pause)
                except subprocess.TimeoutExpired:
                    print(f"   {name}: running for {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
                    pause = min(2 * pause, LONGEST_PAUSE)
        except BaseException:
            process.kill()
            raise
