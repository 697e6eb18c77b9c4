"""`python run.py test`: the table of steps, each with its name and time. Standard library only.

A further step is a row of STEPS. A step is a command, run in the clone, and passes when its exit status is 0.
"""

import fnmatch
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from .environment import PATIENT_THREADS, ROOT, SetupError, pinned

PACKAGES = ("models", "controlnext_core", "controlnext_training", "nodes", "tools", "benchmarks")
"""Folders that mypy checks, where they exist."""
SECURITY = (
    ("controlnext_core", "tools"),
    ("models", "controlnext_training", "nodes", "benchmarks", "run.py", "_alias.py", "__init__.py"),
)
"""Code that bandit looks through in each of two processes, about half of it."""
TESTS = ROOT / "tests"
STAGE = ROOT / ".cache" / "types"
WORKERS = 2
"""Number of processes that share the test files of a whole run; each needs up to 5 GB, its ComfyUI server included."""


@dataclass(frozen=True)
class CheckOptions:
    """Options of `run.py test`."""

    host: Callable[[], Path]
    """Function that returns the ComfyUI's folder, downloading it on first use."""
    long: bool = False
    """True: tests marked `long` run as well. False: they are skipped."""
    fast: bool = False
    """True: only tests that need no ComfyUI run. False: all."""
    expression: str | None = None
    """Expression for pytest's -k; None: no selection."""
    files: tuple[str, ...] = ()
    """Test files to run; (): all."""


@dataclass(frozen=True)
class Step:
    """Step of the tests: its name for --only, and a function that runs it and returns an exit status."""

    name: str
    run: Callable[[CheckOptions], int]


def call(*arguments: str, folder: Path = ROOT, **variables: str) -> int:
    """Run this interpreter with `arguments` in `folder`, with `variables` added to the environment; returns its exit
    status.
    """
    sys.stdout.flush()
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**PATIENT_THREADS, **os.environ, **variables}, check=False
    ).returncode


def stage_for_types() -> list[str]:
    """Copy the code to a folder where its import name is also its path, which mypy needs; returns the packages to
    check.

    The folder of a clone may have any name, and relative imports reach from `models` to its siblings.
    """
    package = STAGE / "comfyui_controlnext"
    shutil.rmtree(package, ignore_errors=True)
    for name in PACKAGES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__", "*.md"))
    return [f"comfyui_controlnext.{name}" for name in PACKAGES if (ROOT / name).is_dir()]


def check_types(options: CheckOptions) -> int:
    """Type-check PACKAGES with mypy."""
    packages = [word for name in stage_for_types() for word in ("-p", name)]
    config, cache = str(ROOT / "pyproject.toml"), str(STAGE / "cache")
    return call("-m", "mypy", "--config-file", config, "--cache-dir", cache, *packages, folder=STAGE)


def check_security(options: CheckOptions) -> int:
    """Look for unsafe calls with bandit; an interpreter without it is told so, and passes. `.venv` has it."""
    if importlib.util.find_spec("bandit") is None:
        print(f"left out: {sys.executable} has no bandit=={pinned('bandit')}; --venv has it")
        return 0
    command = ("-m", "bandit", "-q", "-c", str(ROOT / "pyproject.toml"), "-r")
    with ThreadPoolExecutor(len(SECURITY)) as pool:
        return max(pool.map(lambda places: call(*command, *places), SECURITY))


def run_pytest(options: CheckOptions) -> int:
    """Run the tests except those for a GPU. Tests marked `comfy` find their ComfyUI through the environment."""
    marks = "not gpu and not comfy" if options.fast else "not gpu"
    arguments = ["-m", "pytest", "-m", marks, *options.files]
    if options.long:
        arguments.append("--long")
    if options.expression:
        arguments += ["-k", options.expression]
    host = "" if options.fast else str(options.host())
    shared, threads = share(options, os.cpu_count() or 1)
    return call(*arguments, *shared, CONTROLNEXT_COMFYUI=host, PYTHONSAFEPATH="1", OMP_NUM_THREADS=threads)


def share(options: CheckOptions, cores: int) -> tuple[list[str], str]:
    """Options of pytest that share a whole run among WORKERS processes (a file stays in one), and the threads of each.

    A part of the tests, and a machine with fewer cores, has one process, with output for each test.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    if options.files or options.expression or cores < WORKERS:
        return [], threads or str(cores)
    return ["-n", str(WORKERS), "--dist", "loadfile", "--no-loadscope-reorder"], threads or str(cores // WORKERS)


STEPS = (
    Step("format", lambda options: call("-m", "ruff", "format", "--check", ".")),
    Step("lint", lambda options: call("-m", "ruff", "check", ".")),
    Step("security", check_security),
    Step("types", check_types),
    Step("pytest", run_pytest),
)


def choose(only: Sequence[str]) -> tuple[tuple[Step, ...], tuple[str, ...]]:
    """Resolve --only, names of steps and patterns of test files, to (steps to run, test files to run).

    Raises SetupError where a pattern matches nothing.
    """
    if not only:
        return STEPS, ()
    names = {step.name for step in STEPS}
    files: dict[str, None] = {}
    for pattern in (pattern for pattern in only if pattern not in names):
        found = test_files(pattern)
        if not found:
            raise SetupError(
                f"--only {pattern}: is not a step ({', '.join(sorted(names))}), and no test file has that name"
            )
        files |= dict.fromkeys(found)
    return tuple(step for step in STEPS if step.name in only or (files and step.name == "pytest")), tuple(files)


def test_files(pattern: str) -> list[str]:
    """Paths of the test files that match: those in the folder `pattern` of tests/ (`core`, `training`), if it exists,
    else those whose path below tests/ contains `pattern`, or matches it where it has wildcards.
    """
    names = {path.relative_to(TESTS): str(path) for path in sorted(TESTS.rglob("test_*.py"))}
    inside = [path for name, path in names.items() if pattern.rstrip("/") in name.parent.parts]
    found = {name.as_posix(): path for name, path in names.items()}
    return inside or [path for name, path in found.items() if pattern in name or fnmatch.fnmatch(name, pattern)]


def run_checks(options: CheckOptions, only: Sequence[str]) -> int:
    """Run the steps chosen by `only`, or all, and print a summary; returns 0 if all passed, else 1."""
    steps, files = choose(only)
    options = replace(options, files=files)
    results: list[tuple[str, int, float]] = []
    for step in steps:
        print(f"== {step.name}", flush=True)
        started = time.monotonic()
        status = step.run(options)
        results.append((step.name, status, time.monotonic() - started))
    print("== summary")
    for name, status, seconds in results:
        print(f"{'passed' if status == 0 else 'FAILED'}  {name:<10} {seconds:7.1f} s")
    return 0 if results and all(status == 0 for _, status, _ in results) else 1
