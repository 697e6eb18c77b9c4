"""Text that every encoder takes: file names, tensor names and widgets may hold what UTF-8 cannot say.

A lone surrogate stands for a byte that is no UTF-8 (in names of files), or comes out of JSON or a pickle. The host
writes messages to its log and to its pages, and ends the thread that runs prompts where a text cannot be encoded.
"""

from __future__ import annotations

import logging
from typing import Any

MAX_MESSAGE = 8000
"""Letters of a text that leaves a node; a longer one loses its middle."""

MAX_QUOTED = 200
"""Letters of a text out of a file that a message repeats."""


def is_encodable(text: str) -> bool:
    """True means that UTF-8 can say all of the text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def escaped(text: str) -> str:
    """The text with lone surrogates written as escapes (`\\ud800`)."""
    return text if is_encodable(text) else text.encode("utf-8", "backslashreplace").decode("utf-8")


def encodable(text: str) -> str:
    """The text with lone surrogates written as escapes (`\\ud800`), and with its middle cut where it is too long."""
    if len(text) > MAX_MESSAGE:
        half = MAX_MESSAGE // 2
        text = f"{text[:half]} ... ({len(text) - 2 * half:,} letters left out) ... {text[-half:]}"
    return escaped(text)


def cut(text: str, most: int = MAX_QUOTED) -> str:
    """A file's own text as it stands in a message: its start alone where it is longer than `most` letters."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} letters)"


def encodable_parts(value: Any) -> Any:
    """The value with every text inside lists, tuples and dictionaries made encodable; other objects stay themselves."""
    if isinstance(value, str):
        return encodable(value)
    if type(value) in (list, tuple):
        return type(value)(map(encodable_parts, value))
    if type(value) is dict:
        return {encodable_parts(key): encodable_parts(part) for key, part in value.items()}
    return value


def make_encodable(error: BaseException) -> BaseException:
    """The error to raise in the place of this one: itself where its text and those of its causes can be encoded.

    Texts among the arguments are made encodable in place; an error whose text comes from elsewhere becomes a
    RuntimeError with the same words.
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
    """The logger of this name; its lines are made encodable before any handler sees them."""
    found = logging.getLogger(name)
    found.addFilter(_encodable_line)
    return found


def _encodable_line(record: logging.LogRecord) -> bool:
    record.msg, record.args = encodable(record.getMessage()), ()
    return True
