"""tools/checks.py, the step `security`: bandit sees all code of the project, and what it finds fails the run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from comfyui_controlnext.tools import checks


def test_all_code_but_the_tests_is_looked_through_once() -> None:
    places = [place for half in checks.SECURITY for place in half]
    wanted = {*checks.PACKAGES, *(path.name for path in checks.ROOT.glob("*.py"))}
    assert sorted(places) == sorted(wanted)


@pytest.mark.skipif(importlib.util.find_spec("bandit") is None, reason="needs bandit, which .venv has")
@pytest.mark.parametrize(("line", "status"), [("value = 1", 0), ("import os; os.system(input())", 1)])
def test_an_unsafe_call_in_either_half_fails_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, status: int
) -> None:
    (tmp_path / "sound.py").write_text("value = 1\n", "utf-8")
    (tmp_path / "asked.py").write_text(f"{line}\n", "utf-8")
    halves = ((str(tmp_path / "asked.py"),), (str(tmp_path / "sound.py"),))
    for given in (halves, halves[::-1]):
        monkeypatch.setattr(checks, "SECURITY", given)
        assert checks.check_security(checks.CheckOptions(Path)) == status


def test_an_interpreter_without_bandit_passes_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unwanted(*arguments: str, **settings: Any) -> int:
        raise AssertionError("bandit was run")

    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(checks, "call", unwanted)
    assert checks.check_security(checks.CheckOptions(Path)) == 0
    assert "has no bandit==" in capsys.readouterr().out
