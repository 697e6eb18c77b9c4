"""Folders and tar shards as one kind of tree: names with slashes -> bytes somewhere on the disk.

Shards are never unpacked: their members are read where they lie. The order of names is the same on every system.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .samples import Broken, DatasetError, first_line

TAR_SUFFIX = ".tar"
PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
IGNORED_FOLDERS = ("__macosx",)
BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True)
class Blob:
    """The bytes of a file, or of a member of a shard."""

    path: Path
    name: str
    """Path in its tree, with slashes."""
    offset: int = 0
    size: int = -1
    """Bytes from the offset on; -1 = all."""

    @property
    def label(self) -> str:
        """For messages: the file, and the member where it is a shard."""
        return str(self.path) if self.size < 0 else f"{self.path}: {self.name}"

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        """In small letters, with its dot."""
        return posixpath.splitext(self.name)[1].lower()

    def read(self) -> bytes:
        """All of it. Raises OSError."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(f"ends after {len(content):,} of {self.size:,} bytes")
        return content


def fold(name: str) -> str:
    """Name for comparison: without case, letters with accents in one form (systems store them in two)."""
    return unicodedata.normalize("NFC", name).casefold()


def in_order(names: Iterable[str]) -> list[str]:
    """Sorted the same on every system."""
    return sorted(names, key=lambda name: (fold(name), name))


@dataclass(slots=True)
class Tree:
    """Everything below one source."""

    root: Path
    """The folder, or the folder that the shard lies in."""
    roots: tuple[Path, ...] | None = None
    """Folders that files may lie in, links followed; None = anywhere."""
    blobs: dict[str, Blob] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)
    _folded: dict[str, Blob] | None = None

    def find(self, folder: str, name: str) -> Blob | None:
        """File that a table in `folder` of this tree calls `name`: exactly, in another case, or elsewhere on disk.

        Raises DatasetError if it lies where files may not be read.
        """
        joined = posixpath.normpath(posixpath.join(folder, name.replace("\\", "/")))
        if joined in self.blobs:
            return self.blobs[joined]
        if self._folded is None:
            self._folded = {fold(key): blob for key, blob in self.blobs.items()}
        if fold(joined) in self._folded:
            return self._folded[fold(joined)]
        path = Path(name) if Path(name).is_absolute() else self.root / joined
        if not path.is_file():
            return None
        self._check(path)
        return Blob(path, joined)

    def walk(self) -> None:
        """Add every file below the root, the members of shards too. Hidden files and folders are passed over."""
        seen: set[Path] = set()

        def note(error: OSError) -> None:
            self.broken.append(Broken(str(error.filename), f"cannot be read ({error.strerror}). Check its permissions"))

        for folder, folders, files in os.walk(self.root, onerror=note, followlinks=True):
            here = Path(folder)
            if here.resolve() in seen:  # a link to a folder above
                folders.clear()
                continue
            seen.add(here.resolve())
            folders[:] = in_order(f for f in folders if not f.startswith(".") and f.lower() not in IGNORED_FOLDERS)
            for name in in_order(f for f in files if not f.startswith(".")):
                self.add(here / name, (here / name).relative_to(self.root).as_posix())

    def add(self, path: Path, name: str) -> None:
        """Add one file; a shard becomes a folder of its name."""
        try:
            self._check(path)
        except DatasetError as error:
            self.broken.append(Broken(str(path), str(error)))
            return
        if name.lower().endswith(TAR_SUFFIX):
            members, broken = read_shard(path)
            self.broken += broken
            self.blobs.update({f"{name}/{b.name}": Blob(path, f"{name}/{b.name}", b.offset, b.size) for b in members})
        elif name.lower().endswith(PACKED_SUFFIXES):
            self.broken.append(Broken(str(path), "is compressed, so its files cannot be read in place. Unpack it"))
        else:
            self.blobs[name] = Blob(path, name)

    def _check(self, path: Path) -> None:
        if self.roots is not None and not any(path.resolve().is_relative_to(root.resolve()) for root in self.roots):
            raise DatasetError(f"{path}: lies outside of {', '.join(map(str, self.roots))}. Move it into one of them.")


def read_shard(path: Path) -> tuple[list[Blob], list[Broken]]:
    """(files, damaged parts) of an uncompressed tar, in its own order. Files are offsets into the tar."""
    blobs: dict[str, Blob] = {}
    broken: list[Broken] = []
    used: list[tuple[int, int]] = []
    total = path.stat().st_size
    try:
        with tarfile.open(path, "r:", ignore_zeros=True) as tar:  # finds the next header after a damaged one
            for member in _members(tar, path, broken):
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
                    broken.append(Broken(f"{path}: {name}", "is no plain file in the shard. Pack the file itself"))
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
        for start, end in _gaps(path, used, total)
    ]
    return list(blobs.values()), broken


def _members(tar: tarfile.TarFile, path: Path, broken: list[Broken]) -> Iterator[tarfile.TarInfo]:
    """The members that can be reached."""
    try:
        yield from tar
    except (tarfile.TarError, OSError, ValueError) as error:  # ValueError: numbers of a damaged extended header
        broken.append(Broken(str(path), f"is damaged near its end ({first_line(error)}). Pack it again"))


def _gaps(path: Path, used: Sequence[tuple[int, int]], total: int) -> Iterator[tuple[int, int]]:
    """Stretches between members that are not empty and not a header that speaks for all of the shard."""
    with open(path, "rb") as file:
        end = 0
        for start, after in [*sorted(used), (total, total)]:
            if start > end:
                file.seek(end)
                head = file.read(min(BLOCK, start - end))
                if head[156:157] != tarfile.XGLTYPE and (any(head) or any(file.read(start - end - len(head)))):
                    yield end, start
            end = max(end, after)
