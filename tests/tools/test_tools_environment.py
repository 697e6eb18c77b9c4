"""Environment of tools/: the choice of a Python, and how `.venv` is made, completed, repaired."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from comfyui_controlnext.tools import environment, lock_hashes
from comfyui_controlnext.tools.environment import Environment, SetupError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LISTS = (
    "constraints.txt",
    "requirements-host.txt",
    "requirements-host-nodeps.txt",
    "requirements-test.txt",
    environment.LOCK,
)


def test_the_lock_is_in_step_with_the_lists_and_complete() -> None:
    """Lock file: every line has the lists' version and hashes; every needed package is in the lock or the host."""
    pins = lock_hashes.pins("requirements-test.txt", "constraints.txt")
    names = set()
    for line in lock_hashes.LOCK.read_text("utf-8").splitlines()[1:]:
        text, *hashes = line.split(" --hash=sha256:")
        assert hashes and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes), text
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        names.add(name)
        assert [str(requirement.specifier), str(requirement.marker)] in [
            [str(pin.specifier), str(pin.marker)] for pin in pins[name]
        ], f"{text}: run tools/lock_hashes.py"
    tools = lock_hashes.pins("requirements-test.txt")
    assert set(lock_hashes.ELSEWHERE) | set(tools) <= names
    lost = lock_hashes.closure(tools) - lock_hashes.closure(lock_hashes.pins(*lock_hashes.HOST_LISTS)) - names
    assert not lost, "run tools/lock_hashes.py"
    lines = lock_hashes.LOCK.read_text("utf-8").count("\n") - 1
    assert lines == sum(len(pins[name]) for name in names), "a version for another Python is left out"


class Recorder:
    """Stand-in for pip and venv: records the calls; `fail` makes the next pip call raise."""

    def __init__(self) -> None:
        self.made = 0
        self.pip: list[list[str]] = []
        self.fail: BaseException | None = None

    def run_pip(self, python: Path, arguments: list[str], log: Path) -> None:
        self.pip.append([Path(word).name for word in arguments])
        if self.fail is not None:
            raise self.fail

    def create(self, target: Environment) -> None:
        self.made += 1
        target.folder.mkdir(exist_ok=True)

    def forget(self) -> None:
        self.made, self.pip, self.fail = 0, [], None


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(environment, "run_pip", recorder.run_pip)
    monkeypatch.setattr(Environment, "_create", lambda self: recorder.create(self))
    monkeypatch.setattr(Environment, "works", lambda self: self.folder.exists())
    return recorder


@pytest.fixture
def target(tmp_path: Path) -> Environment:
    (tmp_path / "tools").mkdir()
    for name in LISTS:
        (tmp_path / "tools" / name).write_text(f"# {name}\n", encoding="utf-8")
    return Environment(tmp_path)


def change(target: Environment, name: str) -> None:
    (target.root / "tools" / name).write_text("something==2\n", encoding="utf-8")


def test_a_ready_environment_is_left_alone(target: Environment, recorder: Recorder) -> None:
    assert target.ensure("test") == target.python
    assert (recorder.made, len(recorder.pip)) == (1, 3)
    recorder.forget()
    target.ensure("host")
    target.ensure("test")
    assert (recorder.made, recorder.pip) == (0, [])


def test_the_test_tools_are_added_to_what_is_there(target: Environment, recorder: Recorder) -> None:
    target.ensure("host")
    assert not any(environment.LOCK in call for call in recorder.pip)
    recorder.forget()
    target.ensure("test")
    assert recorder.made == 0
    (call,) = recorder.pip
    assert call == ["install", "--no-deps", "--require-hashes", "-r", environment.LOCK]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SetupError("offline")])
def test_an_interrupted_installation_is_made_anew(
    target: Environment, recorder: Recorder, error: BaseException
) -> None:
    recorder.fail = error
    with pytest.raises(type(error)):
        target.ensure("host")
    assert target.folder.exists() and not target.ready("host")
    recorder.forget()
    target.ensure("host")
    assert recorder.made == 1 and target.ready("host")


def test_an_interrupted_addition_is_made_anew(target: Environment, recorder: Recorder) -> None:
    target.ensure("host")
    recorder.fail = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        target.ensure("test")
    recorder.forget()
    target.ensure("host")
    assert recorder.made == 1


@pytest.mark.parametrize("name", ["requirements-host.txt", "requirements-host-nodeps.txt", "constraints.txt"])
def test_changed_pins_are_installed_over_the_old_ones(target: Environment, recorder: Recorder, name: str) -> None:
    target.ensure("test")
    recorder.forget()
    change(target, name)
    assert not target.ready("host")
    target.ensure("test")
    assert recorder.made == 0 and len(recorder.pip) == 3 and target.ready("test")


@pytest.mark.parametrize("name", ["requirements-test.txt", environment.LOCK])
def test_changed_test_pins_do_not_touch_the_demo(target: Environment, recorder: Recorder, name: str) -> None:
    target.ensure("test")
    change(target, name)
    assert target.ready("host") and not target.ready("test")


@pytest.mark.parametrize("content", ["", "not json", "[]", "3"])
def test_an_unreadable_stamp_means_unfinished(target: Environment, recorder: Recorder, content: str) -> None:
    target.ensure("host")
    target.stamp.write_text(content, encoding="utf-8")
    recorder.forget()
    target.ensure("host")
    assert recorder.made == 1 and json.loads(target.stamp.read_text("utf-8")).keys() == {"host"}


def test_an_environment_whose_python_is_gone_is_made_anew(
    target: Environment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "run_pip", lambda *arguments: None)
    target.python.parent.mkdir(parents=True)
    target.python.write_bytes(b"")
    target.stamp.write_text(json.dumps(target.list_hashes("host")), encoding="utf-8")
    assert not target.works() and not target.ready("host")
    target.ensure("host")
    assert target.works() and target.ready("host")
    assert "making it again" in capsys.readouterr().out


def test_a_python_without_venv_is_named_with_the_cure(
    target: Environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "ensurepip is not available")
    monkeypatch.setattr(environment.subprocess, "run", lambda *arguments, **named: failed)
    with pytest.raises(SetupError, match=r"(?s)cannot make a virtual environment at .*ensurepip.*python3-venv"):
        target.ensure("host")


@pytest.mark.parametrize(
    ("log", "says"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        ("OSError: [WinError 112] There is not enough space on the disk", "the disk is full"),
        ("Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)'", "could not be reached"),
        (
            "NameResolutionError\nERROR: No matching distribution found for torch==2.13.0",
            "could not be reached",
        ),
        ("ERROR: No matching distribution found for torch==2.13.0", "no build of torch==2.13.0 for Python 3."),
        ("one\ntwo\nERROR: something else", "pip stopped with:\n    one\n    two\n    ERROR: something else"),
    ],
)
def test_pip_failures_are_explained(log: str, says: str, tmp_path: Path) -> None:
    assert says in environment.explain_pip_failure(log, tmp_path)


def without_pip_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def test_an_index_that_cannot_be_reached_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pip_settings(monkeypatch)
    closed = "http://127.0.0.1:9/simple"
    arguments = ["download", "--no-deps", "--retries", "0", "--index-url", closed, "einops", "-d", str(tmp_path)]
    with pytest.raises(SetupError, match=r"(?s)pip download failed: the package index could not be reached.*pip\.log"):
        environment.run_pip(Path(sys.executable), arguments, tmp_path / "logs" / "pip.log")


def test_a_python_without_pip_is_said(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    bare = tmp_path / "bare" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    with pytest.raises(SetupError, match="pip is not available"):
        environment.run_pip(bare, ["list"], tmp_path / "pip.log")


def absent(*names: str) -> Callable[[tuple[str, ...]], list[str]]:
    return lambda modules: [name for name in modules if name in names]


def test_a_comfyui_python_lacking_only_ours_is_told_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "missing", absent("cv2"))
    monkeypatch.setattr(Environment, "is_running", lambda self: False)
    monkeypatch.setattr(Environment, "ensure", lambda self, level: pytest.fail("installed something"))
    with pytest.raises(SetupError, match=r"(?s)lacks cv2.*-m pip install opencv-python-headless\n.*--venv"):
        environment.choose("host", own=False)


def test_a_python_with_everything_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "missing", absent())
    monkeypatch.setattr(Environment, "ensure", lambda self, level: pytest.fail("installed something"))
    monkeypatch.setattr(Environment, "is_running", lambda self: False)
    assert environment.choose("host", own=False) is None


@pytest.mark.parametrize(
    ("lacking", "level", "own"),
    [(("torch",), "host", False), (("torch", "cv2"), "host", False), (("pytest",), "test", False), ((), "host", True)],
)
def test_otherwise_the_projects_own_environment_is_used(
    lacking: tuple[str, ...], level: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "missing", absent(*lacking))
    monkeypatch.setattr(Environment, "is_running", lambda self: False)
    monkeypatch.setattr(Environment, "ensure", lambda self, asked: Path(f"python-for-{asked}"))
    assert environment.choose(level, own) == Path(f"python-for-{level}")


def test_looking_for_a_module_does_not_import_it() -> None:
    code = (
        f"import runpy, sys; runpy.run_path({str(environment.ROOT / '_alias.py')!r})\n"
        "from comfyui_controlnext.tools import environment as e\n"
        "e.missing((*e.HOST_MODULES, *e.PACK_MODULES)); e.serves('test')\n"
        "print([name for name in ('torch', 'cv2', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_requirement_is_pinned_to_one_version_per_python() -> None:
    for name in LISTS:
        for line in (environment.TOOLS / name).read_text("utf-8").splitlines():
            if line and not line.startswith("#"):
                assert line.partition(";")[0].count("==") == 1 and "*" not in line, f"{name}: {line}"
    assert environment.pinned("ruff") == "0.14.5"
    with pytest.raises(KeyError, match="no pin for nothing"):
        environment.pinned("nothing")


def test_a_second_setup_waits_for_the_first(tmp_path: Path) -> None:
    code = (
        f"import runpy, sys; runpy.run_path({str(environment.ROOT / '_alias.py')!r})\n"
        "from pathlib import Path\nfrom comfyui_controlnext.tools.environment import exclusive\n"
        "with exclusive(Path(sys.argv[1])):\n    print('in', flush=True)\n    sys.stdin.read()\n"
    )
    lock = tmp_path / "here" / "lock"
    command = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "in\n"
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as second:
            with pytest.raises(subprocess.TimeoutExpired):
                second.wait(1.0)
            first.kill()  # the system frees the lock of a process that dies
            output, _ = second.communicate(timeout=20)
            assert output.splitlines()[-1] == "in" and second.returncode == 0


def test_pip_tells_the_size_of_each_download_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pip.py").write_text(
        "import sys\nprint('Collecting torch')\nprint('  Downloading torch-2.13.0.whl (888.1 MB)')\n"
        "print(*sys.argv[1:])\nsys.exit(sys.argv[1] == 'fail')",
        "utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    environment.run_pip(Path(sys.executable), ["install", "torch"], tmp_path / "pip.log")
    assert capsys.readouterr().out == "  Downloading torch-2.13.0.whl (888.1 MB)\n"
    with pytest.raises(SetupError, match="pip fail failed"):
        environment.run_pip(Path(sys.executable), ["fail"], tmp_path / "pip.log")
