"""Unique names: modules, and classes whose names are ambiguous by themselves."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("models", "controlnext_core", "nodes", "controlnext_training", "tools", "benchmarks", "tests")
SHARED_MODULES = {"__init__"}
"""Module names that every package has; no other name may occur twice."""
SINGLE_CLASSES = ("Base", "Place", "Row", "Run", "Stage")
"""Words with several meanings in the code: at most one class may have each as its name."""


def paths() -> list[Path]:
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(found) > 200
    return found


def repeated(names: list[str]) -> list[str]:
    return sorted(name for name, number in Counter(names).items() if number > 1)


def classes(source: str) -> list[str]:
    """Names of the classes, nested ones included, and of the top-level aliases that hold one of SINGLE_CLASSES."""
    tree = ast.parse(source)
    aliases = [
        t.id for line in tree.body if isinstance(line, ast.Assign) for t in line.targets if isinstance(t, ast.Name)
    ]
    found = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return found + [name for name in aliases if name in SINGLE_CLASSES]


def test_every_module_has_a_name_of_its_own() -> None:
    assert repeated([path.stem for path in paths() if path.stem not in SHARED_MODULES]) == []


def test_a_word_of_many_meanings_names_one_class() -> None:
    found = [name for path in paths() for name in classes(path.read_text("utf-8")) if name in SINGLE_CLASSES]
    assert repeated(found) == []
    assert {"Base", "Place", "Stage"} <= set(found)


def test_repeated_names_are_found() -> None:
    assert repeated(["host", "report", "host"]) == ["host"]
    assert classes("class Base: ...\ndef f():\n    class Row: ...\nRun = int\nOther = int") == ["Base", "Row", "Run"]
