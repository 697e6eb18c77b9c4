"""Interface to base models: a `Base` is one family, a `Place` one site in a loaded model of it.

All other code works on maps (samples, C, H, W) for every base. A sample is the unit over which statistics are computed:
an image of the batch, a frame, or a whole clip where the base has one sequence for all its frames.
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
"""Block in the host's naming, such as ("input", 3) or ("double_block", 0)."""


@dataclass(frozen=True, slots=True)
class Forward:
    """Facts about one forward, as known where it passes a place."""

    options: TransformerOptions
    latent: tuple[int, ...]
    """Shape of the latent for which the control was prepared: (batch, C, H, W) or (batch, C, T, H, W)."""
    given: Mapping[str, Any]
    """Further values from the host beside the tensor, such as the number of tokens before those of the picture."""


class AddControls(Protocol):
    """Function that adds all controls of a place to the host's tensor there."""

    def __call__(self, tensor: Tensor, options: TransformerOptions, **given: Any) -> Tensor:
        """Add the controls to a tensor in the host's layout; given: see `Forward`.

        Returns the same layout, as a new tensor.
        """


Door = Callable[[TransformerOptions, Block, AddControls], None]
"""(options of the coming forward, block, add): the host calls `add` after this block, in this forward only. A door
replaces lists and dictionaries inside the options and never writes to them. It replaces an earlier patch of the same
door at the same block, and leaves patches of other packs in force, after its own."""


def _same_layout(tensor: Tensor, forward: Forward) -> Tensor:
    return tensor


def _whole_tensor(added: Tensor, tensor: Tensor, forward: Forward) -> Tensor:
    return added


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Site of a loaded base model, at which controls are added."""

    door: Door
    block: Block
    width: int
    """Channels of the features there, which must equal the output channels of the control's encoder."""
    cell: int
    """Pixels of the picture along one side of a feature cell."""
    to_map: Callable[[Tensor, Forward], Tensor | None] = _same_layout
    """(the host's tensor, forward) -> (samples, C, H, W) with the features of the picture only; None where the tensor
    has fewer of them than the latent."""
    from_map: Callable[[Tensor, Tensor, Forward], Tensor] = _whole_tensor
    """(map with the controls, the host's tensor, forward) -> the host's layout; all but the picture's features is
    unchanged."""


ALL = "all"
"""Name of the subset that holds every weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """Family of base models in the host. Facts known without the host are in `families.FAMILIES`."""

    family: Family
    matches: Callable[[Any], bool]
    """(the host's BaseModel) -> True: it belongs to this family. False: it does not."""
    places: Callable[[Any], dict[Site, Place]]
    """(the host's BaseModel) -> places at which controls can be added."""
    key_map: Callable[[Mapping[str, Any]], KeyMap]
    """(the host's `unet_config`) -> published name of each weight -> its name in the host."""
    encoder_time: Callable[[Any, Tensor], Tensor]
    """(the host's model_sampling, sigmas (n,)) -> timesteps (n,) for a control's encoder."""
    trainable: Mapping[str, str]
    """Name of a subset -> regular expression searched in the host's names of the weights in it."""
    sides: Mapping[str, str]
    """Group of blocks, as named in settings -> start of the host's names of its weights; a number may follow."""
    fused: Mapping[str, Part] = field(default_factory=dict)
    """Regular expression searched in the host's names -> the slice of such a fused weight that a named subset
    covers."""

    def slices(self, subset: str, shapes: Mapping[str, torch.Size], names: Iterable[str]) -> dict[str, Slice]:
        """Slices of the fused weights that a named subset covers; `all` and regular expressions cover whole weights.

        shapes: of the base's weights by the host's names; names: of the weights in the subset.
        """
        return chosen_slices(shapes, names, self.fused) if subset in self.trainable and subset != ALL else {}


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """Loaded model, reduced to the facts that decide whether and where a control fits."""

    row: Base
    config: Mapping[str, Any]
    """The host's `unet_config`."""
    places: Mapping[Site, Place]
    """Sites at which controls can be added; empty: this model takes no controls."""

    @property
    def family(self) -> Family:
        return self.row.family

    def key_map(self) -> KeyMap:
        """Published name of each weight -> its name in this model.

        Raises ValueError for a family without published names.
        """
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
    """Insert a patch at the head of the host's list `name`, replacing this pack's earlier patch for the same block.

    patch: a method of an object that has a `block`. At the head, so that others (FreeU, deep shrink) see the controlled
    features.
    """
    ours = patch.__self__

    def is_older(other: Any) -> bool:
        owner: Any = getattr(other, "__self__", None)
        return type(owner) is type(ours) and owner.block == ours.block

    patches = dict(options.get("patches", {}))
    patches[name] = [patch, *(other for other in patches.get(name, []) if not is_older(other))]
    options["patches"] = patches
