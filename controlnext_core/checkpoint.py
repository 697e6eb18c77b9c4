"""Weight files, read and written: header peek, safe loading, atomic saving with metadata.

Nothing in a file is executed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from . import safetensors_file, torch_file
from .encodable import cut, escaped
from .stored import KindError, StoredTensors, Table

TORCH_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")
SUFFIXES = (".safetensors", ".sft", *TORCH_SUFFIXES)
MAX_LISTED = 5


class CheckpointError(ValueError):
    """A weight file that cannot be used. The message names the file, what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Header:
    """Header of a file: names, shapes and metadata, read before any weight is used."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str] = field(default_factory=dict)


def peek(path: str | Path) -> Header:
    """Names, shapes, dtypes and metadata of a weight file.

    Raises CheckpointError for a path that is no file, an empty or truncated file, a file of another kind, and a pickle
    that holds anything but tensors.
    """
    table = _table(Path(path))
    shapes = {name: entry.shape for name, entry in table.entries.items()}
    formats = {name: entry.format for name, entry in table.entries.items()}
    return Header(table.path, shapes, formats, table.metadata)


def load(path: str | Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a file on the CPU, in memory of their own; names: read only these, None means all.

    Raises CheckpointError as `peek` does, for tensors that claim more bytes than the file has, and for a missing name.
    """
    table = _table(Path(path))
    wanted = _known(table, table.entries if names is None else names)
    with _readable(table.path):
        return StoredTensors(table, wanted).read_all()


def open_tensors(path: str | Path, names: Mapping[str, str] | None = None) -> Mapping[str, Tensor]:
    """Tensors of a file as `load` gives them, each read at the time of access: no more than one need be in memory.

    names: name used for access -> name in the file. Raises as `load`, also where the file has changed since.
    """
    return _OpenTensors(_table(Path(path)), names)


class _OpenTensors(Mapping[str, Tensor]):
    def __init__(self, table: Table, names: Mapping[str, str] | None) -> None:
        self._names = {name: name for name in table.entries} if names is None else dict(names)
        self._path = table.path
        wanted = _known(table, self._names.values())
        self._seen: dict[str, Tensor] = {}
        with _readable(self._path):
            self._stored = StoredTensors(table, wanted)

    def look(self, name: str) -> Tensor:
        """Tensor that will be accessed once more: it is read once and cached until then."""
        self._seen[name] = self[name]
        return self._seen[name]

    def __getitem__(self, name: str) -> Tensor:
        if name in self._seen:
            return self._seen.pop(name)
        stored = self._names[name]
        with _readable(self._path):
            return self._stored[stored]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._stored.shape(self._names[name])


def _known(table: Table, names: Iterable[str]) -> list[str]:
    """List of the names. Raises CheckpointError for one that the file does not hold."""
    wanted = list(names)
    if lost := [name for name in wanted if name not in table.entries]:
        raise CheckpointError(f"{table.path}: {listed('missing', lost)}. It was changed meanwhile: load it again.")
    return wanted


def look_at(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Tensor of a mapping that will be accessed once more afterwards; cached until then where the mapping reads from
    disk.
    """
    return tensors.look(name) if isinstance(tensors, _OpenTensors) else tensors[name]


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Shape of a tensor of a mapping, not read where the mapping reads from disk."""
    return tensors.shape(name) if isinstance(tensors, _OpenTensors) else tuple(tensors[name].shape)


def load_strict(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load the weights of a module built on `meta`; names must match exactly.

    The tensors become the parameters (no copy). Raises CheckpointError naming the first missing, unexpected and
    misshapen keys; the module is then unchanged.
    """
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    problems = compare_shapes(wanted, {name: tuple(t.shape) for name, t in tensors.items()})
    if problems:
        raise CheckpointError(f"{source}: {problems}. Nothing was loaded.")
    module.load_state_dict(dict(tensors), strict=True, assign=True)


def compare_shapes(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """Differences between two sets of names and shapes in words; empty where there are none."""
    parts = [
        listed("missing", sorted(wanted.keys() - found.keys())),
        listed("unexpected", sorted(found.keys() - wanted.keys())),
        listed(
            "of another shape",
            [
                f"{name} {list(found[name])} (expected {list(wanted[name])})"
                for name in sorted(wanted.keys() & found.keys())
                if wanted[name] != found[name]
            ],
        ),
    ]
    return "; ".join(part for part in parts if part)


def listed(what: str, names: list[str]) -> str:
    """List of names with their count, '3 missing: a, b, c', cut after the first few; empty for no names."""
    if not names:
        return ""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"{len(names)} {what}: {', '.join(map(cut, names[:MAX_LISTED]))}{more}"


def save(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file completely or not at all, then read it back. Returns the path.

    An existing file of that name stays unchanged until the new one is complete. Raises CheckpointError on a full disk
    or an unwritable folder.
    """
    path = Path(path)
    told = {escaped(key): escaped(value) for key, value in metadata.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # as for any new file; safetensors makes its files private
        save_file({name: t.contiguous() for name, t in tensors.items()}, str(temporary), told)
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: could not be saved ({error}). Free some disk space or choose another folder; "
            "nothing that was there has changed."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # no folder, no temporary file
            temporary.unlink(missing_ok=True)
    written = peek(path)
    if written.shapes.keys() != dict(tensors).keys():
        raise CheckpointError(f"{path}: the saved file does not hold what was saved. Check the disk, save again.")
    return path


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Content hash over names, dtypes, shapes and bytes: the identity of a set of weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _existing_file(path: Path) -> Path:
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, not a weight file. Choose a {' or '.join(SUFFIXES[:1])} file.")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Put it there, or choose another.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty (0 bytes): the download did not finish. Download it again.")
    if path.suffix.lower() not in SUFFIXES:
        raise CheckpointError(f"{path}: not a weight file; one of {', '.join(SUFFIXES)} is needed.")
    return path


def _table(path: Path) -> Table:
    """The tensors of a file by name. Raises CheckpointError."""
    path = _existing_file(path)
    with _readable(path):
        return (torch_file if path.suffix.lower() in TORCH_SUFFIXES else safetensors_file).read_table(path)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn every error in reading a file into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except KindError as error:
        raise CheckpointError(f"{path}: {error}. Choose another file.") from error
    except (torch_file.CodeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path}: holds more than tensors, or is not a torch file, and was not opened ({_first_line(error)}). "
            "Files of this kind can run code on your machine: get the .safetensors version, or a file saved "
            "with plain tensors only."
        ) from error
    except Exception as error:  # on damaged bytes the readers of pickles and archives raise exceptions of any kind
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be read ({_first_line(error)}). It is truncated or not a {path.suffix} file "
        f"({path.stat().st_size:,} bytes on disk): download it again and compare the size."
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]
