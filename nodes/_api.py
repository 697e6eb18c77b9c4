"""Import of the host's node API, in this file only, so that pinning a version is one line."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from comfy_api.latest import io, ui

from ..controlnext_core.comfy_adapter.control_node import ControlNode

__all__ = ["ControlNode", "blame", "io", "refuse_wrong_choice", "ui", "wrong_choice"]


def wrong_choice(**chosen: tuple[str | None, Collection[str]]) -> str:
    """Fault of combo values, {input: (value, options)}, as a sentence; empty for none.

    For `validate_inputs`: earlier hosts check the combos of older kinds of nodes only. Connected inputs have no value
    yet and are None.
    """
    return " ".join(
        f"{name}: {value!r} is not one of {', '.join(options)}."
        for name, (value, options) in chosen.items()
        if value is not None and value not in options
    )


def refuse_wrong_choice(**chosen: tuple[str, Collection[str]]) -> None:
    """Raise ValueError for a wrong value of a combo; called by `execute`. chosen: {input: (value, options)}.

    The host shows an error of `validate_inputs` on every input that this method accepts. A node that checks a text
    there therefore accepts only the text, and checks its combos here. Later hosts check combos by themselves.
    """
    if wrong := wrong_choice(**chosen):
        raise ValueError(wrong)


def blame(parse: Callable[[str], Any], text: str | None) -> bool | str:
    """Result of `validate_inputs` for its one text: True, or the message of the ValueError that `parse` raises.

    text: None for a connected input, which has no value yet.
    """
    try:
        parse(text or "")
    except ValueError as error:
        return str(error)
    return True
