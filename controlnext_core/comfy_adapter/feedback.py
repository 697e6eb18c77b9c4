"""Messages to the user: on the node while it runs, and in the log."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

from .. import encodable
from .short_paths import short_paths

log = encodable.logger("controlnext")


REPORT = "controlnext_report"
"""Key in a node's results under which the page's script, web/js/reports.js, finds the text to show on the node."""


def report(text: str, cautions: Sequence[str] = ()) -> dict[str, list[str]]:
    """Log a report and its warnings; return both as results of a node, for its `ui`, warnings first.

    The page stores them with its node, since the host sends none for outputs from its cache. An empty text clears the
    text on the node. cautions: warnings, each logged once per process.
    """
    text = encodable.encodable(short_paths(text))
    for line in text.splitlines():
        log.info("%s", line)
    for caution in cautions:
        warn_once(caution)
    shown = [f"Warning: {encodable.encodable(short_paths(caution))}" for caution in cautions]
    return {REPORT: ["\n".join([*shown, *([text] if text else [])])]}


def tell(text: str, node_id: str | None) -> None:
    """Report progress of a node: in the log and, where a page is connected, on the node until its next run."""
    text = encodable.encodable(short_paths(text))
    for line in text.splitlines():
        log.info("%s", line)
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


def warn_if_tiled(name: str, seen: Any, prepared_for: Sequence[int]) -> None:
    """Warn once where another pack cuts the latent into tiles, each of which then gets the whole hint.

    seen: the latent's shape in this forward, or None; prepared_for: its shape when the control was prepared, or empty.
    """
    if seen is not None and prepared_for and tuple(seen[-2:]) != tuple(prepared_for[-2:]):
        warn_of_whole_hints(name)


def warn_of_whole_hints(name: str) -> None:
    """Warn once that every tile gets the whole hint of this control."""
    warn_once(
        f"{name}: another node cuts the latent into tiles, and every tile gets the whole hint. Use ControlNeXt Split "
        "into Tiles, or a node that cuts hints too (Tiled Diffusion) with this control on the conditioning: Apply "
        "ControlNet."
    )
