"""Start of every benchmark on the real host: parses its options, and makes the host importable."""

from __future__ import annotations

import argparse
import atexit
import importlib
import importlib.util
import logging
import math
import os
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..tools.launcher import declare_missing_torchvision_ops

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HOST_MODULES = ("comfy.sd", "comfy.samplers", "comfy.sample", "comfy.controlnet", "folder_paths", "nodes")


@dataclass(frozen=True)
class Options:
    """Options of a benchmark's command line."""

    comfyui: Path
    quick: bool
    json: Path | None
    cpu: bool
    dtype: torch.dtype
    repeats: int
    cases: tuple[str, ...]
    """Words: only cases whose name contains one of them; empty for all."""
    scratch: Path
    """Folder for this run's temporary files, removed at its end."""
    threads: int = 0
    """Number of CPU threads; 0: torch's default."""
    batch: int = 1
    """Number of pictures of a training step."""
    small: bool = False
    """True: small networks replace the real ones. False: networks of real size."""
    deadline: float = math.inf
    """Deadline on the clock of time.monotonic: no repeat begins after it."""
    folder: Path | None = None
    """Folder for result files."""
    switches: frozenset[str] = frozenset()
    """Further options of the benchmark that were given."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.cpu else "cuda")

    @property
    def left(self) -> float:
        """Seconds left to the deadline."""
        return self.deadline - time.monotonic()

    def wants(self, case: str) -> bool:
        return not self.cases or any(word in case for word in self.cases)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every benchmark has."""
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats: a look, not a result")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also append every table to this file, as JSON lines")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    parser.add_argument("--dtype", choices=DTYPES, help="default fp16 on a GPU, fp32 on a CPU")
    parser.add_argument("--repeats", type=int, default=0, metavar="N", help="interleaved repeats; default 5, quick 2")
    parser.add_argument("--cases", default="", metavar="WORD,..", help="only cases whose name holds one of these")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the CPU; default all")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pictures of a training step; default 1")
    parser.add_argument("--small", action="store_true", help="small networks: that it runs, not what comes of it")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="N", help="begin no repeat after N seconds")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where results that are files go")


def begin(description: str, *switches: str) -> Options:
    """Parse the command line and make the host importable. switches: further options of the benchmark, with their
    dashes.
    """
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--comfyui", type=Path, required=True, metavar="PATH", help="the ComfyUI to measure in")
    add_options(parser)
    parser.set_defaults(switches=[])
    for switch in switches:
        parser.add_argument(switch, action="append_const", dest="switches", const=switch)
    options = parser.parse_args()
    cpu = options.cpu or not torch.cuda.is_available()
    if options.threads:
        torch.set_num_threads(options.threads)
    scratch = Path(tempfile.mkdtemp(prefix="controlnext-bench-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    bring_in(options.comfyui.resolve(), cpu, scratch, "--dynamic" in options.switches and not cpu)
    if options.small:
        from .real_size import shrink

        shrink()
    return Options(
        comfyui=options.comfyui.resolve(),
        quick=options.quick,
        json=options.json,
        cpu=cpu,
        dtype=DTYPES[options.dtype or ("fp32" if cpu else "fp16")],
        repeats=options.repeats or (2 if options.quick else 5),
        cases=tuple(word for word in options.cases.split(",") if word),
        scratch=scratch,
        threads=options.threads,
        batch=options.batch,
        small=options.small,
        deadline=started + options.seconds,
        folder=options.folder.resolve() if options.folder else None,
        switches=frozenset(options.switches),
    )


def bring_in(comfyui: Path, cpu: bool, base: Path, dynamic: bool = False) -> None:
    """Make the host importable here. base: folder for its models and output; dynamic: True enables its dynamic VRAM."""
    if not (comfyui / "main.py").is_file():
        raise SystemExit(f"--comfyui {comfyui}: no main.py there. Name the folder that holds it.")
    here = os.path.realpath(os.path.dirname(__file__))
    sys.path[:] = [str(comfyui), *(entry for entry in sys.path if os.path.realpath(entry) != here)]
    declare_missing_torchvision_ops()
    arguments = importlib.import_module("comfy.cli_args").args
    arguments.cpu, arguments.base_directory = cpu, str(base)
    logging.getLogger().setLevel(logging.ERROR)
    manager = importlib.util.find_spec("comfy_aimdo") and importlib.import_module("comfy_aimdo.control")
    if dynamic and manager:
        manager.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in HOST_MODULES:
            importlib.import_module(name)
    if dynamic and manager and manager.init_devices(range(torch.cuda.device_count())):  # as the host's main.py
        patchers: Any = importlib.import_module("comfy.model_patcher")
        memory: Any = importlib.import_module("comfy.memory_management")
        patchers.CoreModelPatcher, memory.aimdo_enabled = patchers.ModelPatcherDynamic, True


def has_dynamic_vram() -> bool:
    """True: the host's dynamic VRAM is on in this process. False: it is off."""
    return getattr(sys.modules.get("comfy.memory_management"), "aimdo_enabled", False)
