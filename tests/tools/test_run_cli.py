"""Command line of run.py and tools/cli.py: messages, choices and exit statuses around the actual work."""

import argparse
import ast
import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comfyui_controlnext.tools import checks, cli, environment
from comfyui_controlnext.tools.comfy_client import ComfyError
from comfyui_controlnext.tools.environment import SetupError

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "run.py"


def python(*arguments: str, code: str | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *arguments] if code is None else [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60, check=False)


def test_an_old_python_is_told_so_in_one_sentence() -> None:
    done = python(code=f"import runpy, sys; sys.version_info = (3, 8, 10); runpy.run_path({str(RUN)!r})")
    assert done.returncode == 1
    assert "needs Python 3.10 or newer" in done.stderr and "is Python 3.8." in done.stderr
    assert "Traceback" not in done.stderr


def test_run_py_uses_no_syntax_that_an_old_python_cannot_read() -> None:
    newer = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.FunctionDef, ast.AsyncFunctionDef, ast.Match, ast.Await)
    found = [node for node in ast.walk(ast.parse(RUN.read_text("utf-8"))) if isinstance(node, newer)]
    assert found == []


def test_help_needs_the_standard_library_only() -> None:
    done = python("-I", "-S", str(RUN), "--help")  # without site-packages
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("demo", "comfy", "test"))


def test_the_clone_is_not_on_sys_path() -> None:
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['run.py', '--help']\n"
        f"runpy.run_path({str(RUN)!r}); print({str(ROOT)!r} in sys.path)"
    )
    done = python(code=code)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("arguments", [[], ["fly"], ["test", "--fast", "yes"], ["comfy", "--port", "x"]])
def test_a_wrong_command_line_ends_with_usage_and_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: run.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (SetupError("turn it on"), 1, "run.py demo: turn it on"),
        (ComfyError("node 3 failed"), 1, "run.py demo: node 3 failed"),
        (KeyboardInterrupt(), 130, "Run the same command again"),
        (OSError(errno.ENOSPC, "No space left on device", "/some/file"), 1, "the disk is full (/some/file)"),
    ],
)
def test_what_stops_a_command_is_said_in_a_sentence(
    error: BaseException, status: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(environment, "choose", lambda level, own: None)
    monkeypatch.setitem(cli.COMMANDS, "demo", cli.Command("", "host", lambda parser: None, fail))
    assert cli.main(["demo"]) == status
    assert says in capsys.readouterr().err


def test_other_system_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: argparse.Namespace) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(environment, "choose", lambda level, own: None)
    monkeypatch.setitem(cli.COMMANDS, "demo", cli.Command("", "host", lambda parser: None, fail))
    with pytest.raises(PermissionError):
        cli.main(["demo"])


def test_the_command_goes_on_in_the_chosen_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    went: list[tuple[Path, list[str]]] = []
    monkeypatch.setattr(environment, "choose", lambda level, own: tmp_path / f"{level}-{own}")
    monkeypatch.setattr(cli, "run_again_with", lambda python, arguments: went.append((python, list(arguments))) or 7)
    assert cli.main(["test", "--venv", "--long"]) == 7
    assert went == [(tmp_path / "test-True", ["test", "--venv", "--long"])]


def test_run_again_passes_arguments_and_status_on(tmp_path: Path) -> None:
    folder = tmp_path / "a b \u00e9"
    folder.mkdir()
    script = folder / "run.py"
    script.write_text("import sys; print(ascii(sys.argv[1:])); sys.exit(5)", encoding="utf-8")
    code = (
        f"import runpy, sys; from pathlib import Path; runpy.run_path({str(ROOT / '_alias.py')!r})\n"
        "from comfyui_controlnext.tools import cli\n"
        f"sys.argv[0] = {str(script)!r}\n"
        "sys.exit(cli.run_again_with(Path(sys.executable), ['demo', 'two words']))"
    )
    done = python(code=code)
    assert (done.returncode, done.stdout.strip()) == (5, "['demo', 'two words']"), done.stderr


def test_one_failed_check_fails_the_run_and_the_others_still_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [checks.Step("one", lambda options: 0), checks.Step("two", lambda options: 3)]
    monkeypatch.setattr(checks, "STEPS", (*steps, checks.Step("three", lambda options: 0)))
    assert checks.run_checks(checks.CheckOptions(Path), []) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[-3:]] == [["passed", "one"], ["FAILED", "two"], ["passed", "three"]]
    assert checks.run_checks(checks.CheckOptions(Path), ["one", "three"]) == 0


def called_with(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[tuple[str, ...], str]:
    """Arguments of the interpreter, and the host's path, of the pytest step."""
    calls: list[tuple[tuple[str, ...], str]] = []
    monkeypatch.setattr(
        checks, "call", lambda *given, **variables: calls.append((given, variables["CONTROLNEXT_COMFYUI"])) or 0
    )
    checks.run_pytest(checks.CheckOptions(lambda: Path("host"), **options))
    return calls[0]


def test_the_pytest_step_gets_the_host_and_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, host = called_with(monkeypatch, long=True, expression="mask and not long", files=("tests/a.py",))
    assert arguments == ("-m", "pytest", "-m", "not gpu", "tests/a.py", "--long", "-k", "mask and not long")
    assert host == "host"


def test_fast_tests_ask_for_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def provide() -> Path:
        raise AssertionError("a host was asked for")

    monkeypatch.setattr(checks, "call", lambda *given, **variables: 7 if variables["CONTROLNEXT_COMFYUI"] == "" else 0)
    assert checks.run_pytest(checks.CheckOptions(provide, fast=True)) == 7
    monkeypatch.setattr(checks.os, "cpu_count", lambda: 1)
    assert called_with(monkeypatch, fast=True)[0] == ("-m", "pytest", "-m", "not gpu and not comfy")


def test_the_fast_tests_are_found_without_a_host() -> None:
    """A test file that imports the host at its top, and is not marked `comfy` as a whole, would end the fast run."""
    variables = {**os.environ, "CONTROLNEXT_COMFYUI": "", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "not gpu and not comfy", str(checks.TESTS)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_a_whole_run_is_shared_by_two_processes_where_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    whole = checks.CheckOptions(Path)
    shared = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    assert checks.share(whole, cores=8) == (shared, "4")
    assert checks.share(whole, cores=1) == ([], "1")
    assert checks.share(replace(whole, files=("tests/a.py",)), cores=8) == ([], "8")
    assert checks.share(replace(whole, expression="mask"), cores=8) == ([], "8")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert checks.share(whole, cores=8) == (shared, "3")


def test_only_takes_steps_and_patterns_of_test_files() -> None:
    def chosen(*only: str) -> tuple[list[str], list[str]]:
        steps, files = checks.choose(only)
        return [step.name for step in steps], [Path(file).name for file in files]

    assert chosen() == (["format", "lint", "security", "types", "pytest"], [])
    assert chosen("lint", "types") == (["lint", "types"], [])
    assert chosen("run_cli") == (["pytest"], ["test_run_cli.py"])
    assert chosen("lint", "*test_run_c?i.py", "run_cli") == (["lint", "pytest"], ["test_run_cli.py"])
    hostile = chosen("hostile")[1]  # a folder of that name comes before files elsewhere
    assert hostile == sorted(path.name for path in checks.TESTS.rglob("hostile/test_*.py"))
    with pytest.raises(environment.SetupError, match="--only nowhere: is not a step .format, lint, .*no test file"):
        chosen("lint", "nowhere")


def test_an_expression_selects_the_pytest_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(checks, "run_checks", lambda options, only: asked.append(list(only)) or 0)
    monkeypatch.setattr(environment, "choose", lambda level, own: None)
    for arguments in (["-k", "mask"], ["--only", "lint", "--only", "types"], []):
        cli.main(["test", *arguments])
    assert asked == [["pytest"], ["lint", "types"], []]


def test_the_type_checked_copy_mirrors_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "STAGE", tmp_path)
    packages = checks.stage_for_types()
    assert {"comfyui_controlnext.models", "comfyui_controlnext.controlnext_core"} <= set(packages)
    copied = {path.relative_to(tmp_path / "comfyui_controlnext" / "models") for path in tmp_path.rglob("models/*.py")}
    assert copied == {path.relative_to(ROOT / "models") for path in (ROOT / "models").glob("*.py")}
