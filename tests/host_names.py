"""Names of the host that a file imports, reads or calls, looked up in the host that is imported here.

The source is read as a syntax tree and followed with the real objects: imports, attributes, annotated parameters, what
a constructor gives. A name that the code asks for first (`hasattr`, `getattr` with a default, an import whose
ImportError is caught) may be missing.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NAME = "comfyui_controlnext"
HOST = ("comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "node_helpers", "nodes", "utils")
FOLDERS = ("controlnext_core", "nodes", "controlnext_training", "tools", "benchmarks")
FILES = [path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
OF_ITS_OWN_TYPE = ("clone", "copy")
"""Methods that give what they are called on."""
UNKNOWN = object()
IN_FUNCTION = "<function>"


@dataclass(frozen=True)
class Instance:
    """Some object of this class; above: the attributes of the classes after this one alone count, as in `super()`."""

    cls: type
    above: type | None = None

    def line(self) -> list[type]:
        mro = list(self.cls.__mro__)
        return mro[mro.index(self.above) + 1 :] if self.above else mro


def of_main(name: str) -> types.ModuleType:
    """A module of the folder `utils`, which `comfy/utils.py` hides once the host's nodes are there."""
    path = Path(sys.modules["comfy.sd"].__file__ or "").parents[1].joinpath(*name.split("."))
    spec = importlib.util.spec_from_file_location(name, path.with_suffix(".py"))
    if spec is None or spec.loader is None or not path.with_suffix(".py").is_file():
        raise ImportError(f"{path}.py is not there")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def uses_host(path: str) -> bool:
    """True means that a file imports anything of the host."""
    imports = (
        n for n in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))) if isinstance(n, ast.ImportFrom | ast.Import)
    )
    names = (
        m
        for n in imports
        for m in ([n.module or ""] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names])
        if not getattr(n, "level", 0)
    )
    return any(name.partition(".")[0] in HOST for name in names)


USING = [path for path in FILES if uses_host(path)]


def of_host(thing: Any) -> bool:
    """True means that a module, class or function is the host's."""
    name = thing.__name__ if isinstance(thing, types.ModuleType) else getattr(thing, "__module__", None) or ""
    return name.partition(".")[0] in HOST


@cache
def own_attributes(cls: type) -> frozenset[str]:
    """Attributes that a class declares and that its methods set on `self`."""
    names = {*vars(cls), *vars(cls).get("__annotations__", {})}
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return frozenset(names)
    return frozenset(names | set(re.findall(r"\bself\.(\w+)", source)))


def instance_of(annotation: Any) -> Any:
    """An Instance of the class that an annotation names, `| None` aside; UNKNOWN for what is no class."""
    if isinstance(annotation, types.UnionType):
        classes = [one for one in typing.get_args(annotation) if one is not type(None)]
        annotation = classes[0] if len(classes) == 1 else UNKNOWN
    return Instance(annotation) if inspect.isclass(annotation) else UNKNOWN


@dataclass
class Reader(ast.NodeVisitor):
    """Follows the names of one file. known: what they mean here."""

    known: dict[str, Any]
    optional: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)
    """Names of the host that the code asks for before it uses them."""
    imported: set[str] = field(default_factory=set)
    """Names in this file of the things that it imports from the host."""
    seen: int = 0
    """Count of the host's names that were found to be there."""

    def fail(self, node: ast.AST, what: str) -> Any:
        problem = f"line {getattr(node, 'lineno', 0)}: {what}"
        if problem not in self.problems:
            self.problems.append(problem)
        return UNKNOWN

    # -- what an expression is ----------------------------------------------------------------------------------

    def value(self, node: ast.AST) -> Any:
        """The object, an Instance, or UNKNOWN."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id, UNKNOWN)
        if isinstance(node, ast.Attribute):
            return self.attribute(node, self.value(node.value), node.attr)
        if isinstance(node, ast.Call):
            return self.result(node)
        if isinstance(node, ast.Constant) and node.value is None:
            return None
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            sides = [self.value(side) for side in (node.left, node.right)]
            classes = [side for side in sides if isinstance(side, type)]
            return classes[0] if len(classes) == 1 and None in sides else UNKNOWN
        return UNKNOWN

    def attribute(self, node: ast.AST, owner: Any, name: str) -> Any:
        if owner is UNKNOWN or owner is None or name in self.optional:
            return UNKNOWN
        if isinstance(owner, Instance):
            return self.of_instance(node, owner, name)
        if not (of_host(owner) or isinstance(owner, type)):
            return getattr(owner, name, UNKNOWN) if isinstance(owner, types.ModuleType) else UNKNOWN
        if not hasattr(owner, name):
            return self.fail(node, f"{owner.__name__} has no {name}") if of_host(owner) else UNKNOWN
        self.seen += of_host(owner)
        return getattr(owner, name)

    def of_instance(self, node: ast.AST, owner: Instance, name: str) -> Any:
        if not any(of_host(cls) for cls in owner.line()):
            return UNKNOWN
        for cls in owner.line():
            if name in own_attributes(cls):
                self.seen += of_host(cls)
                declared = typing.cast("dict[str, Any]", vars(cls)).get(name, UNKNOWN)
                return (cls, owner, declared) if isinstance(declared, (types.FunctionType, classmethod)) else UNKNOWN
        if any("__getattr__" in vars(cls) for cls in owner.line()):
            return UNKNOWN
        return self.fail(node, f"{owner.cls.__name__} has no {name}")

    def result(self, node: ast.Call) -> Any:
        """Result of a call; checks that a function or class of the host takes these arguments."""
        called = self.value(node.func)
        if called is builtins.super:
            around = self.known.get("__class__")
            return Instance(around, around) if isinstance(around, type) else UNKNOWN
        if isinstance(called, tuple):  # a method
            cls, owner, method = called
            self.bind(node, method, cls, bound=True)
            return Instance(owner.cls) if node.func.attr in OF_ITS_OWN_TYPE else UNKNOWN  # type: ignore[attr-defined]
        if isinstance(called, (type, types.FunctionType, types.MethodType)):
            self.bind(node, called, called, bound=False)
        return Instance(called) if isinstance(called, type) else UNKNOWN

    def bind(self, node: ast.Call, function: Any, home: Any, bound: bool) -> None:
        if not of_host(home):
            return
        function = getattr(function, "__func__", function)
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            return
        given: list[Any] = [UNKNOWN] * bound + [UNKNOWN for a in node.args if not isinstance(a, ast.Starred)]
        named = {k.arg: UNKNOWN for k in node.keywords if k.arg is not None}
        spread = len(given) < len(node.args) + bound or len(named) < len(node.keywords)
        try:
            (signature.bind_partial if spread else signature.bind)(*given, **named)
        except TypeError as error:
            self.fail(node, f"{function.__qualname__}{signature}: {error}")

    # -- statements ----------------------------------------------------------------------------------------------

    def visit_Import(self, node: ast.Import) -> None:  # noqa: N802
        for alias in node.names:
            if alias.name.partition(".")[0] in HOST:
                module = self.module(node, alias.name)
                top = alias.name.partition(".")[0]
                self.imported.add(alias.asname or top)
                self.known[alias.asname or top] = module if alias.asname else sys.modules.get(top, UNKNOWN)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:  # noqa: N802
        if node.level or (node.module or "").partition(".")[0] not in HOST:
            return
        module = self.module(node, node.module or "")
        for alias in node.names:
            found = self.attribute(node, module, alias.name)
            self.known[alias.asname or alias.name] = found
            self.imported.add(alias.asname or alias.name)

    def module(self, node: ast.AST, name: str) -> Any:
        try:
            self.seen += 1
            return of_main(name) if name.startswith("utils.") else importlib.import_module(name)
        except ImportError as error:
            return self.fail(node, f"{name}: {error}")

    def visit_Try(self, node: ast.Try) -> None:  # noqa: N802
        if any("ImportError" in ast.dump(h.type) for h in node.handlers if h.type):
            for part in node.body:
                if isinstance(part, ast.ImportFrom):
                    self.optional |= {alias.name for alias in part.names}
                    self.asked |= {alias.name for alias in part.names}
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:  # noqa: N802
        around = self.known.get("__class__")
        cls = vars(around).get(node.name) if isinstance(around, type) else self.known.get(node.name)
        known = isinstance(cls, type) and not self.known.get(IN_FUNCTION)  # where one of that name may be another
        inner = {"__class__": cls if known else UNKNOWN, "self": Instance(cls) if known else UNKNOWN}
        self.within({**self.known, **inner}, [*node.bases, *node.body])

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:  # noqa: N802
        inner = {**self.known, IN_FUNCTION: True}
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            if argument.arg != "self":
                found = instance_of(self.value(argument.annotation)) if argument.annotation else UNKNOWN
                inner[argument.arg] = found
                if isinstance(found, Instance) and of_host(found.cls):
                    self.imported.add(argument.arg)
        self.within(inner, [*node.decorator_list, *node.args.defaults, *node.body])

    def within(self, known: dict[str, Any], nodes: list[Any]) -> None:
        outer, self.known = self.known, known
        for part in nodes:
            self.visit(part)
        self.known = outer

    def visit_Assert(self, node: ast.Assert) -> None:  # noqa: N802
        self.visit(node.test)
        if isinstance(node.test, ast.Call) and self.value(node.test.func) is isinstance:
            thing, kind = node.test.args
            if isinstance(thing, ast.Name):
                self.known[thing.id] = instance_of(self.value(kind))

    def visit_Assign(self, node: ast.Assign) -> None:  # noqa: N802
        self.visit(node.value)
        found = self.value(node.value)
        for target in node.targets:
            self.visit(target)
            if isinstance(target, ast.Name):
                self.known[target.id] = found if isinstance(found, Instance) or of_host(found) else UNKNOWN

    def visit_Call(self, node: ast.Call) -> None:  # noqa: N802
        self.result(node)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:  # noqa: N802
        self.value(node)
        self.generic_visit(node)


def asked_first(tree: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    """(owner, name) of each `hasattr(owner, "name")` and `getattr(owner, "name", default)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) >= 2:
            asks = node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)
            if asks and isinstance(node.args[1], ast.Constant):
                yield node.args[0], str(node.args[1].value)


def set_here(tree: ast.AST) -> Iterator[str]:
    """Names of attributes that the source assigns: it may read them again where the host does not know them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def read(source: str, known: dict[str, Any]) -> Reader:
    tree = ast.parse(source)
    reader = Reader({**vars(builtins), **known})
    questions = list(asked_first(tree))
    reader.optional |= {name for _, name in questions} | set(set_here(tree))
    reader.visit(tree)
    for owner, name in questions:
        root = next(part for part in ast.walk(owner) if isinstance(part, (ast.Name, ast.Constant)))
        if isinstance(root, ast.Name) and root.id in reader.imported:
            reader.asked.add(name)
    return reader


@cache
def read_file(path: str) -> Reader:
    known: dict[str, Any] = {}
    if not path.startswith("benchmarks"):
        known = vars(importlib.import_module(f"{NAME}.{path.removesuffix('.py').replace('/', '.')}"))
    return read((ROOT / path).read_text("utf-8"), known)


def host_classes(paths: list[str]) -> list[type]:
    """Classes of our own that stand on a class of the host, from these files and what imports them."""
    for path in paths:
        read_file(path)
    ours = [
        module for name, module in list(sys.modules.items()) if name.startswith(f"{NAME}.") and ".tests" not in name
    ]
    found = {value for module in ours for value in vars(module).values() if inspect.isclass(value)}
    mine = [
        cls for cls in found if cls.__module__.startswith(f"{NAME}.") and any(of_host(base) for base in cls.__mro__)
    ]
    return sorted(mine, key=lambda cls: (cls.__module__, cls.__qualname__))
