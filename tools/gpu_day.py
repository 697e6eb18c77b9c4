"""`python run.py gpu-day`: measurements and tests that need a GPU, part by part by importance, within the given
minutes.

Each part is a separate process, so that one that fails, hangs or runs out of memory does not affect the others. Results
are written as each part ends. No network or server is needed; standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .environment import PATIENT_THREADS, ROOT, SetupError, missing
from .gpu_parts import PARTS, PYTEST, TRAINED, Part

NAME = "gpu_day"
LIMIT_MIB = 12
"""Largest size in MiB of each of the five files that are written."""
LEAST, RESERVE, MARGIN = 20.0, 3.0, 0.85
"""Seconds below which no part is started, seconds reserved for writing, and the share of its time that a part plans
with."""
TAIL = 6000  # characters of a part's output that are kept
ENDED = ("done", "failed", "out of memory", "out of time")
"""Statuses of parts that need no second run. A part that was cut short by the end of a run has none of these."""
PACKAGES = ("torch", "triton", "numpy", "safetensors", "transformers", "diffusers", "comfy-aimdo", "comfy-kitchen")
DRY = ("--cpu", "--small", "--quick", "--repeats", "1", "--dtype", "fp32", "--batch", "1")
WHEELS = ROOT / "wheels"
NAMES = ", ".join(part.name for part in PARTS)
Runner = Callable[[list[str], float, Path, Mapping[str, str]], int | None]
"""(arguments of the interpreter, seconds, file for the output, environment) -> exit status, None where killed."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=9.0, metavar="N", help="time for everything; default 9")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go; default that of --continue")
    parser.add_argument("--continue", dest="earlier", type=Path, metavar="DIR", help="results to continue from")
    parser.add_argument("--parts", metavar="NAME,..", help=f"only these, done or not, of {NAMES}")
    parser.add_argument("--dry-run", action="store_true", help="every part on the CPU with small shapes: that it works")
    parser.add_argument("--pack", type=Path, metavar="FILE.zip", help="run nothing; put all that a run needs into FILE")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="with --pack: wheels that the other machine lacks")


def run_gpu_day(options: argparse.Namespace, host: Callable[[], Path]) -> int:
    """Run the command; returns 0 if no part failed, else 1. Parts that did not start do not count."""
    if options.pack is not None:
        from .gpu_pack import pack

        print(pack(options.pack, host(), options.wheels))
        return 0
    options.out = options.out or options.earlier
    if options.out is None:
        raise SetupError("--out DIR: say where the results go.")
    chosen = [name for name in (options.parts or "").split(",") if name]
    if unknown := set(chosen) - {part.name for part in PARTS}:
        raise SetupError(f"--parts {sorted(unknown)[0]}: there are {NAMES}.")
    variables = use_wheels(WHEELS)
    day = Day(options.out.resolve(), host(), options.dry_run, variables)
    day.resume_from(options.earlier)
    parts = [part for part in PARTS if (part.name in chosen if chosen else not day.ended(part))]
    day.run(parts, 60 * options.minutes)
    print(f"\n{day.page}\n{day.left()}", flush=True)
    return 0 if all(entry["status"] in ("done", "cut short") for entry in day.entries.values()) else 1


def use_wheels(folder: Path) -> dict[str, str]:
    """Unpack the wheels beside the clone, if there are any; returns the variables by which child
    processes find them.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        return {}
    target = ROOT / ".cache" / "wheels"
    command = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade", "--target", str(target)]
    done = subprocess.run([sys.executable, *command, *map(str, wheels)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"{folder}: the wheels could not be installed.\n{done.stderr.strip()[-2000:]}")
    sys.path.insert(0, str(target))
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(target), *([before] if before else [])])}


class Day:
    """Results of the parts, and their files."""

    def __init__(
        self, out: Path, host: Path, dry: bool, variables: Mapping[str, str], run: Runner | None = None
    ) -> None:
        """dry:

        True runs small shapes on the CPU, False the real parts. variables: for the environment of every part.
        """
        self.out, self.host, self.dry, self.variables = out, host, dry, dict(variables)
        self.runner = run or in_a_process
        self.machine = machine(host)
        self.entries: dict[str, dict[str, Any]] = {}
        out.mkdir(parents=True, exist_ok=True)

    @property
    def page(self) -> Path:
        return self.out / f"{NAME}.md"

    def resume_from(self, earlier: Path | None) -> None:
        """Continue from the results in a folder: their parts and the weights they trained."""
        for folder in (earlier, self.out):
            path = folder / f"{NAME}.json" if folder is not None else None
            if folder is None or path is None or not path.is_file():
                if folder is not None and folder == earlier:
                    raise SetupError(f"--continue {folder}: no {NAME}.json there. Name the --out of an earlier run.")
                continue
            self.entries |= json.loads(path.read_text("utf-8"))["parts"]
            for name in TRAINED:
                if (folder / name).is_file() and folder.resolve() != self.out:
                    shutil.copyfile(folder / name, self.out / name)

    def ended(self, part: Part) -> bool:
        return not part.endless and self.entries.get(part.name, {}).get("status") in ENDED

    def run(self, parts: Iterable[Part], seconds: float) -> None:
        """Run these parts for the given seconds; each result is on disk before the next part begins."""
        end = time.monotonic() + seconds
        self.write()
        for part in parts:
            left = end - time.monotonic() - RESERVE
            if left < min(LEAST, seconds / 2):
                break
            print(f"== {part.name}: {part.question}; {left:.0f} s left", flush=True)
            entry = self.result_of(part, min(part.seconds, left), whole=part.seconds <= left)
            self.entries[part.name] = entry
            self.write()
            print(f"   {entry['status']}, {entry['seconds']} s", flush=True)

    def result_of(self, part: Part, seconds: float, whole: bool) -> dict[str, Any]:
        """Run one part. whole: True gives it the full time for its kind; False less."""
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="gpu-day-", ignore_cleanup_errors=True) as scratch:
            tables, output = Path(scratch) / "tables.json", Path(scratch) / "output.txt"
            output.touch()
            try:
                code = self.runner(self.command(part, tables, seconds), seconds, output, self.environment())
            except OSError as error:
                code = 1
                output.write_text(f"could not be started: {error}", "utf-8")
            said = output.read_text("utf-8", errors="replace")
            found = tables.read_text("utf-8").splitlines() if tables.is_file() else []
        return {
            "status": status_of(code, said, whole or part.endless),
            "seconds": round(time.monotonic() - started, 1),
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "machine": self.machine,
            "tables": [json.loads(line) for line in found if line.endswith("}")],
            "said": said[-TAIL:],
        }

    def command(self, part: Part, tables: Path, seconds: float) -> list[str]:
        """Arguments of the interpreter for a part."""
        if part.script == PYTEST:
            where = [
                str(path)
                for path in sorted((ROOT / "tests").rglob("test_*.py"))
                if "mark.gpu" in path.read_text("utf-8")
            ]
            return [
                "-m",
                "pytest",
                "-m",
                "gpu",
                "-rA",
                "-p",
                "no:cacheprovider",
                "-o",
                "filterwarnings=default",
                *where,
            ]
        return [
            *(str(ROOT / "benchmarks" / part.script), "--comfyui", str(self.host), "--json", str(tables)),
            *("--seconds", f"{MARGIN * seconds:.0f}", "--folder", str(self.out)),
            *(*part.arguments, *(DRY if self.dry else ())),
        ]

    def environment(self) -> dict[str, str]:
        tests = {"CONTROLNEXT_COMFYUI": str(self.host), "CONTROLNEXT_ON_GPU": "dry" if self.dry else "1"}
        alone = {"PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1"}
        return {**PATIENT_THREADS, **os.environ, **self.variables, **alone, **tests}

    def write(self) -> None:
        """Write both files atomically; the largest outputs are cut where one would be too large."""
        for name, text in ((f"{NAME}.json", self.as_json), (f"{NAME}.md", self.as_page)):
            scratch = self.out / f".{name}.tmp"
            scratch.write_text(text(), encoding="utf-8", newline="\n")
            os.replace(scratch, self.out / name)
        for path in self.out.iterdir():
            if path.stat().st_size > LIMIT_MIB * 2**20:
                print(f"   {path.name} is larger than {LIMIT_MIB} MiB and is removed.", flush=True)
                path.unlink()

    def as_json(self) -> str:
        return json.dumps({"machine": self.machine, "dry_run": self.dry, "parts": self.entries}, indent=1)

    def as_page(self) -> str:
        """Report in Markdown."""
        lines = [
            "# A day with a GPU" + (" (dry run on the CPU: no figure here means anything)" if self.dry else ""),
            "",
        ]
        lines += [f"{key}: {value}  " for key, value in self.machine.items()]
        lines += ["", "| part | question | status | seconds |", "|---|---|---|---|"]
        for part in PARTS:
            entry = self.entries.get(part.name, {"status": "owed", "seconds": ""})
            lines.append(f"| {part.name} | {part.question} | {entry['status']} | {entry['seconds']} |")
        for name, entry in self.entries.items():
            lines += ["", f"## {name}", "", f"{entry['status']}, {entry['date']}"]
            for table in entry["tables"]:
                lines += [
                    "",
                    f"### {table['title']}",
                    "",
                    f"{table['facts']}; {table['settings']}",
                    "",
                    *rows_of(table),
                ]
            if entry["status"] != "done" or not entry["tables"]:
                lines += ["", "```", entry["said"].strip(), "```"]
        return "\n".join(lines) + "\n"

    def left(self) -> str:
        """Line about the parts that have not ended."""
        names = [part.name for part in PARTS if not part.endless and not self.ended(part)]
        return f"left: {', '.join(names)}; continue with --continue {self.out}" if names else "Every part has ended."


def rows_of(table: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table."""
    head = list(table["rows"][0]) if table["rows"] else []
    cells = [head, ["---"] * len(head), *([str(row[key]) for key in head] for row in table["rows"])]
    return [f"| {' | '.join(row)} |" for row in cells]


def status_of(code: int | None, said: str, whole: bool) -> str:
    """Status of a part. code: None where it was killed at the end of its time; whole: True if it had its full time."""
    if code is None:
        return "out of time" if whole else "cut short"
    if code == 0:
        return "done"
    return "out of memory" if re.search(r"OutOfMemory|out of memory|MemoryError", said) else "failed"


def in_a_process(arguments: list[str], seconds: float, output: Path, environment: Mapping[str, str]) -> int | None:
    """Run this interpreter; its child processes end with it. Returns None where it took longer than `seconds`."""
    new_group: dict[str, Any] = {"start_new_session": True} if os.name != "nt" else {}
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=stream, stderr=subprocess.STDOUT, env=dict(environment), **new_group
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all its child processes."""
    if os.name == "nt":
        if process.poll() is None:
            kill = ["taskkill", "/T", "/F", "/PID", str(process.pid)]
            subprocess.run(kill, capture_output=True, check=False)  # noqa: S607 - a program of Windows
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def machine(host: Path) -> dict[str, str]:
    """Facts about hardware and versions that need no torch."""
    found = {"date": datetime.date.today().isoformat(), "system": platform.platform()}
    found |= {"python": platform.python_version(), "cores": str(os.cpu_count()), "gpu": _gpu()}
    version = host / "comfyui_version.py"
    match = re.search(r'"(.+?)"', version.read_text("utf-8")) if version.is_file() else None
    found["comfyui"] = match[1] if match else "unknown"
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    lacking = missing(("torch", "torchsde", "transformers", "av", "einops", "cv2", "pytest", "diffusers"))
    return {**found, "missing": ", ".join(lacking) or "nothing"}


def _gpu() -> str:
    """Name, memory and driver of each GPU, from the driver's own tool."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "none that nvidia-smi tells of"
    return "; ".join(done.stdout.split("\n")).strip("; ") or done.stderr.strip()
