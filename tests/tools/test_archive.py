"""The archive for the registry: its files, its checks, and that a ComfyUI starts with nothing else."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from comfyui_controlnext.tools import archive
from comfyui_controlnext.tools.environment import SetupError

ROOT = Path(__file__).resolve().parents[2]
COMFY_TEST = shutil.which("comfy-test", path=str(Path(sys.executable).parent)) or shutil.which("comfy-test")
pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the archive is made from a git clone")


def test_the_archive_may_be_published() -> None:
    files = archive.archive_files()
    assert archive.faults(files) == []
    assert not any(name.startswith((".github/", "tests/", "benchmarks/", "tools/", "demo/weights/")) for name in files)
    assert {"docs/icon.png", "docs/banner.png"} <= files.keys()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"demo/weights/shapes.safetensors": 9}, "shapes.safetensors must not be in it"),
        ({"tools/cli.py": 9}, "tools/cli.py must not be in it"),
        ({"nodes/__init__.py": None}, "nodes/__init__.py is missing"),
        ({"docs/film.png": 30 * 2**20}, "MiB, more than 20"),
        ({"docs/na\u00efve.md": 9}, "not ASCII"),
    ],
)
def test_a_wrong_archive_is_refused(
    change: dict[str, int | None], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {**archive.archive_files(), **change}
    monkeypatch.setattr(
        archive, "archive_files", lambda: {name: size for name, size in files.items() if size is not None}
    )
    told: list[str] = []
    target = tmp_path / "pack.zip"
    assert archive.run_archive(argparse.Namespace(out=target), told.append) == 1
    assert says in "\n".join(told) and not target.exists()


def test_comfyignore_is_read_as_git_reads_such_files(tmp_path: Path) -> None:
    """git itself is the reference: the same lines as .gitignore, over the clone's own paths and some harder ones."""
    names = [*archive.tracked(), "a/run.py", "b.log", "c/d.log", "tests", "x/tests/y", "benchmarks2/z", "demo/weights2"]
    patterns = [*archive.read_patterns(), "*.log"]
    init = ["git", "init", "-q", str(tmp_path)]
    subprocess.run(init, check=True)
    (tmp_path / ".git" / "info" / "exclude").write_text("\n".join(patterns), encoding="utf-8")
    command = ["git", "-C", str(tmp_path), "check-ignore", "--no-index", "--stdin", "-z"]
    done = subprocess.run(command, input="\0".join(names).encode(), capture_output=True, check=False)
    theirs = {name for name in done.stdout.decode().split("\0") if name}
    ours = {name for name in names if archive.is_ignored(name, patterns)}
    assert ours - theirs == {"tests"}, "a file of a folder's name; there is none"
    assert theirs - ours == set()


@pytest.mark.parametrize("line", ["!keep.py", "a/**/b", "docs/*.png"])
def test_lines_of_another_form_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / ".comfyignore").write_text(line, encoding="utf-8")
    with pytest.raises(SetupError, match="does not know"):
        archive.read_patterns(tmp_path)


@pytest.mark.skipif(COMFY_TEST is None, reason="comfy-test is not installed; CONTRIBUTING.md says how")
def test_the_archive_passes_comfy_tests_static_levels(tmp_path: Path) -> None:
    archive.write_zip(tmp_path / "pack.zip", list(archive.archive_files()))
    with zipfile.ZipFile(tmp_path / "pack.zip") as packed:
        packed.extractall(tmp_path / "pack")
    command = [str(COMFY_TEST), "lint", "--strict", str(tmp_path / "pack")]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
    assert done.returncode == 0 and "[SYNTAX] PASSED" in done.stdout, done.stdout + done.stderr


@pytest.mark.comfy
def test_a_host_starts_with_the_archive_alone(host: Path, tmp_path: Path) -> None:
    from comfyui_controlnext.tools.comfy_server import ComfyServer
    from comfyui_controlnext.tools.make_locales import own_nodes

    told: list[str] = []
    assert archive.run_archive(argparse.Namespace(out=tmp_path / "pack.zip"), told.append) == 0
    pack = tmp_path / "packs" / "controlnext"
    with zipfile.ZipFile(tmp_path / "pack.zip") as packed:
        packed.extractall(pack)
        assert len(packed.namelist()) == len(told) - 2
    with ComfyServer.start(
        host, tmp_path / "base", pack=pack, arguments=["--cpu", "--disable-api-nodes"], log=tmp_path / "log"
    ) as server:
        nodes = own_nodes(server.object_info())
    assert {"ControlNeXtLoader", "ControlNeXtApply", "ControlNeXtTrain", "ControlNetXSLoader"} <= nodes.keys()
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == nodes.keys()
