"""Process that reads samples for a training run: requests arrive through CONNECTION, samples are sent back.

`reader_processes` runs this file in a spawned process, where the project is not yet importable. It ends with the
connection, and so with the process at the other end, however that ended.
"""

from __future__ import annotations

import os
import pickle
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def bring_in_project() -> None:
    """Make the project importable under its name, without importing the host and its nodes."""
    sys.path[:] = [entry for entry in sys.path if entry and not (Path(entry) / "comfy_api").is_dir()]
    runpy.run_path(str(ROOT / "_alias.py"))


def serve(connection: Any) -> None:
    """Answer each request with (sample, None) or (None, error) until the other end is closed."""
    from comfyui_controlnext.controlnext_core.opencv import require_opencv

    require_opencv().setNumThreads(1)  # the processes share the cores
    while True:
        try:
            request = pickle.loads(connection.recv_bytes())  # noqa: S301 - the other end is this project  # nosec B301
        except (EOFError, OSError):
            return
        answer: tuple[Any, Exception | None]
        try:
            answer = request(), None
        except Exception as error:  # noqa: BLE001 - the other end decides
            answer = None, error
        try:
            connection.send_bytes(pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))
        except OSError:
            return


if "CONNECTION" in globals():
    for name in ("SIGINT", "SIGHUP", "SIGBREAK"):  # a terminal sends these to all; the run decides when to end
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    bring_in_project()
    import torch

    torch.set_num_threads(1)
    serve(globals()["CONNECTION"])
    os._exit(0)  # at once: there is nothing to clean up
