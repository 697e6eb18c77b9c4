"""Text that can be encoded: names of files and tensors, and widget values, may hold characters that UTF-8 does not
allow.

A lone surrogate represents a byte that is not UTF-8 (in names of files), or comes from JSON or a pickle. The host
writes messages to its log and to its pages, and its thread that runs prompts ends where a text cannot be encoded.
"""

from __future__ import annotations

import logging
from typing import Any

MAX_MESSAGE = 8000
"""Largest length, in characters, of a text that leaves a node; the middle of a longer one is cut."""

MAX_QUOTED = 200
"""Largest length, in characters, of a text from a file that a message quotes."""


def is_encodable(text: str) -> bool:
    """True: UTF-8 can encode the text. False: it holds a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def escaped(text: str) -> str:
    """Text with lone surrogates written as escapes."""
    return text if is_encodable(text) else text.encode("utf-8", "backslashreplace").decode("utf-8")


def encodable(text: str) -> str:
    """Text with lone surrogates written as escapes, and with its middle cut where it is too long."""
    if len(text) > MAX_MESSAGE:
        half = MAX_MESSAGE // 2
        text = f"{text[:half]} ... ({len(text) - 2 * half:,} letters left out) ... {text[-half:]}"
    return escaped(text)


def cut(text: str, most: int = MAX_QUOTED) -> str:
    """Text of a file for a message: cut, with its length, where it has more than `most` characters."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} letters)"


def encodable_parts(value: Any) -> Any:
    """Value with every text inside lists, tuples and dictionaries made encodable; other objects are unchanged."""
    if isinstance(value, str):
        return encodable(value)
    if type(value) in (list, tuple):
        return type(value)(map(encodable_parts, value))
    if type(value) is dict:
        return {encodable_parts(key): encodable_parts(part) for key, part in value.items()}
    return value


def make_encodable(error: BaseException) -> BaseException:
    """Error to raise in place of this one: the same where its text and those of its causes can be encoded.

    Texts among the arguments are made encodable in place; an error whose text comes from elsewhere becomes a
    RuntimeError with the same text.
    """
    seen: set[int] = set()
    part: BaseException | None = error
    while part is not None and id(part) not in seen:
        seen.add(id(part))
        part.args = tuple(encodable(a) if isinstance(a, str) else a for a in part.args)
        if not _says_encodable(part):
            if part is error:
                return RuntimeError(encodable(f"{type(error).__name__}: {error}"))
            error.__cause__, error.__suppress_context__ = None, True
            return error
        part = part.__cause__ or part.__context__
    return error


def _says_encodable(error: BaseException) -> bool:
    text = str(error)
    return len(text) <= 2 * MAX_MESSAGE and is_encodable(text)


def logger(name: str) -> logging.Logger:
    """Logger of this name whose lines are made encodable before any handler gets them."""
    found = logging.getLogger(name)
    found.addFilter(_encodable_line)
    return found


def _encodable_line(record: logging.LogRecord) -> bool:
    record.msg, record.args = encodable(record.getMessage()), ()
    return True
