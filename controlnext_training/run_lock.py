"""Lock of a run's folder: two processes that train one run would replace each other's states."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .config import ConfigError

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""Error numbers of file systems without locks, such as some network drives."""


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Context in which the run in this folder belongs to this process; the system releases the lock if the process
    dies.

    File systems without locks get none. Raises ConfigError where another process has the lock, or where the folder
    above cannot be written.
    """
    path = folder.with_name(f".{folder.name}.lock")  # beside the folder, which may be renamed
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"output_name: the run in {folder} is in progress in another process. Wait for its end, stop it, or choose "
            "another output_name."
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise ConfigError(
                f"runs_folder: {path.parent} cannot be written ({error.strerror}). Set runs_folder to another folder, "
                "or change its permissions."
            ) from error
    try:
        yield
    finally:
        lock.release()
