"""A custom node file for the server of the tests: GET /controlnext_probe tells what goes on inside.

Not a test and not imported by one: `conftest.py` copies it among the custom nodes of the server's base directory.
"""

import logging
from typing import Any

from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, type] = {}
CALLS: list[int] = []
COMPLAINTS: list[str] = []


class Complaints(logging.Handler):
    """Keeps what the pack logs as a warning or worse."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] in ("comfyui_controlnext", "controlnext"):
            COMPLAINTS.append(record.getMessage())


logging.getLogger().addHandler(Complaints(logging.WARNING))


def count_calls(encoder: Any) -> None:
    """Note the rows of each forward of an encoder class, from now on."""
    forward = encoder.forward
    if getattr(forward, "counted", False):
        return

    def counting(self: Any, hint: Any, *rest: Any) -> Any:
        CALLS.append(int(hint.shape[0]))
        return forward(self, hint, *rest)

    counting.counted = True  # type: ignore[attr-defined]
    encoder.forward = counting


@PromptServer.instance.routes.get("/controlnext_probe")
async def probe(_: web.Request) -> web.Response:
    """{calls: rows of each forward of an encoder, kept: entries in the feature cache, complaints: log lines}"""
    from comfyui_controlnext.controlnext_core.comfy_adapter.features import CACHE
    from comfyui_controlnext.models.controlnext import ControlNeXt

    count_calls(ControlNeXt)
    return web.json_response({"calls": CALLS, "kept": len(CACHE), "complaints": COMPLAINTS})
