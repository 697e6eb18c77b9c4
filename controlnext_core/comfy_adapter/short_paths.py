"""Short paths for messages: files of the host's folders are named relative to the host's root."""

from __future__ import annotations

import os
import re

import folder_paths


def short_paths(text: str) -> str:
    """Shorten paths in a text to those relative to the host's root: models/controlnext/a.safetensors.

    Files in other folders, such as those of extra_model_paths.yaml, keep their full path.
    """
    for name, folder in _folders().items():
        before = re.escape(os.path.abspath(folder).rstrip(os.sep) + os.sep)
        text = re.sub(rf"(?<![^\s'\"(])(?:{before})", f"{name}/", text)
    return text


def short_error(error: BaseException) -> BaseException:
    """Shorten the paths in the error's text arguments, in place; returns the error."""
    error.args = tuple(short_paths(part) if isinstance(part, str) else part for part in error.args)
    return error


def _folders() -> dict[str, str]:
    """{name: path} of the host's folders that exist once."""
    return {
        "models": folder_paths.models_dir,
        "output": folder_paths.get_output_directory(),
        "input": folder_paths.get_input_directory(),
    }
