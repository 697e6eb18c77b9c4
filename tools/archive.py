"""`python run.py archive`: list, check and write the archive for the registry. Sends nothing.

The registry's client packs the files that git tracks, without those in `.comfyignore`. Standard library and git only.
"""

from __future__ import annotations

import argparse
import fnmatch
import subprocess
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .environment import ROOT, SetupError

NEEDED = (
    *("__init__.py", "_alias.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE", "CHANGELOG.md"),
    *("nodes/__init__.py", "models/__init__.py", "controlnext_core/__init__.py", "controlnext_training/__init__.py"),
    *("controlnext_training/recipes/tiny.toml", "web/docs/ControlNeXtApply.md", "locales/zh/nodeDefs.json"),
    *("docs/index.md", "example_workflows/Demo, runs now.json"),
)
"""Files without which the pack would not start, or the registry's page would lack texts."""
UNWANTED = ("*.safetensors", "*.ckpt", "*.pt", "*.pth", "*.bin", "*.whl", "*.zip", "tests/*", "tools/*", "run.py")
"""Files that must not be published: weights, archives, and code that starts processes."""
LIMIT_MIB = 20.0
"""Largest size of all files together, in MiB; a host downloads them at each update."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE.zip", help="write the archive; default: only list it")


def tracked(root: Path = ROOT) -> list[str]:
    """Files that git tracks and that exist, by their path in the clone. Raises SetupError without git."""
    command = ["git", "-c", "core.quotepath=off", "ls-files", "-z"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(
            f"{root}: git cannot list the files ({error}). The archive is made from a git clone."
        ) from error
    names = [name for name in done.stdout.decode("utf-8").split("\0") if name]
    return sorted(name for name in names if (root / name).is_file())


def is_ignored(name: str, patterns: Sequence[str]) -> bool:
    """True: a line of .comfyignore names the file, a folder above it, or, with wildcards, its name. False: none does.

    Lines are folders (`tests/`), paths (`run.py`, `demo/weights`) and names with wildcards (`*.log`), as in .gitignore.
    """
    for pattern in (pattern.strip("/") for pattern in patterns):
        parts = name.split("/")
        above = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
        if pattern in above or any(fnmatch.fnmatchcase(part, pattern) for part in parts):
            return True
    return False


def read_patterns(root: Path = ROOT) -> list[str]:
    """Lines of .comfyignore. Raises SetupError for forms that `is_ignored` does not support."""
    lines = [line.strip() for line in (root / ".comfyignore").read_text(encoding="utf-8").splitlines()]
    patterns = [line for line in lines if line and not line.startswith("#")]
    for pattern in patterns:
        if pattern.startswith("!") or "**" in pattern or ("*" in pattern and "/" in pattern.strip("/")):
            raise SetupError(
                f".comfyignore: {pattern!r} is of a form that `run.py archive` does not know; write a folder."
            )
    return patterns


def archive_files(root: Path = ROOT) -> dict[str, int]:
    """Files that would be published: {path in the archive: bytes}."""
    patterns = read_patterns(root)
    return {name: (root / name).stat().st_size for name in tracked(root) if not is_ignored(name, patterns)}


def faults(files: Mapping[str, int]) -> list[str]:
    """Reasons, as sentences, why these files must not be published; empty where they may."""
    found = [f"{name} is missing" for name in NEEDED if name not in files]
    for pattern in UNWANTED:
        found += [f"{name} must not be in it ({pattern})" for name in files if fnmatch.fnmatchcase(name, pattern)]
    lost = (name for name in files if not name.isascii())
    found += [f"{name}: the registry's client leaves out names that are not ASCII" for name in lost]
    size = sum(files.values()) / 2**20
    if size > LIMIT_MIB:
        found.append(f"it is {size:.1f} MiB, more than {LIMIT_MIB:g}")
    return found


def write_zip(path: Path, files: Sequence[str], root: Path = ROOT) -> None:
    """Write the files into a zip archive, names as in the clone."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in files:
            archive.write(root / name, name)


def run_archive(options: argparse.Namespace, say: Callable[[str], None] = print) -> int:
    """List the archive, check it and write it where requested; returns 0 where it may be published, else 1."""
    files = archive_files()
    for name, size in files.items():
        say(f"{size:>9,}  {name}")
    wrong = faults(files)
    say(f"{len(files)} files, {sum(files.values()) / 2**20:.1f} MiB" + ("; may be published" if not wrong else ""))
    for fault in wrong:
        say(f"NOT to be published: {fault}")
    if options.out is not None and not wrong:
        write_zip(options.out, list(files))
        say(f"written to {options.out}")
    return 1 if wrong else 0
