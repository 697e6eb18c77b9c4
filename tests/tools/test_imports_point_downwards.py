"""Direction of imports, and imports without effects. This file is the only place that states the direction."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAME = "comfyui_controlnext"
HOST = frozenset({"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "node_helpers"})
OURS = ("models", "controlnext_core", "nodes", "controlnext_training", "tools", "tests")


@dataclass(frozen=True)
class Layer:
    """Imports allowed for the files under one path, besides the standard library; the longest path applies."""

    path: str
    others: frozenset[str] = frozenset()
    """Top-level names of other packages."""
    ours: tuple[str, ...] = ()
    """Modules of the pack, by the start of their path."""
    inside_functions: frozenset[str] = frozenset()
    """Modules that may be imported when they are used, never at the top of a file."""


MATHS = frozenset({"torch", "einops"})
PICTURES = frozenset({"cv2", "PIL"})
CORE = ("controlnext_core", "models")
TRAINING = frozenset({"filelock", "numpy", "safetensors"}) | MATHS
LAYERS = (
    Layer("_alias.py"),
    Layer("run.py", ours=("_alias", "tools")),
    Layer("__init__.py", ours=("nodes", "controlnext_training", "controlnext_core.comfy_adapter")),
    Layer("models", MATHS, ("models",)),
    Layer("controlnext_core", MATHS, CORE),
    Layer("controlnext_core/checkpoint.py", MATHS | {"safetensors"}, CORE),
    Layer("controlnext_core/fidelity.py", MATHS | {"numpy"}, CORE, PICTURES | {"scipy"}),
    Layer("controlnext_core/hints", MATHS | {"numpy"}, CORE, PICTURES),
    Layer("controlnext_core/picturebook", MATHS | {"numpy"}, CORE, PICTURES),
    Layer("controlnext_core/comfy_adapter", MATHS | HOST, CORE, PICTURES),
    Layer("nodes", HOST | {"torch"}, ("controlnext_core", "nodes")),  # torch: types of what goes through
    Layer(
        "controlnext_training",
        TRAINING,
        (*CORE, "controlnext_training"),
        PICTURES | {"av", "matplotlib", "psutil", "tomli"},
    ),
    Layer("controlnext_training/base_model", TRAINING | HOST, (*CORE, "controlnext_training"), PICTURES),
    Layer("controlnext_training/queue_training.py", frozenset({"aiohttp"})),
    Layer("controlnext_training/nodes", TRAINING | HOST, (*CORE, "controlnext_training"), PICTURES),
)
ADAPTER = "controlnext_core.comfy_adapter"
MAY_USE_THE_ADAPTER = (
    "controlnext_core/comfy_adapter",
    "nodes",
    "__init__.py",
    "controlnext_training/base_model",
    "controlnext_training/nodes",
    "controlnext_training/__init__.py",
)


def under(path: str, start: str) -> bool:
    return path == start or path.startswith(f"{start}/")


def files() -> list[str]:
    """Source files covered by the table, relative to the root."""
    found = [ROOT / name for name in ("_alias.py", "run.py", "__init__.py")]
    for folder in OURS[:4]:
        found += sorted((ROOT / folder).rglob("*.py"))
    return [path.relative_to(ROOT).as_posix() for path in found]


def runs_later(part: ast.AST) -> bool:
    """True: an import in this part of a file does not run when the file is imported. False: it does."""
    if isinstance(part, ast.If):
        return isinstance(part.test, ast.Name) and part.test.id == "TYPE_CHECKING"
    return isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))


def imports(path: str, source: str) -> Iterator[tuple[str, bool]]:
    """Imports as (module, True at the top of the file); the pack's as `comfyui_controlnext.a.b`, however written."""
    tree = ast.parse(source)
    inside = {node for part in ast.walk(tree) if runs_later(part) for node in ast.walk(part)}
    package = [NAME, *path.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in inside
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names if module.startswith(NAME) else node.names[:1]:
                yield (f"{module}.{alias.name}" if module.startswith(NAME) else module), node not in inside


def violations(path: str, source: str) -> list[str]:
    """Imports of a file that are not allowed."""
    layer = max((layer for layer in LAYERS if under(path, layer.path)), key=lambda layer: len(layer.path))
    found = []
    for module, at_top in imports(path, source):
        top = module.split(".")[0]
        if top == NAME:
            inner = module.removeprefix(f"{NAME}.").replace(".", "/")
            allowed = any(under(inner, start.replace(".", "/")) for start in layer.ours)
            adapter = under(inner, ADAPTER.replace(".", "/"))
            if not allowed or (adapter and not any(under(path, start) for start in MAY_USE_THE_ADAPTER)):
                found.append(module)
        elif top not in sys.stdlib_module_names and top not in layer.others:
            if top not in layer.inside_functions or at_top:
                found.append(module)
    return found


@pytest.mark.parametrize("path", files())
def test_imports_point_downwards(path: str) -> None:
    assert violations(path, (ROOT / path).read_text("utf-8")) == []


@pytest.mark.parametrize("path", [p for p in files() if "/" in p])
def test_inside_the_pack_imports_are_relative(path: str) -> None:
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    absolute = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
    absolute += [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
    entry_point = path in ("controlnext_training/__init__.py", "controlnext_training/train.py")
    assert entry_point or not [name for name in absolute if name.split(".")[0] in (NAME, *OURS)]


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("models/x.py", "import comfy.ops", ["comfy.ops"]),
        ("models/x.py", "from ..controlnext_core import specs", [f"{NAME}.controlnext_core.specs"]),
        ("models/x.py", "from .layers import ResBlock\nimport math, torch", []),
        ("controlnext_core/x.py", "def f():\n    import comfy", ["comfy"]),
        ("controlnext_core/x.py", "from . import comfy_adapter", [f"{NAME}.{ADAPTER}"]),
        ("controlnext_core/x.py", "from .comfy_adapter.weights import f", [f"{NAME}.{ADAPTER}.weights.f"]),
        ("controlnext_core/x.py", "from safetensors import safe_open", ["safetensors"]),
        ("controlnext_core/checkpoint.py", "from safetensors import safe_open", []),
        ("controlnext_core/hints/x.py", "import cv2", ["cv2"]),
        ("controlnext_core/hints/x.py", "import numpy\ndef f():\n    import cv2", []),
        ("controlnext_core/comfy_adapter/x.py", "import comfy.ops\nfrom ..specs import SPECS", []),
        ("controlnext_core/comfy_adapter/x.py", "from ...nodes import loaders", [f"{NAME}.nodes.loaders"]),
        ("nodes/x.py", "from ..models.controlnext import ControlNeXt", [f"{NAME}.models.controlnext.ControlNeXt"]),
        ("nodes/x.py", "import cv2, diffusers", ["cv2", "diffusers"]),
        ("controlnext_training/x.py", "import comfy", ["comfy"]),
        ("controlnext_training/x.py", f"from ..{ADAPTER} import control", [f"{NAME}.{ADAPTER}.control"]),
        ("controlnext_training/base_model/x.py", f"from ..{ADAPTER} import control\nimport comfy.sd", []),
        ("run.py", "import torch", ["torch"]),
    ],
)
def test_the_table_refuses_what_it_should(path: str, source: str, found: list[str]) -> None:
    assert violations(path, source) == found


IMPORT = """
import compileall, contextlib, importlib.util, io, json, logging, runpy, socket, sys, time, warnings
from pathlib import Path
root, host = Path({root!r}), {host!r}
runpy.run_path(str(root / "_alias.py"))
import torch, safetensors.torch, einops, numpy
if host:
    from comfyui_controlnext.tools.launcher import declare_missing_torchvision_ops
    declare_missing_torchvision_ops()
    sys.path.insert(0, host)
    from comfy.cli_args import args
    args.cpu, args.base_directory = True, {base!r}
    import comfy.sd, comfy.samplers, comfy.controlnet, comfy.context_windows, folder_paths, nodes
    import comfy_api.latest
def refuse(*args, **kwargs):
    raise AssertionError("the network was used")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.pycache_prefix = {bytecode!r}
for folder in ("controlnext_core", "controlnext_training", "models", "nodes"):
    compileall.compile_dir(root / folder, quiet=2)
before, handlers, level = set(sys.modules), list(logging.root.handlers), logging.root.level
threads, filters, path = torch.get_num_threads(), list(warnings.filters), list(sys.path)
out, err, start = io.StringIO(), io.StringIO(), time.process_time()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    spec = importlib.util.spec_from_file_location("a_pack", root / "__init__.py")
    spec.submodule_search_locations = [str(root)]
    pack = sys.modules["a_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
seconds = time.process_time() - start
new = sorted(name for name in set(sys.modules) - before)
print("RESULT" + json.dumps({{
    "nodes": sorted(pack.NODE_CLASS_MAPPINGS), "seconds": seconds, "new": new, "out": out.getvalue(),
    "err": err.getvalue(), "quiet": (handlers, level) == (logging.root.handlers, logging.root.level),
    "same": (threads, filters, path) == (torch.get_num_threads(), list(warnings.filters), sys.path),
}}))
"""


def import_pack(host: str, base: Path) -> dict[str, object]:
    """Import the pack in a separate process, as the host does, after the host's own imports.

    Its sources are compiled before that, as those of every start of a host but the first.
    """
    base.mkdir()
    code = IMPORT.format(root=str(ROOT), host=host, base=str(base), bytecode=str(base.parent / "bytecode"))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=environment, cwd=base, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return json.loads(line.removeprefix("RESULT"))


def assert_nothing_was_done(result: dict[str, object], base: Path) -> None:
    assert result["out"] == result["err"] == ""
    assert result["quiet"] and result["same"], "logging, threads, warnings or sys.path were changed"
    assert isinstance(result["new"], list)
    heavy = {"cv2", "PIL", "diffusers", "transformers", "scipy", "skimage", "requests", "urllib.request"}
    assert not [name for name in result["new"] if name in heavy or name.split(".")[0] in heavy]
    assert [path.name for path in base.rglob("*") if path.is_file()] == []


def test_without_the_host_the_pack_imports_nothing(tmp_path: Path) -> None:
    result = import_pack("", tmp_path / "base")
    assert_nothing_was_done(result, tmp_path / "base")
    assert result["nodes"] == []
    assert isinstance(result["new"], list) and not [name for name in result["new"] if name.startswith(f"{NAME}.")]


@pytest.mark.comfy
def test_in_the_host_the_pack_imports_quietly_and_fast(host: Path, tmp_path: Path) -> None:
    result = import_pack(str(host), tmp_path / "base")
    assert_nothing_was_done(result, tmp_path / "base")
    assert isinstance(result["nodes"], list) and "ControlNeXtLoader" in result["nodes"]
    assert isinstance(result["seconds"], float) and result["seconds"] < 0.5  # of CPU; about 0.2 on a quiet machine
