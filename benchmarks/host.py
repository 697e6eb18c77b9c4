"""Start of every benchmark on the real host: its options, and the host in this process."""

from __future__ import annotations

import argparse
import atexit
import importlib
import logging
import os
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from ..tools.launcher import declare_missing_torchvision_ops

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HOST_MODULES = ("comfy.sd", "comfy.samplers", "comfy.sample", "comfy.controlnet", "folder_paths", "nodes")


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    comfyui: Path
    quick: bool
    json: Path | None
    cpu: bool
    dtype: torch.dtype
    repeats: int
    cases: tuple[str, ...]
    """Only the cases whose name holds one of these words; empty for all."""
    scratch: Path
    """A folder of this run, removed at its end."""
    threads: int = 0
    """Of the CPU; 0 = as torch chooses."""
    batch: int = 1
    """Pictures of a training step."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.cpu else "cuda")

    def wants(self, case: str) -> bool:
        return not self.cases or any(word in case for word in self.cases)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats: a look, not a result")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also append every table to this file, as JSON lines")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    parser.add_argument("--dtype", choices=DTYPES, help="default fp16 on a GPU, fp32 on a CPU")
    parser.add_argument("--repeats", type=int, default=0, metavar="N", help="interleaved repeats; default 5, quick 2")
    parser.add_argument("--cases", default="", metavar="WORD,..", help="only cases whose name holds one of these")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the CPU; default all")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pictures of a training step; default 1")


def begin(description: str) -> Options:
    """Read the command line and bring in the host."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--comfyui", type=Path, required=True, metavar="PATH", help="the ComfyUI to measure in")
    add_options(parser)
    options = parser.parse_args()
    cpu = options.cpu or not torch.cuda.is_available()
    if options.threads:
        torch.set_num_threads(options.threads)
    scratch = Path(tempfile.mkdtemp(prefix="controlnext-bench-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    bring_in(options.comfyui.resolve(), cpu, scratch)
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
    )


def bring_in(comfyui: Path, cpu: bool, base: Path) -> None:
    """Make the host importable here. base: where it looks for models and writes."""
    if not (comfyui / "main.py").is_file():
        raise SystemExit(f"--comfyui {comfyui}: no main.py there. Name the folder that holds it.")
    here = os.path.realpath(os.path.dirname(__file__))
    sys.path[:] = [str(comfyui), *(entry for entry in sys.path if os.path.realpath(entry) != here)]
    declare_missing_torchvision_ops()
    arguments = importlib.import_module("comfy.cli_args").args
    arguments.cpu, arguments.base_directory = cpu, str(base)
    logging.getLogger().setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in HOST_MODULES:
            importlib.import_module(name)
