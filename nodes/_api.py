"""The host's node API, imported here alone, so that pinning a version is one line."""

from __future__ import annotations

from collections.abc import Collection

from comfy_api.latest import io, ui

from ..controlnext_core.comfy_adapter.control_node import ControlNode

__all__ = ["ControlNode", "io", "ui", "wrong_choice"]


def wrong_choice(**chosen: tuple[str | None, Collection[str]]) -> str:
    """What is wrong with the values of combos, {input: (value, options)}; empty for nothing.

    For `validate_inputs`: earlier hosts check the combos of older kinds of nodes only. Inputs that are connected have
    no value yet and come as None.
    """
    return " ".join(
        f"{name}: {value!r} is not one of {', '.join(options)}."
        for name, (value, options) in chosen.items()
        if value is not None and value not in options
    )
