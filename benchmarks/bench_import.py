"""How long the import of the pack takes beyond torch and the host, in fresh processes.

    python benchmarks/bench_import.py PATH_TO_COMFYUI [runs]

Each run imports torch and those modules of the host that every ComfyUI has loaded before it comes to its custom
nodes, then times the import of the pack's `__init__.py` alone. Prints a table row per run and the median.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

CHILD = """
import importlib.util, runpy, sys, time
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
started, started_cpu = time.perf_counter(), time.process_time()
spec.loader.exec_module(module)
seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
assert module.NODE_CLASS_MAPPINGS
foreign = sorted({name.partition(".")[0] for name in set(sys.modules) - before} - {"pack", "comfyui_controlnext"})
print(seconds, cpu, len(module.NODE_CLASS_MAPPINGS), ",".join(foreign) or "-")
"""


def measure(host: Path, bytecode: str | None = None) -> tuple[float, float, str, str]:
    """Wall seconds, processor seconds, number of nodes and foreign top-level modules of one import of the pack.

    bytecode: a folder of this benchmark's own for what Python compiles, so that a second run finds it.
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
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "main.py").is_file():
        raise SystemExit(f"usage: python {Path(__file__).name} PATH_TO_COMFYUI [runs]")
    host = Path(sys.argv[1]).resolve()
    runs = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {runs} fresh processes")
    rows = []
    with tempfile.TemporaryDirectory() as bytecode:
        measure(host, bytecode)
        for _ in range(runs):
            wall, cpu, count, foreign = measure(host, bytecode)
            rows.append((wall, cpu))
            print(f"{wall * 1000:7.1f} ms wall {cpu * 1000:7.1f} ms cpu   {count} nodes   also imported: {foreign}")
    wall, cpu = (statistics.median(column) * 1000 for column in zip(*rows, strict=True))
    print(f"{wall:7.1f} ms wall {cpu:7.1f} ms cpu   median")


if __name__ == "__main__":
    main()
