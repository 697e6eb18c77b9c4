"""Type checks of node inputs.

The host checks links only: a prompt of the API may contain any value in place of a link.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from comfy_api.latest import io
from torch import Tensor

MAX_SHOWN = 60


def _is_pictures(value: Any) -> bool:
    """True: a float tensor with 3 or 4 dimensions, with channels or, for masks, without.

    The nodes check further shapes.
    """
    return isinstance(value, Tensor) and value.ndim in (3, 4) and value.is_floating_point()


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda value: all(hasattr(value, name) for name in names)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "MODEL": (_has("clone", "model", "model_options"), "Connect a MODEL, as of a checkpoint loader"),
    "CONTROL_NET": (_has("set_cond_hint", "get_control"), "Connect a CONTROL_NET, as of Load ControlNeXt"),
    "CLIP": (_has("tokenize", "encode_from_tokens"), "Connect a CLIP, as of a checkpoint loader"),
    "CLIP_VISION": (_has("encode_image"), "Connect a CLIP_VISION, as of a checkpoint loader"),
    "VAE": (_has("encode", "decode"), "Connect a VAE, as of a checkpoint loader"),
    "IMAGE": (_is_pictures, "Connect an IMAGE, as of Load Image"),
    "MASK": (lambda value: isinstance(value, Tensor), "Connect a MASK, as of Load Image"),
    "CONTROL_DATASET": (_has("settings", "open"), "Connect a Control Dataset node"),
    "TILE_LAYOUT": (_has("places", "count"), "Connect the layout of ControlNeXt Split into Tiles"),
    "INT": (lambda value: isinstance(value, numbers.Integral), "Give a whole number"),
    "FLOAT": (_is_number, "Give a finite number"),
    "BOOLEAN": (lambda value: isinstance(value, numbers.Integral), "Give true or false"),
    "STRING": (lambda value: isinstance(value, str), "Give a text"),
    "COMBO": (lambda value: isinstance(value, str), "Choose one of the list"),
}
"""Host's name of a type -> (test of a value, remedy). Types of other packs are checked by their nodes."""

WIDGETS = ("INT", "FLOAT", "BOOLEAN", "STRING", "COMBO")
"""Types of inputs that always have a value."""


def check_inputs(schema: io.Schema, inputs: Mapping[str, Any]) -> None:
    """Raise ValueError that names the first input whose value has another type than the node's schema says.

    inputs: values by name; lists of values for a node that takes lists. None means an optional input without a link.
    """
    for wanted in schema.inputs:
        kind = KINDS.get(str(wanted.get_io_type()))
        link = str(wanted.get_io_type()) not in WIDGETS
        if kind is None or wanted.id not in inputs or (link and wanted.optional and inputs[wanted.id] is None):
            continue
        fits, remedy = kind
        for value in inputs[wanted.id] if schema.is_input_list else [inputs[wanted.id]]:
            if not fits(value):
                raise ValueError(f"{wanted.id}: is {_shown(value)}. {remedy}.")


def _shown(value: Any) -> str:
    """Short text for a value; its type where it is not a plain value."""
    if value is None or isinstance(value, bool | int | float | str):
        text = repr(value)
        return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} in {str(value.dtype).removeprefix('torch.')}"
    return f"a value of the kind {type(value).__name__}"
