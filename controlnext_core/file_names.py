"""File names entered by the user, checked for all systems before any file is made."""

from __future__ import annotations

import re

from .encodable import cut, is_encodable

MAX_NAME = 150
"""Largest length of a name in characters; systems allow 255 bytes, suffixes are added, and a character outside ASCII
takes up to four bytes."""
MAX_BYTES = 200
MAX_FOLDERS = 32
WINDOWS_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))})
RESERVED = ("cache",)
"""Names of folders that are stored beside those of runs."""
UNET_START = "unet"
"""Start of the names of files that are used as the UNet weights of a control beside them."""


def problem_of_name(name: str) -> str:
    """Fault of the name of a file or folder, without its suffix, as a sentence; empty for none."""
    shown = cut(repr(name), 60)
    if not name or set(name) <= {"."}:
        return f"{shown} is not a file name. Use letters, digits, _ and -."
    if not is_encodable(name) or re.search(r"[/\\:*?\"<>|\x00-\x1f\x7f]", name):
        return (
            f"{shown} is not a file name: it has a character that file names cannot have. Use letters, digits, _ and -."
        )
    if len(name) > MAX_NAME or len(name.encode()) > MAX_BYTES:
        return f"{shown} is too long. Use no more than {MAX_NAME} letters, {MAX_BYTES} bytes in UTF-8."
    if name[-1] in ". " or name[0] == " ":
        return f"{shown} begins or ends with a space, or ends with a dot, which Windows takes off. Remove it."
    if name.partition(".")[0].strip().lower() in WINDOWS_DEVICES:
        return f"{shown} is the name of a device on Windows. Choose another."
    return ""


def problem_of_control(name: str) -> str:
    """Fault of the name of a control's file or folder, as a sentence; empty for none."""
    problem = problem_of_name(name)
    if not problem and name.lower() in RESERVED:
        problem = f"{name!r} is the name of a folder that the pack keeps things in. Choose another."
    if not problem and name.lower().startswith(UNET_START):
        problem = f"{name!r} begins with {UNET_START}, as the UNet weights beside a control do. Choose another."
    return problem


def problem_of_prefix(prefix: str) -> str:
    """Fault of a `filename_prefix`, which may contain folders and the host's %year% and the like; empty for none."""
    *folders, name = re.split(r"[/\\]", prefix)
    if len(folders) > MAX_FOLDERS:
        return f"{cut(repr(prefix), 60)} has {len(folders):,} folders. Use no more than {MAX_FOLDERS}."
    for folder in folders:
        if (
            folder not in ("", ".", "..")
            and not re.fullmatch("[A-Za-z]:", folder)
            and (problem := problem_of_name(folder))
        ):
            return problem
    return problem_of_control(name) if name else ""
