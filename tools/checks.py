"""`python run.py test`: the table of steps, each with its name and time. Standard library only.

Another step is another row of STEPS. A step is a command, run in the clone, and passes when that ends with 0.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .environment import PATIENT_THREADS, ROOT

TYPED = ("models", "controlnext_core", "controlnext_training")  # type-checked where they exist
CODE = (*TYPED, "nodes", "tools")
STAGE = ROOT / ".cache" / "types"


@dataclass(frozen=True)
class Options:
    """What the command line says, for the steps. host: provides the ComfyUI, downloading it on first use."""

    host: Callable[[], Path]
    long: bool
    expression: str | None


@dataclass(frozen=True)
class Step:
    """One row: its name for --only, and a function that runs it and returns an exit status."""

    name: str
    run: Callable[[Options], int]


def call(*arguments: str, folder: Path = ROOT, **variables: str) -> int:
    """Run this interpreter with `arguments` in `folder`, `variables` added to the environment; its exit status."""
    sys.stdout.flush()
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**PATIENT_THREADS, **os.environ, **variables}, check=False
    ).returncode


def stage_for_types() -> list[str]:
    """Copy the code to where its import name is also its path, which mypy needs; return the packages to check.

    The folder of a clone may have any name, and relative imports reach from `models` to its siblings.
    """
    package = STAGE / "comfyui_controlnext"
    shutil.rmtree(package, ignore_errors=True)
    for name in CODE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__", "*.md"))
    return [f"comfyui_controlnext.{name}" for name in TYPED if (ROOT / name).is_dir()]


def check_types(options: Options) -> int:
    """mypy over TYPED."""
    packages = [word for name in stage_for_types() for word in ("-p", name)]
    config, cache = str(ROOT / "pyproject.toml"), str(STAGE / "cache")
    return call("-m", "mypy", "--config-file", config, "--cache-dir", cache, *packages, folder=STAGE)


def run_pytest(options: Options) -> int:
    """All tests but those for a GPU; the ones marked `comfy` get their ComfyUI through the environment."""
    arguments = ["-m", "pytest", "-m", "not gpu"]
    if options.long:
        arguments.append("--long")
    if options.expression:
        arguments += ["-k", options.expression]
    return call(*arguments, CONTROLNEXT_COMFYUI=str(options.host()), PYTHONSAFEPATH="1")


STEPS = (
    Step("format", lambda options: call("-m", "ruff", "format", "--check", ".")),
    Step("lint", lambda options: call("-m", "ruff", "check", ".")),
    Step("types", check_types),
    Step("pytest", run_pytest),
)


def run_checks(host: Callable[[], Path], only: Sequence[str] | None, long: bool, expression: str | None) -> int:
    """Run the steps (those named in `only`, or all), print a summary; 0 if all passed, else 1."""
    options = Options(host, long, expression)
    results: list[tuple[str, int, float]] = []
    for step in STEPS:
        if only is None or step.name in only:
            print(f"== {step.name}", flush=True)
            started = time.monotonic()
            status = step.run(options)
            results.append((step.name, status, time.monotonic() - started))
    print("== summary")
    for name, status, seconds in results:
        print(f"{'passed' if status == 0 else 'FAILED'}  {name:<10} {seconds:7.1f} s")
    return 0 if results and all(status == 0 for _, status, _ in results) else 1
