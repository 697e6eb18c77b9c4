"""The seam to base models: a `Base` is one family, a `Place` one site in a loaded model of it.

Everything else works on maps (samples, C, H, W), whatever the base: a sample is what statistics are taken over, an
image of the batch, a frame, or a whole clip of a base that has one sequence for all its frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ...key_maps import KeyMap
from ...low_rank import Part, Slice, chosen_slices
from ...specs import Family, Site, Spec
from .forward_options import TransformerOptions

Block = tuple[str, int]
"""A block as the host names it, such as ("input", 3) or ("double_block", 0)."""


@dataclass(frozen=True, slots=True)
class Forward:
    """Facts of one forward, as known at the place that it passes."""

    options: TransformerOptions
    latent: tuple[int, ...]
    """Shape of the latent that the control was prepared for: (rows, C, H, W) or (rows, C, T, H, W)."""
    given: Mapping[str, Any]
    """Further values from the host beside the tensor, such as the number of tokens before the picture's."""


class AddControls(Protocol):
    """Adds all controls of a place to the tensor that the host has there."""

    def __call__(self, tensor: Tensor, options: TransformerOptions, **given: Any) -> Tensor:
        """tensor: in the host's layout; given: see `Forward`. Returns the same layout, as a new tensor."""


Door = Callable[[TransformerOptions, Block, AddControls], None]
"""(options of the coming forward, block, add) -> the host calls `add` after this block, in this forward alone.

A door replaces lists and dictionaries inside the options and never writes to them, takes the place of what the same
door put at the same block before, and leaves patches of others in force, ours first."""


def _same_layout(tensor: Tensor, forward: Forward) -> Tensor:
    return tensor


def _whole_tensor(added: Tensor, tensor: Tensor, forward: Forward) -> Tensor:
    return added


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One site of a loaded base model."""

    door: Door
    block: Block
    width: int
    """Channels of a feature there, which the control's encoder must have."""
    cell: int
    """Pixels of the picture along one side of a feature."""
    to_map: Callable[[Tensor, Forward], Tensor | None] = _same_layout
    """(the host's tensor, forward) -> (samples, C, H, W), of the picture's features alone; None where the tensor does
    not hold as many as the latent has."""
    from_map: Callable[[Tensor, Tensor, Forward], Tensor] = _whole_tensor
    """(map with the controls, the host's tensor, forward) -> the host's layout, all but the picture's features as it
    was."""


ALL = "all"
"""Name of the subset that holds every weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """One family of base models, as the host has it. What is known without the host is in `families.FAMILIES`."""

    family: Family
    matches: Callable[[Any], bool]
    """(the host's BaseModel) -> True where it is of this family."""
    places: Callable[[Any], dict[Site, Place]]
    """(the host's BaseModel) -> where controls can be added."""
    key_map: Callable[[Mapping[str, Any]], KeyMap]
    """(the host's `unet_config`) -> published name of each weight -> its name in the host."""
    encoder_time: Callable[[Any, Tensor], Tensor]
    """(the host's model_sampling, sigmas (n,)) -> timesteps (n,) for a control's encoder."""
    trainable: Mapping[str, str]
    """Name of a subset -> regular expression searched in the host's names of the weights in it."""
    sides: Mapping[str, str]
    """Group of blocks as a setting names it -> start of the host's names of its weights; a number may follow."""
    fused: Mapping[str, Part] = field(default_factory=dict)
    """Regular expression searched in the host's names -> the part of such a weight that a named subset means."""

    def slices(self, subset: str, shapes: Mapping[str, torch.Size], names: Iterable[str]) -> dict[str, Slice]:
        """Slices that a subset means of those of its weights that are fused; `all` and expressions mean whole ones.

        shapes: of the base's weights by the host's names; names: of the weights in the subset.
        """
        return chosen_slices(shapes, names, self.fused) if subset in self.trainable and subset != ALL else {}


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A loaded model, as far as it decides whether and where a control fits."""

    row: Base
    config: Mapping[str, Any]
    """The host's `unet_config`."""
    places: Mapping[Site, Place]
    """Sites at which controls can be added; empty: this model takes none."""

    @property
    def family(self) -> Family:
        return self.row.family

    def key_map(self) -> KeyMap:
        """Published name of each weight -> its name in this model. Raises ValueError where there are none."""
        return self.row.key_map(self.config)


def check_pair(base: LoadedBase, spec: Spec, out_channels: int, name: str) -> None:
    """Raise ValueError unless a control of `spec` fits this base model; `name` is the control's file."""
    if base.family is not spec.family:
        raise ValueError(
            f"{name}: is a {spec.family.value} control ({spec.name}), but the connected model is "
            f"{base.family.value}. Connect a {spec.family.value} checkpoint or choose another control."
        )
    width = base.places[spec.fusion.site].width
    if width != out_channels:
        raise ValueError(
            f"{name}: gives {out_channels} channels, but the model has {width} {spec.fusion.site.value}. "
            f"Connect the {spec.family.value} checkpoint that this control was trained for."
        )


def put_first(options: TransformerOptions, name: str, patch: Any) -> None:
    """Put a patch at the head of the host's list `name`, in place of the one of ours for the same block.

    patch: a method of an object that has a `block`. At the head, others (FreeU, deep shrink) see controlled features.
    """
    ours = patch.__self__

    def is_older(other: Any) -> bool:
        owner: Any = getattr(other, "__self__", None)
        return type(owner) is type(ours) and owner.block == ours.block

    patches = dict(options.get("patches", {}))
    patches[name] = [patch, *(other for other in patches.get(name, []) if not is_older(other))]
    options["patches"] = patches
