"""Folders and tar shards as one kind of tree: names with slashes -> bytes on the disk.

Shards are never unpacked: their members are read in place. The order of names is the same on every system.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
import tarfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from .samples import Broken, DatasetError, first_line

TAR_SUFFIX = ".tar"
PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
IGNORED_FOLDERS = ("__macosx",)
BLOCK = tarfile.BLOCKSIZE
MAX_FILE = 1 << 30
"""Largest size in bytes of a picture, a table, or a video in a shard."""
MAX_GAP = 64 << 20
"""Number of bytes of a shard without the start of a member, after which the search ends."""
CHUNK = 1 << 20

Check = Callable[[], None]
"""Function that raises where the user has cancelled."""


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes of a file, or of a member of a shard."""

    path: Path
    name: str
    """Path in the tree, with slashes."""
    offset: int = 0
    size: int = -1
    """Number of bytes from the offset on; -1: all."""

    @property
    def label(self) -> str:
        """Name for messages: the file and, for a shard, the member."""
        return str(self.path) if self.size < 0 else f"{self.path}: {self.name}"

    @property
    def stem(self) -> str:
        """Name without its suffix."""
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        """Suffix in lower case, with its dot."""
        return posixpath.splitext(self.name)[1].lower()

    @property
    def place(self) -> str:
        """Position of the bytes in their file, for an index."""
        return f"{self.offset}|{self.size}"

    def read(self) -> bytes:
        """Bytes of the whole blob. Raises OSError."""
        with open_regular(self.path) as file:
            file.seek(self.offset)
            length = self.size if self.size >= 0 else os.fstat(file.fileno()).st_size
            if length > MAX_FILE:
                raise OSError(f"has {length:,} bytes, more than {MAX_FILE:,}")
            content = file.read(length)
        if len(content) < self.size:
            raise OSError(f"ends after {len(content):,} of {self.size:,} bytes")
        return content


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises OSError, at once, for a pipe, a device or a folder, where reading may never end.
    """
    number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError("is not a regular file")
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def fold(name: str) -> str:
    """Fold a name for comparison: no case, and one form of letters with accents (systems store them in two)."""
    return unicodedata.normalize("NFC", name).casefold()


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names in the same order on every system."""
    return sorted(names, key=lambda name: (fold(name), name))


@dataclass(slots=True)
class Tree:
    """Files below one source."""

    root: Path
    """Folder of the source, or the folder that contains the shard."""
    roots: tuple[Path, ...] | None = None
    """Folders that files must be in, links followed; None: anywhere."""
    blobs: dict[str, Blob] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)
    check: Check = lambda: None
    arrow: Path | None = None
    """Folder for Arrow files converted from Parquet; None: the library's default."""
    _folded: dict[str, Blob] | None = None

    def find(self, folder: str, name: str) -> Blob | None:
        """File that a table in `folder` of this tree calls `name`: exactly, in another case, or elsewhere on disk.

        Raises DatasetError if it is outside of the allowed folders.
        """
        joined = posixpath.normpath(posixpath.join(folder, name.replace("\\", "/")))
        if joined in self.blobs:
            return self.blobs[joined]
        if self._folded is None:
            self._folded = {fold(key): blob for key, blob in self.blobs.items()}
        if fold(joined) in self._folded:
            return self._folded[fold(joined)]
        path = Path(name) if Path(name).is_absolute() else self.root / joined
        self._check(path)  # first, so that errors do not reveal whether a file exists outside of the allowed folders
        return Blob(path, joined) if is_regular(path) else None

    def walk(self) -> None:
        """Add every file below the root, and the members of shards. Hidden files and folders are skipped."""
        seen: set[Path] = set()

        def note(error: OSError) -> None:
            self.broken.append(Broken(str(error.filename), f"cannot be read ({error.strerror}). Check its permissions"))

        for folder, folders, files in os.walk(self.root, onerror=note, followlinks=True):
            here = Path(folder)
            self.check()
            if here.resolve() in seen:  # a link to a parent folder
                folders.clear()
                continue
            seen.add(here.resolve())
            folders[:] = in_order(f for f in folders if not f.startswith(".") and f.lower() not in IGNORED_FOLDERS)
            for name in in_order(f for f in files if not f.startswith(".")):
                self.add(here / name, (here / name).relative_to(self.root).as_posix())

    def add(self, path: Path, name: str) -> None:
        """Add one file; a shard becomes a folder of its name."""
        if not is_regular(path):
            why = "is not a regular file, but a pipe, a device or a link that leads nowhere. Remove it"
            self.broken.append(Broken(str(path), why))
            return
        try:
            self._check(path)
        except DatasetError as error:
            self.broken.append(Broken(str(path), str(error)))
            return
        if name.lower().endswith(TAR_SUFFIX):
            members, broken = read_shard(path, self.check)
            self.broken += broken
            self.blobs.update({f"{name}/{b.name}": Blob(path, f"{name}/{b.name}", b.offset, b.size) for b in members})
        elif name.lower().endswith(PACKED_SUFFIXES):
            self.broken.append(Broken(str(path), "is compressed, so its files cannot be read in place. Unpack it"))
        else:
            self.blobs[name] = Blob(path, name)

    def _check(self, path: Path) -> None:
        if self.roots is not None and not any(_lies_in(path, root) for root in self.roots):
            raise DatasetError(f"{path}: is outside of {', '.join(map(str, self.roots))}. Move it into one of them.")


def is_regular(path: Path) -> bool:
    """True: a regular file exists there, links followed. False: none does, or the system refuses the name."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _lies_in(path: Path, root: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle; a name that the system refuses
        return False


class _Watched:
    """Shard during the search: ends it where no member begins for long, or where the user has cancelled."""

    def __init__(self, file: BinaryIO, check: Check) -> None:
        self.file, self.check, self.idle = file, check, 0
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def read(self, size: int = -1) -> bytes:
        self.idle += 1
        if self.idle % 4096 == 0:
            self.check()
        if self.idle * BLOCK > MAX_GAP:
            raise tarfile.ReadError(f"no file begins in {MAX_GAP >> 20} MiB")
        return self.file.read(size)


def read_shard(path: Path, check: Check = lambda: None) -> tuple[list[Blob], list[Broken]]:
    """Read an uncompressed tar: (files, damaged parts), in the tar's order. Files are offsets into the tar."""
    blobs: dict[str, Blob] = {}
    broken: list[Broken] = []
    used: list[tuple[int, int]] = []
    total = path.stat().st_size
    try:
        watched: Any = _Watched(open_regular(path), check)
        # zeros ignored, it finds the next header after a damaged one
        with contextlib.closing(watched), tarfile.open(fileobj=watched, mode="r:", ignore_zeros=True) as tar:
            for member in _members(tar, path, broken):
                watched.idle = 0
                start, end = member.offset_data, member.offset_data + (member.size if member.isreg() else 0)
                used.append((member.offset, -(-end // BLOCK) * BLOCK))
                name = posixpath.normpath(member.name).lstrip("/")
                if posixpath.basename(name).startswith(".") or member.isdir():
                    continue
                blob = Blob(path, name, start, member.size) if member.isreg() and member.sparse is None else None
                if member.islnk() or member.issym():
                    folder = posixpath.dirname(name) if member.issym() else ""
                    target = blobs.get(posixpath.normpath(posixpath.join(folder, member.linkname)))
                    blob = target and Blob(path, name, target.offset, target.size)
                if blob is None:
                    broken.append(Broken(f"{path}: {name}", "is not a plain file in the shard. Pack the file itself"))
                elif end > total:
                    why = f"is cut off: the shard ends at byte {total:,} of {end:,}. Download or pack it again"
                    broken.append(Broken(f"{path}: {name}", why))
                else:
                    blobs[name] = blob
    except (tarfile.TarError, OSError) as error:
        broken.append(Broken(str(path), f"is not an uncompressed tar ({first_line(error)}). Pack it again"))
        return [], broken
    broken += [
        Broken(f"{path}: bytes {start:,} to {end:,}", "hold no readable member. Pack the shard again")
        for start, end in _gaps(path, used, total, check)
    ]
    return list(blobs.values()), broken


def _members(tar: tarfile.TarFile, path: Path, broken: list[Broken]) -> Iterator[tarfile.TarInfo]:
    """Members of the tar that can be reached."""
    try:
        yield from tar
    except (tarfile.TarError, OSError, ValueError) as error:  # ValueError: numbers of a damaged extended header
        broken.append(Broken(str(path), f"is damaged near its end ({first_line(error)}). Pack it again"))


def _gaps(path: Path, used: Sequence[tuple[int, int]], total: int, check: Check) -> Iterator[tuple[int, int]]:
    """Ranges between members that are not zero and are not a header for the whole shard."""
    with open(path, "rb") as file:
        end = 0
        for start, after in [*sorted(used), (total, total)]:
            if start > end:
                file.seek(end)
                head = file.read(min(BLOCK, start - end))
                if head[156:157] != tarfile.XGLTYPE and (any(head) or _any_left(file, start - end - len(head), check)):
                    yield end, start
            end = max(end, after)


def _any_left(file: BinaryIO, count: int, check: Check) -> bool:
    """True: one of the next `count` bytes is not zero. False: all are."""
    while count > 0:
        check()
        part = file.read(min(CHUNK, count))
        if part.strip(b"\0"):
            return True
        if not part:
            return False
        count -= len(part)
    return False
