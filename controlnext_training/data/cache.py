"""Cache of encoded samples on disk, so that each picture and caption is encoded once.

One file per key, complete or absent. A file whose content has changed since it was written (a damaged disk, a power
failure, a file renamed by hand) counts as missing and is replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...controlnext_core import encodable
from ...controlnext_core.checkpoint import fingerprint

logger = encodable.logger(__name__)

SUFFIX = ".safetensors"
STALE_SECONDS = 3600.0
"""Age in seconds from which unfinished files belong to a process that was killed."""


class Cache:
    """Cache of tensors by key in a folder; several processes may share it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._unfinished = self.folder / "unfinished"
        self._told = False
        with contextlib.suppress(OSError):
            for left in self._unfinished.iterdir():
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    left.unlink()

    def path(self, key: str) -> Path:
        """Path of a key's file; keys that are not plain file names are hashed."""
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        plain = re.fullmatch(r"[0-9a-z_-]{1,150}", key)
        return self.folder / name[:2] / f"{key if plain else name}{SUFFIX}"

    def __contains__(self, key: str) -> bool:
        """True: there is a file for the key, which may be damaged; `get` checks it. False: there is none."""
        return self.path(key).is_file()

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Tensors of the key, on the CPU; None if they are missing, or their file is damaged."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            logger.warning("%s: is damaged (%s) and will be made again", path, error)
            return None
        if metadata.get("key") != key or metadata.get("content") != fingerprint(tensors):
            logger.warning("%s: does not hold what was saved and will be made again", path)
            return None
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        """Cache tensors under a key; returns True on success. False: for example a full disk, which is logged once."""
        held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        content = save(held, {"key": key, "content": fingerprint(held)})
        path = self.path(key)
        temporary = self._unfinished / f"{path.stem}.{os.getpid()}.{threading.get_ident()}"
        try:
            for folder in (path.parent, self._unfinished):
                folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except OSError as error:
            if not self._told:
                logger.warning(
                    "%s: cannot be written (%s); pictures are encoded again each time. Free some disk space or choose "
                    "another cache_folder",
                    self.folder,
                    error,
                )
            self._told = True
            return False
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return True
