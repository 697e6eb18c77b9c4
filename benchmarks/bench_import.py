"""Import time of the pack beyond torch and the host, in fresh processes.

    python run.py bench import

Each run imports torch and the modules of the host that every ComfyUI loads before its custom nodes, then times only the
import of the pack's `__init__.py`. The garbage collector is off meanwhile: a round over all objects of torch and the
host takes 0.2 s, and would fall into one import or another by chance.
"""

from __future__ import annotations

import argparse
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    runpy.run_path(str(ROOT / "_alias.py"))

from comfyui_controlnext.benchmarks.host_start import add_options  # noqa: E402
from comfyui_controlnext.benchmarks.recording import append_table  # noqa: E402

CHILD = """
import gc, importlib.util, runpy, sys, time
host, root = sys.argv.pop(1), sys.argv.pop(1)
runpy.run_path(root + "/tools/launcher.py")["declare_missing_torchvision_ops"]()
sys.path.insert(0, host)
import utils.extra_config
import comfy.cli_args
comfy.cli_args.args.cpu = True
import torch, comfy.sd, comfy.samplers, comfy.controlnet, folder_paths, nodes, server, comfy_api.latest
before = set(sys.modules)
spec = importlib.util.spec_from_file_location("pack", root + "/__init__.py", submodule_search_locations=[root])
module = importlib.util.module_from_spec(spec)
sys.modules["pack"] = module
gc.collect()
gc.disable()
started, started_cpu = time.perf_counter(), time.process_time()
spec.loader.exec_module(module)
seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
assert module.NODE_CLASS_MAPPINGS
foreign = sorted({name.partition(".")[0] for name in set(sys.modules) - before} - {"pack", "comfyui_controlnext"})
print(seconds, cpu, len(module.NODE_CLASS_MAPPINGS), ",".join(foreign) or "-")
"""


def measure(host: Path, bytecode: str | None = None) -> tuple[float, float, str, str]:
    """Measure one import of the pack: wall seconds, processor seconds, number of nodes and foreign top-level modules.

    bytecode: folder for this benchmark's compiled files, so that a second run finds them.
    """
    command = [sys.executable, *(["-P"] if sys.version_info >= (3, 11) else []), "-c", CHILD, str(host), str(ROOT)]
    cached = {} if bytecode is None else {"PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
    environment = {**os.environ, **cached}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=host, env=environment)
    if done.returncode:
        raise SystemExit(f"the import failed:\n{done.stderr}")
    wall, cpu, count, foreign = done.stdout.split()[-4:]
    return float(wall), float(cpu), count, foreign


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, metavar="PATH", help="the ComfyUI to measure in")
    add_options(parser)
    options = parser.parse_args()
    runs = options.repeats or (3 if options.quick else 9)
    rows = []
    with tempfile.TemporaryDirectory() as bytecode:
        measure(options.comfyui.resolve(), bytecode)
        for _ in range(runs):
            wall, cpu, count, foreign = measure(options.comfyui.resolve(), bytecode)
            rows.append((1000 * wall, 1000 * cpu, count, foreign))
    walls, cpus, counts, foreign_modules = zip(*rows, strict=True)
    line = (milliseconds(walls), milliseconds(cpus), "100", counts[0], foreign_modules[0])
    head = ("wall ms", "processor ms", "goal ms", "nodes", "foreign modules")
    title = "import of the pack beyond the host"
    append_table("import", title, head, [line], f"{runs} fresh processes", options.json, not options.quick)


def milliseconds(values: Sequence[float]) -> str:
    """Median and range, in milliseconds, as text."""
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


if __name__ == "__main__":
    main()
