"""Paths as the user knows them: files of the host's folders are named from there, in all that a node says."""

from __future__ import annotations

import os
import re

import folder_paths


def short_paths(text: str) -> str:
    """The text with files of the host's folders named from there: models/controlnext/a.safetensors.

    Files in other folders, such as those of extra_model_paths.yaml, keep their whole path.
    """
    for name, folder in _folders().items():
        before = re.escape(os.path.abspath(folder).rstrip(os.sep) + os.sep)
        text = re.sub(rf"(?<![^\s'\"(])(?:{before})", f"{name}/", text)
    return text


def short_error(error: BaseException) -> BaseException:
    """Copy of the error with short paths in the texts among its arguments."""
    error.args = tuple(short_paths(part) if isinstance(part, str) else part for part in error.args)
    return error


def _folders() -> dict[str, str]:
    """{name: path} of the folders that the host has once."""
    return {
        "models": folder_paths.models_dir,
        "output": folder_paths.get_output_directory(),
        "input": folder_paths.get_input_directory(),
    }
