"""Keys of the host's `transformer_options`: every key that is read is declared, every declared key is used."""

from __future__ import annotations

import ast
from pathlib import Path

from comfyui_controlnext.tools.environment import ROOT

ADAPTER = ROOT / "controlnext_core" / "comfy_adapter"
DECLARED = ADAPTER / "bases" / "forward_options.py"
HOLDERS = {"transformer_options", "options"}
"""Names of variables that hold a forward's options; `self.options` are those of a control, and not included."""


def declared() -> set[str]:
    (table,) = (
        n for n in ast.parse(DECLARED.read_text("utf-8")).body if getattr(n, "name", "") == "TransformerOptions"
    )
    assert isinstance(table, ast.ClassDef)
    return {
        line.target.id for line in table.body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }


def keys(source: str) -> set[str]:
    """Keys of the options in `options[key]`, `options.get(key)` and `options.pop(key)`, constants looked up."""
    tree = ast.parse(source)
    constants = {
        node.target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        holder, key = None, None
        if isinstance(node, ast.Subscript):
            holder, key = node.value, node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
            holder, key = node.func.value, node.args[0]
        if not isinstance(holder, ast.Name) or holder.id not in HOLDERS:
            continue
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            found.add(key.value)
        elif isinstance(key, ast.Name) and key.id in constants:
            found.add(str(constants[key.id]))
    return found


def used() -> dict[str, set[str]]:
    paths: list[Path] = [*(ADAPTER / "bases").glob("*.py"), *(ADAPTER / "sampling").glob("*.py")]
    return {path.name: keys(path.read_text("utf-8")) for path in sorted(paths)}


def test_every_key_that_is_read_is_declared() -> None:
    undeclared = {name: sorted(found - declared()) for name, found in used().items()}
    assert {name: found for name, found in undeclared.items() if found} == {}


def test_every_declared_key_is_used() -> None:
    trainer = {"optimized_attention_override"}  # written by controlnext_training/base_model/controlled.py alone
    assert declared() - set().union(*used().values()) == trainer


def test_keys_are_found() -> None:
    lines = ('KEY: Final = "ours"', 'options["a"]', 'transformer_options.get("b")', 'options.pop("c")', "options[KEY]")
    source = "\n".join((*lines, 'self.options["d"]'))
    assert keys(source) == {"a", "b", "c", "ours"}
