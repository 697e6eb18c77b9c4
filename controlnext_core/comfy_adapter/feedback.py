"""Words for the user: on the node while it runs, and in the log."""

from __future__ import annotations

import logging
import sys

log = logging.getLogger("controlnext")


def tell(text: str, node_id: str | None) -> None:
    """Log a report, and show it under its node where a page is connected."""
    for line in text.splitlines():
        log.info("%s", line)
    server = sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if instance is not None and node_id is not None and hasattr(instance, "send_progress_text"):
        instance.send_progress_text(text, node_id)
