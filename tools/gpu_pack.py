"""`python run.py gpu-day --pack FILE.zip`: this clone inside a ComfyUI, for a machine without a network.

Of the weights it contains only those that a part starts from, and no pictures. Standard library only.
"""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

from .environment import ROOT, SetupError
from .gpu_parts import STARTS

LIMIT_MIB = 55
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".mp4")
LEFT_OUT = ("docs", "benchmarks/results", "demo", "web")
"""Folders of this project that no part reads."""
HOST_LEFT_OUT = ("tests", "tests-unit", "input", "output", "models", "custom_nodes", "user", "blueprints", "temp")
CLONE = "ComfyUI/custom_nodes/ComfyUI-ControlNeXt"


def pack(path: Path, host: Path, wheels: Path | None) -> str:
    """Write the archive; returns a sentence with its size. Raises SetupError where it is larger than LIMIT_MIB."""
    entries = dict(sorted(_entries(host, wheels)))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, source in entries.items():
            archive.write(source, name)
        largest = sorted(archive.infolist(), key=lambda entry: -entry.compress_size)[:5]
    size = path.stat().st_size / 2**20
    if size > LIMIT_MIB:
        path.unlink()
        told = ", ".join(f"{entry.filename} {entry.compress_size / 2**20:.1f}" for entry in largest)
        raise SetupError(f"{path}: would have {size:.1f} MiB of at most {LIMIT_MIB}. The largest parts: {told}.")
    return (
        f"{path}: {size:.1f} MiB, {len(entries)} files. On the other machine:\n"
        f"  unzip {path.name}; python {CLONE}/run.py gpu-day --out results"
    )


def _entries(host: Path, wheels: Path | None) -> Iterator[tuple[str, Path]]:
    """Pairs (name in the archive, file)."""
    for file in _tracked(ROOT):
        name = file.relative_to(ROOT).as_posix()
        if file.suffix.lower() not in PICTURES and not name.startswith(tuple(f"{folder}/" for folder in LEFT_OUT)):
            yield f"{CLONE}/{name}", file
    for file in (ROOT / "demo" / "weights" / name for name in STARTS):
        if file.is_file():
            yield f"{CLONE}/{file.relative_to(ROOT).as_posix()}", file
    for file in sorted(host.rglob("*")):
        inside = file.relative_to(host)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in inside.parts)
        if file.is_file() and not hidden and inside.parts[0] not in HOST_LEFT_OUT and file.suffix not in PICTURES:
            yield f"ComfyUI/{inside.as_posix()}", file
    if wheels is not None:
        found = sorted(wheels.glob("*.whl"))
        if not found:
            raise SetupError(f"--wheels {wheels}: there is no .whl file.")
        yield from ((f"{CLONE}/wheels/{file.name}", file) for file in found)


def _tracked(root: Path) -> list[Path]:
    """Files of the project that git tracks, so that no other files of the user are included."""
    listing = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, capture_output=True, check=False)
    if done.returncode:
        raise SetupError(f"{root}: git does not list its files, so that no pack can be made: {done.stderr.decode()}")
    names = done.stdout.decode("utf-8").split("\0")
    return [root / name for name in names if name and (root / name).is_file()]
