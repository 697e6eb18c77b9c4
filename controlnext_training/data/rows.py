"""Rows of Parquet files and of folders saved by the library `datasets`, with the pictures in their columns.

The library converts a Parquet file into an Arrow file once, stored beside the index of files; Arrow files are mapped
into memory, so that any row is found without reading the others, in every thread and process. Nothing is downloaded:
the files are on this machine, from `hf download`, `git clone` or `save_to_disk`.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib
import json
import os
import posixpath
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .samples import Broken, first_line
from .tree import Blob, Tree, in_order, open_regular

PACKAGE = "datasets"
PARQUET, ARROW = ".parquet", ".arrow"
ROW_SUFFIXES = (PARQUET, ARROW)
AT_ONCE = 1000
"""Number of rows examined together, without reading their pictures."""
RESULTS = "cache-"
"""Prefix of Arrow files that the library leaves beside the data: results of calls."""
TRAIN = frozenset(("train", "training"))
HELD_OUT = frozenset(("test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev"))
"""Words in names of files or folders that mark a held-out split. Source: the library's documentation, "Repository
structure"."""
POINTER = b"version https://git-lfs"
"""First bytes of a git-lfs pointer, whose file has not been fetched."""


class RowsError(ValueError):
    """Error for a table that cannot be read. The message is the reason without the file's name."""


class Rows(Protocol):
    """Rows of one Arrow file, numbered from 0."""

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns."""

    def __len__(self) -> int: ...

    def values(self, column: str, start: int, stop: int) -> list[Any]:
        """Values of some rows: True where the file holds a picture; else a text, a list of texts or None."""

    def picture(self, column: str, row: int) -> bytes:
        """Bytes of a picture's file."""


@dataclass(frozen=True, slots=True)
class Cell(Blob):
    """Picture in one column of one row; `path` is the user's Parquet or Arrow file."""

    arrow: str = ""
    """Path of the Arrow file that is read."""
    row: int = 0
    """Index of the row in that file, from 0."""
    column: str = ""

    @property
    def label(self) -> str:
        """Name for messages."""
        return f"{self.path}: {posixpath.basename(self.name)}"

    @property
    def place(self) -> str:
        """Position of the bytes, see `Blob.place`."""
        return posixpath.basename(self.name)

    def read(self) -> bytes:
        """Bytes of the picture's file. Raises OSError."""
        try:
            return open_rows(self.arrow).picture(self.column, self.row)
        except Exception as error:  # on a damaged file the library raises errors of many types
            raise OSError(f"row of {self.arrow} cannot be read ({first_line(error)})") from error


class ArrowRows:
    """Rows of an Arrow file, through `datasets`."""

    def __init__(self, path: str) -> None:
        held = require_datasets().Dataset.from_file(path)
        self._held = held.with_format("arrow")
        self.columns: list[str] = held.column_names

    def __len__(self) -> int:
        return len(self._held)

    def values(self, column: str, start: int, stop: int) -> list[Any]:
        """Implementation of `Rows.values`."""
        chunks = self._held[start:stop].column(column).chunks
        return [value for chunk in chunks for value in _values(chunk)]

    def picture(self, column: str, row: int) -> bytes:
        """Implementation of `Rows.picture`."""
        value = self._held[row].column(column)[0].as_py()
        return value["bytes"] if isinstance(value, dict) else value


def _values(chunk: Any) -> list[Any]:
    """Values of an Arrow array in the form of `Rows.values`.

    Pictures are binary, or {bytes, path} with bytes or a path only.
    """
    kind = str(chunk.type)
    if kind in ("binary", "large_binary"):
        return [there or None for there in chunk.is_valid().to_pylist()]
    if not kind.startswith("struct<") or "bytes" not in {field.name for field in chunk.type}:
        return chunk.to_pylist()
    parts = dict(zip((field.name for field in chunk.type), chunk.flatten(), strict=True))
    paths = parts["path"].to_pylist() if "path" in parts else [None] * len(chunk)
    return [there or path for there, path in zip(parts["bytes"].is_valid().to_pylist(), paths, strict=True)]


def open_rows(path: str) -> Rows:
    """Rows of an Arrow file; each process keeps the most recent files open."""
    status = os.stat(path)
    return _kept(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _kept(path: str, size: int, changed: int) -> Rows:
    """size, changed: of the file, so that a rewritten file is opened again."""
    return ArrowRows(path)


def require_datasets() -> Any:
    """Import the library `datasets`. Raises RowsError with the pip command where it is not installed."""
    try:
        return importlib.import_module(PACKAGE)
    except ModuleNotFoundError as error:
        if error.name != PACKAGE:
            raise
        remedy = f'Type "{sys.executable}" -m pip install {PACKAGE}'
        raise RowsError(f"needs the package {PACKAGE}, which is not installed. {remedy}") from error


def row_files(tree: Tree) -> list[Blob]:
    """Parquet and Arrow files that hold training data; those of other splits go to `tree.broken`."""
    found = [tree.blobs[name] for name in in_order(tree.blobs) if tree.blobs[name].suffix in ROW_SUFFIXES]
    kept = [blob for blob in found if blob.suffix == PARQUET or _is_data(tree, blob)]
    if not any(_words(blob) & TRAIN for blob in kept):
        return kept
    training = [blob for blob in kept if _words(blob) & TRAIN or not _words(blob) & HELD_OUT]
    why = "is of a split that does not train. Name it in validation_data to validate on it"
    tree.broken += [Broken(blob.label, why) for blob in kept if blob not in training]
    return training


def _words(blob: Blob) -> set[str]:
    """Words of a file's name and of its folders in the source."""
    return set(re.split(r"[^a-z]+", blob.name.lower()))


def _is_data(tree: Tree, blob: Blob) -> bool:
    """True: an Arrow file listed in its folder's state.json or, without that file, not a cached result.

    False: another.
    """
    folder, name = posixpath.split(blob.name)
    listed = _listed(tree.blobs.get(posixpath.join(folder, "state.json")))
    return not name.startswith(RESULTS) if listed is None else name in listed


@functools.lru_cache(maxsize=1)
def _listed(state: Blob | None) -> Collection[str] | None:
    """Names of the files of a saved dataset; None where they are not listed."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return {part["filename"] for part in json.loads(state.read())["_data_files"]} if state else None
    return None


def read_rows(tree: Tree, table: Blob, columns: Collection[str]) -> Iterator[dict[str, Any]]:
    """Rows of a file, reduced to those columns; pictures are Cells. Raises RowsError and the errors of `tree.check`."""
    number = 0
    for arrow in _arrow_files(tree, table):
        with _reading():
            held = open_rows(arrow)
        known = [name for name in held.columns if name in columns]
        for start in range(0, len(held), AT_ONCE):
            tree.check()
            stop = min(start + AT_ONCE, len(held))
            with _reading():
                values = [held.values(name, start, stop) for name in known]
            for row in range(start, stop):
                number += 1
                found = {name: column[row - start] for name, column in zip(known, values, strict=True)}
                yield {
                    name: Cell(table.path, f"{table.name}/row {number} {name}", 0, 0, arrow, row, name)
                    if value is True
                    else value
                    for name, value in found.items()
                }


def _arrow_files(tree: Tree, table: Blob) -> list[str]:
    """Arrow files with the rows of a file; a Parquet file is converted unless that was done before."""
    if table.size >= 0:
        raise RowsError("is inside a tar, where its rows cannot be read. Unpack it")
    with _reading():
        with open_regular(table.path) as file:
            is_pointer = file.read(len(POINTER)) == POINTER
        if is_pointer:
            raise RowsError("is a pointer of git-lfs in place of the file. Type git lfs pull")
        path = str(table.path.resolve())
        if table.suffix == ARROW:
            return [path]
        folder = None if tree.arrow is None else str(tree.arrow)
        rows = require_datasets().Dataset.from_parquet(glob.escape(path), cache_dir=folder)
        return [part["filename"] for part in rows.cache_files]


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Context in which errors of the library become RowsError."""
    try:
        yield
    except RowsError:
        raise
    except Exception as error:  # on damaged bytes it raises errors of many types
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise RowsError(f"cannot be read ({first_line(cause)}). Download or save it again") from error
