"""Launcher of tools/: torchvision without its compiled part, and the end of the server with its input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "tools" / "launcher.py"
FAKE_HOST = """
import sys, os, time
try:
    print("argv", ascii(sys.argv), flush=True)
    print("path", ascii(sys.path[0]), __name__, flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def python(code: str) -> str:
    preamble = (
        f"import runpy; runpy.run_path({str(ROOT / '_alias.py')!r})\n"
        "from comfyui_controlnext.tools import launcher\nlauncher.declare_missing_torchvision_ops()\n"
    )
    done = subprocess.run([sys.executable, "-c", preamble + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torchvision_imports_and_its_operators_have_a_name() -> None:
    code = "import torch, torchvision\nprint(torch.ops.torchvision.nms.default, torch.ops.torchvision.qnms.default)"
    assert python(code) == "torchvision.nms.default torchvision.qnms.default"


def test_only_a_missing_operator_is_declared() -> None:
    code = (
        "import torch\nown = torch.library.Library('torchvision', 'DEF')\n"
        "own.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "launcher._define_absent_operators(); print(torch.ops.torchvision.qnms.default, len(launcher._libraries))\n"
        "launcher._define_absent_operators(); print(len(launcher._libraries))"
    )
    assert python(code).split() == ["torchvision.qnms.default", "1", "1"]


def test_declaring_imports_nothing_and_happens_once() -> None:
    code = (
        "import sys\nbefore = len(sys.meta_path); launcher.declare_missing_torchvision_ops()\n"
        "print('torch' in sys.modules, len(sys.meta_path) - before)"
    )
    assert python(code) == "False 0"


def test_main_py_runs_as_itself_and_ends_when_the_input_closes(tmp_path: Path) -> None:
    main = tmp_path / "a host \u00e9" / "main.py"
    main.parent.mkdir()
    main.write_text(FAKE_HOST, encoding="utf-8")
    command = [sys.executable, str(LAUNCHER), "--stop-with-input", str(main), "--port", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline().strip() == f"argv {ascii([str(main), '--port', '1'])}"
        assert process.stdout.readline().strip() == f"path {ascii(str(main.parent))} __main__"
        process.stdin.close()
        assert process.wait(20) == 0
        assert process.stdout.read().strip() == "interrupted"


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_the_server_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    main = tmp_path / "main.py"
    main.write_text(FAKE_HOST, encoding="utf-8")
    command = [sys.executable, str(LAUNCHER), "--stop-with-input", str(main)]
    code = f"import subprocess, time; subprocess.Popen({command!r}, stdin=subprocess.PIPE); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline().startswith("argv")
        parent.kill()
        assert parent.stdout.read().strip().endswith("interrupted")  # the pipe ends when the grandchild has ended


def run_with_torchaudio(folder: Path, code: str) -> str:
    """Run `code` with the launcher's finder, and only the `torchaudio` of this folder (none where it is empty)."""
    preamble = (
        f"import runpy, sys; runpy.run_path({str(ROOT / '_alias.py')!r})\nsys.path[:0] = [{str(folder)!r}]\n"
        "sys.path[1:] = [p for p in sys.path[1:] if 'site-packages' not in p]\n"
        "from comfyui_controlnext.tools import launcher\nlauncher.allow_missing_torchaudio()\n"
    )
    done = subprocess.run([sys.executable, "-c", preamble + code], capture_output=True, text=True, check=False)
    return done.stdout.strip() + done.stderr.strip()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (None, "is not installed"),
        ("import torchaudio.part\nraise OSError('libtorchaudio.so: undefined symbol')", "libtorchaudio.so: undefined"),
    ],
    ids=["missing", "broken"],
)
def test_torchaudio_may_be_missing_or_broken_until_it_is_used(tmp_path: Path, source: str | None, says: str) -> None:
    if source is not None:
        (tmp_path / "torchaudio").mkdir()
        (tmp_path / "torchaudio" / "__init__.py").write_text(source, "utf-8")
        (tmp_path / "torchaudio" / "part.py").write_text("", "utf-8")
    code = "import torchaudio, torchaudio.functional as AF, importlib.util\nprint('imported')\n"
    assert run_with_torchaudio(tmp_path, code) == "imported"
    used = run_with_torchaudio(tmp_path, code + "AF.resample")
    assert (
        "AttributeError: torchaudio.resample: torchaudio is" in used or "torchaudio.resample: torchaudio does" in used
    )
    assert says in run_with_torchaudio(tmp_path, code + "torchaudio.transforms.Resample")
    from_it = (
        code + "try:\n    from torchaudio.transforms import MelScale\nexcept ImportError:\n    print('as missing')"
    )
    assert run_with_torchaudio(tmp_path, from_it).split() == ["imported", "as", "missing"]


def test_a_working_torchaudio_is_used(tmp_path: Path) -> None:
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "__init__.py").write_text("from . import functional\nversion = 7", "utf-8")
    (tmp_path / "torchaudio" / "functional.py").write_text("def resample(): return 5", "utf-8")
    code = (
        "import torchaudio.functional as AF, torchaudio; print(AF.resample(), torchaudio.version, torchaudio.__file__)"
    )
    assert run_with_torchaudio(tmp_path, code) == f"5 7 {tmp_path / 'torchaudio' / '__init__.py'}"
