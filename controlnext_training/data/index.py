"""Index of files: content, size and readability of each, cached from run to run.

Every file is read before a run, and a picture's size is read from its header; damage inside a picture is found when it
is encoded, which is before the first step too. The facts are written to an index; a file with the same path, length and
modification time is not read again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...controlnext_core import encodable
from .pictures import PictureError, size_of
from .samples import Facts, first_line
from .sources import VIDEO_SUFFIXES
from .tree import CHUNK, Blob, open_regular
from .video_frames import examine_video

logger = encodable.logger(__name__)

VERSION = 1
THREADS = 8
AT_ONCE = 1024
"""Largest number of files between two reports of progress."""

Progress = Callable[[int, int], None]
"""Progress callback: (files read, files in total). It may raise, which ends the search."""


def examine(blob: Blob) -> Facts | str:
    """Facts about a file, or the reason why it cannot be used, as a text."""
    try:
        if blob.suffix in VIDEO_SUFFIXES:
            return Facts(_hash_of_file(blob), *examine_video(blob))
        content = blob.read()
        return Facts(content_hash(content), *size_of(content))
    except OSError as error:
        return f"cannot be read ({error.strerror or first_line(error)}). Check the file and its permissions"
    except PictureError as error:
        return str(error)


def content_hash(content: bytes) -> str:
    """Hash of a file's bytes: BLAKE2b of 128 bits, in hex."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _hash_of_file(blob: Blob) -> str:
    """Hash `content_hash` of a file that need not fit into memory."""
    if blob.size >= 0:
        return content_hash(blob.read())
    digest = hashlib.blake2b(digest_size=16)
    with open_regular(blob.path) as file:
        while part := file.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


class Index:
    """Results of `examine`, stored in one JSON file; without a path only in memory."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._known: dict[str, Facts] = {}
        if path is not None and path.is_file():
            try:
                self._known = _parsed(json.loads(path.read_text("utf-8")))
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                logger.warning("%s: cannot be read (%s); every file is read again", path, first_line(error))

    def facts(self, blobs: Sequence[Blob], progress: Progress | None = None) -> dict[Blob, Facts | str]:
        """Facts or a reason for each file; unknown files are read, several at a time.

        Facts are stored also where `progress` raises.
        """
        places = _places(blobs)
        found: dict[Blob, Facts | str] = {b: self._known[places[b]] for b in blobs if places[b] in self._known}
        unread = [blob for blob in dict.fromkeys(blobs) if blob not in found]
        done, total = len(found), len(found) + len(unread)
        try:
            with contextlib.closing(_examined(unread)) as examined:
                for blob, facts in examined:
                    found[blob] = facts
                    if isinstance(facts, Facts):  # a broken file may be repaired, or be on a drive that returns
                        self._known[places[blob]] = facts
                    done += 1
                    if progress is not None:
                        progress(done, total)
        finally:
            if unread:
                self._save()
        return found

    def _save(self) -> None:
        """Replace the file; a failure costs time, not the run."""
        if self.path is None:
            return
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        rows = {place: asdict(facts) for place, facts in self._known.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"version": VERSION, "files": rows}), "utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            logger.warning("%s: cannot be written (%s); all files are read again next time", self.path, error)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _examined(blobs: Sequence[Blob]) -> Generator[tuple[Blob, Facts | str], None, None]:
    """Each file with its result of `examine`, in order; several are read at a time."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for start in range(0, len(blobs), AT_ONCE):
            part = blobs[start : start + AT_ONCE]
            yield from zip(part, pool.map(examine, part), strict=True)


def _parsed(content: Any) -> dict[str, Facts]:
    if content["version"] != VERSION:
        return {}
    return {place: Facts(**{**row, "times": tuple(row["times"])}) for place, row in content["files"].items()}


def _places(blobs: Sequence[Blob]) -> dict[Blob, str]:
    """Identity of each file according to the file system: path, length, modification time."""

    @functools.cache
    def state(path: Path) -> str:
        try:
            status = path.stat()
        except OSError:
            return "?"  # examine says why
        return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"

    return {blob: f"{state(blob.path)}|{blob.place}" for blob in blobs}
