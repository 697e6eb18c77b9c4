"""Import of OpenCV, with a remedy where it is missing; four packages bring the same `cv2`."""

from __future__ import annotations

import importlib
import sys
from typing import Any

PACKAGE = "opencv-python-headless"
"""Name of the package to install: the one without a window system, which servers lack."""


def require_opencv() -> Any:
    """The module cv2, imported at the first call. Raises ImportError with the pip command where it is missing."""
    try:
        return importlib.import_module("cv2")
    except ModuleNotFoundError as error:
        if error.name != "cv2":
            raise
        raise ImportError(
            "OpenCV is not installed, and hints, pose drawing and the pictures of the pack need it. Type\n"
            f'    "{sys.executable}" -m pip install {PACKAGE}\nand run again; ComfyUI need not be restarted.'
        ) from error
