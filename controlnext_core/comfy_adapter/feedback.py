"""Words for the user: on the node while it runs, and in the log."""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import Tensor

from .. import encodable

log = encodable.logger("controlnext")


def tell(text: str, node_id: str | None) -> None:
    """Log a report, and show it under its node where a page is connected."""
    text = encodable.encodable(text)
    for line in text.splitlines():
        log.info("%s", line)
    server = sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if instance is not None and node_id is not None and hasattr(instance, "send_progress_text"):
        instance.send_progress_text(text, node_id)


@functools.lru_cache(maxsize=256)
def log_once(message: str, *args: Any) -> None:
    """Log a line once per process."""
    log.info(message, *args)


def warn_if_tiled(name: str, seen: Any, x: Tensor) -> None:
    """A pack that cuts the latent behind our back gives every tile the whole hint: say so, once.

    seen: the shape that the UNet was given, or None; x: the latent that the control was prepared for.
    """
    if seen is not None and tuple(seen[-2:]) != tuple(x.shape[-2:]):
        log_once(
            "%s: the latent is cut into tiles after the control was prepared; every tile gets the whole hint.",
            name,
        )
