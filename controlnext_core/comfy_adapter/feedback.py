"""Words for the user: on the node while it runs, and in the log."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import encodable
from .short_paths import short_paths

log = encodable.logger("controlnext")


_warned: set[str] = set()
"""Nodes that show a warning."""


def tell(text: str, node_id: str | None, cautions: Sequence[str] = ()) -> None:
    """Log a report, and show it under its node where a page is connected; warnings stand first there.

    cautions: warnings, which are logged once per process.
    """
    text = encodable.encodable(short_paths(text))
    for line in text.splitlines():
        log.info("%s", line)
    for caution in cautions:
        warn_once(caution)
    shown = [f"Warning: {encodable.encodable(short_paths(caution))}" for caution in cautions]
    if shown or text or node_id in _warned:  # a text that is empty takes an earlier warning away
        _show("\n".join([*shown, *([text] if text else [])]), node_id)
    if node_id is not None:
        (_warned.add if shown else _warned.discard)(node_id)


def _show(text: str, node_id: str | None) -> None:
    server = sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if instance is not None and node_id is not None and hasattr(instance, "send_progress_text"):
        instance.send_progress_text(text, node_id)


@functools.lru_cache(maxsize=256)
def warn_once(caution: str) -> None:
    """Log a warning once per process."""
    log.warning("%s", short_paths(caution))


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
