"""A custom node file for the server of the tests: GET /controlnext_probe tells what goes on inside, and a prompt
without a text encoder for models whose own is too large.

Not a test and not imported by one: `conftest.py` copies it among the custom nodes of the server's base directory.
"""

import contextlib
import ctypes
import gc
import logging
from typing import Any

import psutil
import torch
from aiohttp import web
from server import PromptServer


class TestPrompt:
    """Random CONDITIONING, with a pooled vector that the models in question do not read."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {name: ("INT", {"max": 1 << 16}) for name in ("tokens", "width", "seed")}}

    def make(self, tokens: int, width: int, seed: int) -> tuple[list[Any]]:
        text = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))
        return ([[text, {"pooled_output": text[:, 0, :1]}]],)


NODE_CLASS_MAPPINGS: dict[str, type] = {"ControlNeXtTestPrompt": TestPrompt}
CALLS: list[int] = []
COMPLAINTS: list[str] = []


class Complaints(logging.Handler):
    """Keeps what the pack logs as a warning or worse."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] in ("comfyui_controlnext", "controlnext"):
            COMPLAINTS.append(record.getMessage())


logging.getLogger().addHandler(Complaints(logging.WARNING))


def count_calls(encoder: Any) -> None:
    """Note the rows of each hint that an encoder class begins on, from now on."""
    begin = encoder.begin
    if getattr(begin, "counted", False):
        return

    def counting(self: Any, hint: Any) -> Any:
        CALLS.append(int(hint.shape[0]))
        return begin(self, hint)

    counting.counted = True  # type: ignore[attr-defined]
    encoder.begin = counting


def memory() -> dict[str, int]:
    """Memory that the process holds: the allocator's own reserve, which it would use next, is given back first."""
    gc.collect()
    storages = [o.untyped_storage() for o in gc.get_objects() if isinstance(o, torch.Tensor) and not o.is_meta]
    with contextlib.suppress(OSError, AttributeError):  # glibc's
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    unique = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return {"memory": psutil.Process().memory_info().rss, "tensors": sum(unique.values())}


@PromptServer.instance.routes.get("/controlnext_probe")
async def probe(request: web.Request) -> web.Response:
    """{calls: rows of each forward of an encoder, kept: entries in the feature cache, complaints: log lines,
    and with ?memory also memory: resident bytes, tensors: bytes of those that live}"""
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.features import CACHE
    from comfyui_controlnext.models.controlnext import ControlNeXt

    count_calls(ControlNeXt)
    return web.json_response(
        {
            "calls": CALLS,
            "kept": len(CACHE),
            "complaints": COMPLAINTS,
            **(memory() if "memory" in request.query else {}),
        }
    )
