"""Words of docstrings and messages: forbidden openings and idioms. The rules are in CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("controlnext_core", "models", "nodes", "controlnext_training", "tools", "benchmarks", "tests")
OPENINGS = re.compile(
    r"\s*(What|Whether|Where|Which|Who|How|That|Its|Those|The same|Of|Inside|Stands for|Whatever|Everything|Something"
    r"|As)\b"
)
IDIOMS = re.compile(r"\b(anew|as it is|its like)\b")
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def public_docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings of modules, classes, functions and attributes whose name has no leading underscore."""
    for node in ast.walk(tree):
        if not isinstance(node, DEFINITIONS):
            continue
        name = getattr(node, "name", "")
        if name.startswith("_") and not name.startswith("__"):
            continue
        yield ast.get_docstring(node) or ""
        for line, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(line, (ast.Assign, ast.AnnAssign)) and isinstance(after, ast.Expr):
                text = after.value.value if isinstance(after.value, ast.Constant) else ""
                yield text if isinstance(text, str) else ""


def texts(tree: ast.Module) -> Iterator[str]:
    """Texts of a file: docstrings, messages, tooltips."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def faults(source: str) -> list[str]:
    tree = ast.parse(source)
    found = [text for text in public_docstrings(tree) if OPENINGS.match(text)]
    return found + [text for text in texts(tree) if IDIOMS.search(text)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_texts_name_the_thing_first(folder: str) -> None:
    paths = [path for path in sorted((ROOT / folder).rglob("*.py")) if path != Path(__file__)]
    assert len(paths) >= 5
    found = {str(path.relative_to(ROOT)): faults(path.read_text("utf-8")) for path in paths}
    assert {name: texts for name, texts in found.items() if texts} == {}


def test_the_floor_is_looked_for() -> None:
    """The search itself: each kind of text in which an opening or an idiom can stand."""
    assert faults('"""Which samples train."""') == ["Which samples train."]
    assert faults('class A:\n    """Its like."""') == ["Its like."]
    assert faults('X = 1\n"""Where it stands."""') == ["Where it stands."]
    assert faults('class A:\n    x: int\n    """How many."""') == ["How many."]
    assert faults('raise ValueError("start anew")') == ["start anew"]
    assert faults('def f():\n    """A tensor, as it is."""') == ["A tensor, as it is."]
    assert faults('def f():\n    """Inside, x is y."""') == ["Inside, x is y."]
    assert faults('def _f():\n    """What is private."""') == []
    assert faults('def f():\n    """Thatch on the roof, The same as before."""') == []
