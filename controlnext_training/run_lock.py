"""One process trains a run at a time: two of one name would replace each other's states."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from .config import ConfigError


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Inside, the run in this folder belongs to this process; the system lets go of it if the process dies.

    Raises ConfigError where another process holds it, or where the folder above cannot be written.
    """
    path = run.with_name(f".{run.name}.lock")  # beside the folder, which may be renamed
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(
            f"runs_folder: {path.parent} cannot be written ({error.strerror}). Set runs_folder to another folder, or "
            "mend its permissions."
        ) from error
    with file:
        if not _lock(file.fileno()):
            raise ConfigError(
                f"output_name: the run in {run} is going on in another process. Wait for its end, stop it, or choose "
                "another output_name."
            )
        yield


def _lock(descriptor: int) -> bool:
    """Whether the lock is ours now, or the file system has no locks."""
    if sys.platform == "win32":
        import msvcrt

        try:
            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network drives
        return True
    return True
