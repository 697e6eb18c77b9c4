"""Releases of ComfyUI for run.py, against a local repository with tags."""

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from comfyui_controlnext.tools import cli, environment, host, releases
from comfyui_controlnext.tools.environment import SetupError
from comfyui_controlnext.tools.releases import Release, choose, clone, python_for, unreachable

FILES = ("main.py", "nodes.py", "folder_paths.py", "comfy/samplers.py")
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@t.invalid", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false")
    command = [str(shutil.which("git")), *who, *arguments]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Tags v1 (whole, annotated), v2 (a later commit) and bare (no ComfyUI) in a repository with any name."""
    folder = tmp_path_factory.mktemp("h\u00f6st origin")
    git(folder, "init", "--quiet")
    (folder / "readme").write_text("nothing", "utf-8")
    git(folder, "add", "."), git(folder, "commit", "--quiet", "-m", "bare"), git(folder, "tag", "bare")
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name, "utf-8")
    (folder / "requirements.txt").write_text("pytest\n# a comment\n", "utf-8")
    git(folder, "add", "."), git(folder, "commit", "--quiet", "-m", "one"), git(folder, "tag", "-a", "v1", "-m", "one")
    first = git(folder, "rev-parse", "HEAD")
    (folder / "main.py").write_text("two", "utf-8")
    git(folder, "commit", "--quiet", "-am", "two"), git(folder, "tag", "v2")
    return Release("v1", first, folder.as_uri())


@pytest.fixture
def silent() -> Iterator[str]:
    """Address of a server that accepts connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        taken: list[socket.socket] = []
        thread = threading.Thread(target=lambda: taken.append(listening.accept()[0]), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/ComfyUI.git"
        for connection in taken:
            connection.close()


def test_the_pinned_tag_is_cloned_checked_and_kept(
    origin: Release, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choice = choose(None, tmp_path, origin)
    assert choice.release == origin and choice.flag == "v1"
    assert choice.line == f"ComfyUI v1: git reaches {origin.repository}."
    target = clone(origin, tmp_path)
    assert target == tmp_path / ".host" / "ComfyUI-v1" and host.is_comfyui(target)
    assert (target / "main.py").read_text("utf-8") == "main.py", "of the tag, not of the branch"
    assert git(target, "rev-parse", "HEAD") == origin.commit
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert "Cloning" in capsys.readouterr().out
    gone = replace(origin, repository=(tmp_path / "nowhere").as_uri())
    assert choose(None, tmp_path, gone).why == "cloned before"
    assert clone(gone, tmp_path) == target and capsys.readouterr().out == "", "nothing is fetched again"


def test_another_commit_than_the_pinned_one_is_not_used(origin: Release, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=rf"v2 is commit \w+, expected {origin.commit}\. The tag was moved"):
        clone(replace(origin, tag="v2"), tmp_path)
    assert list((tmp_path / ".host").iterdir()) == []


def test_a_tag_that_a_person_names_is_cloned_whatever_its_commit(origin: Release, tmp_path: Path) -> None:
    choice = choose("v2", tmp_path, origin)
    assert choice.release == Release("v2", "", origin.repository)
    assert (clone(choice.release, tmp_path) / "main.py").read_text("utf-8") == "two"
    with pytest.raises(SetupError, match=r"no ComfyUI at bare\. Use --comfyui-release wheel"):
        clone(replace(origin, tag="bare", commit=""), tmp_path)


def test_a_leftover_of_an_interrupted_clone_goes(origin: Release, tmp_path: Path) -> None:
    (tmp_path / ".host" / "ComfyUI-v1.partial-x" / "comfy").mkdir(parents=True)
    (tmp_path / ".host" / "ComfyUI-v1").mkdir()
    clone(origin, tmp_path)
    assert [path.name for path in (tmp_path / ".host").iterdir()] == ["ComfyUI-v1"]


def test_without_git_the_wheel_is_taken(origin: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    choice = choose(None, tmp_path, origin)
    assert choice.release is None and choice.flag == "wheel"
    assert choice.line == f"ComfyUI {host.VERSION} from the wheel: git is not installed."
    with pytest.raises(SetupError, match=r"--comfyui-release v1: git is not installed\. .*--comfyui-release wheel"):
        choose("v1", tmp_path, origin)


def test_a_repository_that_is_not_there_or_lacks_the_tag_is_said(origin: Release, tmp_path: Path) -> None:
    gone = replace(origin, repository=(tmp_path / "nowhere").as_uri())
    assert "git cannot reach" in (unreachable(gone) or "")
    assert (unreachable(replace(origin, tag="v9")) or "").endswith("has no tag v9")
    assert choose(None, tmp_path, gone).release is None


def test_a_repository_that_never_answers_is_given_up(origin: Release, silent: str) -> None:
    started = time.monotonic()
    said = unreachable(replace(origin, repository=silent), seconds=1.0)
    assert said == "127.0.0.1 did not answer within 1 s"
    assert time.monotonic() - started < 5 and releases.SECONDS <= 10


def test_the_wheel_is_taken_on_request_and_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "unreachable", lambda release: pytest.fail("asked the network"))
    assert choose("wheel", tmp_path) == releases.Choice(None, "as --comfyui-release says")


@pytest.mark.parametrize("tag", ["--upload-pack=x", "../x", "a b", ""])
def test_a_name_that_is_no_tag_is_refused(tag: str, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"is not a tag\. Write one such as v0\.33\.0, or wheel"):
        choose(tag, tmp_path)


def test_the_environment_follows_the_release(origin: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = clone(origin, tmp_path)
    (tmp_path / "requirements.txt").write_text("einops\n", "utf-8")
    assert python_for(origin, own=False, root=tmp_path) is None, "the running Python has pytest"
    asked: list[list[str]] = []
    monkeypatch.setattr(environment, "run_pip", lambda python, arguments, log: asked.append(arguments))
    monkeypatch.setattr(environment.Environment, "_create", lambda self: self.folder.mkdir())
    monkeypatch.setattr(environment.Environment, "works", lambda self: self.folder.exists())
    (target / "requirements.txt").write_text("pytest==0.0.1\n", "utf-8")
    python = python_for(origin, own=False, root=tmp_path)
    assert python is not None and python.is_relative_to(tmp_path / ".venv-v1")
    lists = [str(target / "requirements.txt"), str(tmp_path / "requirements.txt")]
    assert asked == [["install", "-r", lists[0], "-r", lists[1]]]
    assert python_for(origin, own=False, root=tmp_path) == python and len(asked) == 1, "made once"
    (target / "requirements.txt").write_text("no-such-package\n", "utf-8")
    assert python_for(origin, own=False, root=tmp_path) == python and len(asked) == 2, "the list changed"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, origin: Release) -> list[object]:
    """Command `demo` without a demo: records the host it would use, and the Python and arguments
    that would continue.
    """
    seen: list[object] = []
    monkeypatch.setattr(environment, "choose", lambda level, own: seen.append(f"choose {level}"))
    monkeypatch.setattr(host, "provide", lambda: Path("wheel"))
    monkeypatch.setattr(releases, "choose", lambda wanted: choose(wanted, tmp_path))
    monkeypatch.setattr(releases, "clone", lambda release: Path(f"clone {release.tag}"))
    monkeypatch.setattr(releases, "python_for", lambda release, own: Path("new python") if own else None)
    monkeypatch.setattr(cli, "run_again_with", lambda python, arguments: seen.append((python, list(arguments))) or 7)
    demo = replace(cli.COMMANDS["demo"], run=lambda options: seen.append(options.brought) or 0)
    monkeypatch.setitem(cli.COMMANDS, "demo", demo)
    monkeypatch.setattr(cli.sys, "prefix", "/usr")  # a Python of .venv was started by one that has said it
    return seen


def test_a_command_brings_the_release_or_the_wheel_and_says_which(
    run: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(releases, "unreachable", lambda release: None)
    assert cli.main(["demo"]) == 0 and run == [Path("clone v0.33.0")]
    assert capsys.readouterr().out.startswith("ComfyUI v0.33.0: git reaches https://github.com/")
    run.clear()
    assert cli.main(["demo", "--venv"]) == 7
    assert run == [(Path("new python"), ["demo", "--comfyui-release", "v0.33.0", "--venv"])]
    run.clear()
    monkeypatch.setattr(releases, "unreachable", lambda release: "no network")
    assert cli.main(["demo"]) == 0 and run == ["choose host", Path("wheel")]
    assert f"ComfyUI {host.VERSION} from the wheel: no network." in capsys.readouterr().out


def test_demo_comfy_and_train_choose_and_the_others_take_the_wheel() -> None:
    assert {name for name, command in cli.COMMANDS.items() if command.newest} == {"demo", "comfy", "train"}
    assert cli.parse(["comfy", "--comfyui-release", "wheel"]).comfyui_release == "wheel"
    assert cli.parse(["train", "--comfyui-release", "v1", "a.toml", "--steps", "3"]).comfyui_release == "v1"
    with pytest.raises(SystemExit):
        cli.parse(["test", "--comfyui-release", "wheel"])


def test_a_clone_asks_for_no_password() -> None:
    assert releases._environment()["GIT_TERMINAL_PROMPT"] == "0" and "PATH" in os.environ


@pytest.mark.parametrize("flag", ["--comfyui", "--comfyui-release=wheel", "--venv", "--cpu"])
def test_a_misplaced_option_of_train_is_told_before_git_is_asked(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(cli, "bring_host", lambda *given: asked.append(given))
    monkeypatch.setattr(cli, "_own", lambda options: asked.append(options))
    assert cli.main(["train", "recipe.toml", "--steps", "5", flag, "x"]) == 1
    said = capsys.readouterr()
    assert f"{flag}: stands before CONFIG.toml" in said.err and said.out == "" and asked == []
