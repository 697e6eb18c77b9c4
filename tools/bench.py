"""`python run.py bench`: runs the scripts of benchmarks/, each in a process of its own. Standard library only."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .environment import PATIENT_THREADS, ROOT

BENCHMARKS = {
    "counts": "multiply-adds and launches of each control, from shapes alone",
    "memory": "peak memory over the bare model; on a GPU also measured",
    "import": "how long the import of the pack takes beyond the host",
    "load": "the loader node against the stock LoRA loader on as many keys",
    "step": "a step with each control, first and second queue run, beside stock ControlNet",
    "stacking": "several controls at once",
    "profile": "where a step's time goes, by operation",
    "growth": "the cost over resolution, batch, frames and number of controls",
}
"""Name -> the question; the script is benchmarks/bench_<name>.py. Those that take minutes on a CPU come last."""
SHARED = ("quick", "cpu")
VALUES = ("json", "dtype", "repeats", "cases", "threads")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command; benchmarks/host.py has the same for a single script."""
    listing = "; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items())
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which, in this order; default all. {listing}")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats: a look, not a result")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also append every table to this file, as JSON lines")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="default fp16 on a GPU, fp32 on a CPU")
    parser.add_argument("--repeats", type=int, metavar="N", help="interleaved repeats; default 5, quick 2")
    parser.add_argument("--cases", metavar="WORD,..", help="only cases whose name holds one of these words")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU; default all")


def run_benchmarks(options: argparse.Namespace, host: Callable[[], Path]) -> int:
    """Run the chosen ones; 0 if all ended well, 2 for a name that there is not."""
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        print(f"run.py bench: no benchmark '{unknown[0]}'. There are: {', '.join(BENCHMARKS)}.", file=sys.stderr)
        return 2
    arguments = ["--comfyui", str(host())]
    arguments += [f"--{name}" for name in SHARED if getattr(options, name)]
    for name in VALUES:
        value = getattr(options, name)
        if value is not None:
            arguments += [f"--{name}", str(value.resolve() if isinstance(value, Path) else value)]
    failed = [name for name in options.names or BENCHMARKS if _run(name, arguments) != 0]
    if failed:
        print(f"run.py bench: did not end well: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(name: str, arguments: list[str]) -> int:
    print(f"== {name}: {BENCHMARKS[name]}", flush=True)
    script = ROOT / "benchmarks" / f"bench_{name}.py"
    environment = {**PATIENT_THREADS, **os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, str(script), *arguments], env=environment, check=False).returncode
