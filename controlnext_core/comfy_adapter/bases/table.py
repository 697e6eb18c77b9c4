"""THE table of base models. A family is tried after those above it."""

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
"""Every model that no row knows: nothing can be added to it."""

BASES: tuple[Base, ...] = (*UNETS, *TRANSFORMERS, UNKNOWN)


def loaded_base(model: Any) -> LoadedBase:
    """The row and the places of a host BaseModel (what a MODEL's patcher holds as `.model`)."""
    row = next(row for row in BASES if row.matches(model))
    return LoadedBase(row, dict(model.model_config.unet_config), row.places(model))
