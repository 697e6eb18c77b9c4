"""Table of base models. The rows are tried in order, from the top."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...key_maps import KeyMap
from ...specs import Family
from .base import Base, LoadedBase
from .transformers import TRANSFORMERS
from .unet import UNETS


def _no_key_map(config: Mapping[str, Any]) -> KeyMap:
    raise ValueError(
        "the connected model is of no family that controls are made for. Connect a model of another family."
    )


UNKNOWN = Base(
    family=Family.OTHER,
    matches=lambda model: True,
    places=lambda model: {},
    key_map=_no_key_map,
    encoder_time=lambda model_sampling, sigmas: sigmas,
    trainable={},
    sides={},
)
"""Row for a model that matches no other row; it takes no controls."""

BASES: tuple[Base, ...] = (*UNETS, *TRANSFORMERS, UNKNOWN)


def loaded_base(model: Any) -> LoadedBase:
    """Row and places of a host BaseModel (the `.model` of a MODEL)."""
    row = next(row for row in BASES if row.matches(model))
    return LoadedBase(row, dict(model.model_config.unet_config), row.places(model))
