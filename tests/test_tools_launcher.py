"""tools/launcher.py: torchvision without its compiled part, and the end of the server with its input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
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
