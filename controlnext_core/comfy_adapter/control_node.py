"""Base class of all nodes of the pack: every text that leaves a node passes through here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from comfy_api.latest import io

from ..encodable import encodable_parts, make_encodable
from .input_kinds import check_inputs
from .short_paths import short_error, short_paths

METHODS = ("execute", "validate_inputs", "fingerprint_inputs")
"""Names of the methods whose results and errors the host shows."""
LINKED = "linked"
"""Fingerprint of a node whose file is named through a link: the host knows no value of it before the run, and looks
itself at what the link comes from."""


class ControlNode(io.ComfyNode):
    """Base class of nodes: results and errors contain only text that can be encoded, and short paths."""

    SEARCH: ClassVar[tuple[str, ...]] = ()
    """Words besides the node's name by which the page's search finds it, on hosts whose schema has `search_aliases`."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in METHODS:
            method = cls.__dict__.get(name)
            if method is not None and not hasattr(method.__func__, "__wrapped__"):  # the host's copies have it
                setattr(cls, name, classmethod(_speaking(method.__func__)))
        method = cls.__dict__.get("define_schema")
        if method is not None and not hasattr(method.__func__, "__wrapped__"):
            cls.define_schema = classmethod(_searchable(method.__func__))


def _searchable(method: Callable[[Any], io.Schema]) -> Callable[[Any], io.Schema]:
    """The method, with the class's SEARCH in its schema where the host has a place for it."""

    @functools.wraps(method)
    def define(cls: Any) -> io.Schema:
        schema = method(cls)
        if hasattr(schema, "search_aliases"):
            schema.search_aliases = list(cls.SEARCH)
        return schema

    return define


def _speaking(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, its texts made encodable, the inputs of `execute` checked. The host reads its signature: it stays."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(*args: Any, **inputs: Any) -> Any:
        try:
            if method.__name__ == "execute":
                cls = args[0]
                check_inputs(cls.SCHEMA or cls.GET_SCHEMA(), signature.bind(*args, **inputs).arguments)
            if method.__name__ == "fingerprint_inputs" and any(inputs.get(n, n) is None for n in signature.parameters):
                return LINKED
            return _encodable_result(method(*args, **inputs))
        except Exception as error:
            said = make_encodable(short_error(error))
            if said is error:
                raise
        raise said

    call.__signature__ = signature  # type: ignore[attr-defined]  # `getfullargspec` follows no wrapper
    return call


def _encodable_result(result: Any) -> Any:
    if not isinstance(result, io.NodeOutput):
        return encodable_parts(short_paths(result) if isinstance(result, str) else result)
    result.args = tuple(encodable_parts(part) for part in result.args)
    if result.ui is not None:
        shown = result.ui if isinstance(result.ui, dict) else result.ui.as_dict()
        result.ui = encodable_parts(shown)
    return result
