"""Trainable weights of the base, as differences, because differences are saved and loaded.

The base's weight stays frozen in its dtype; the layer computes with base + difference, formed in fp32, exactly as the
host does when the saved file is applied to a model. A difference is one tensor, or the product of two low-rank factors,
of a whole weight or of a slice of one in which the host has fused several layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..controlnext_core.families import UNET_SIDES, UNET_SUBSETS
from ..controlnext_core.key_maps import KeyMap, as_target
from ..controlnext_core.low_rank import DOWN, UP, Difference, Key, LowRank, Slice, sliced
from .choices import parse_blocks
from .patterns import Pattern
from .seeding import generator
from .settings import ConfigError
from .widened import SCALE, widened


class AddBase(nn.Module):
    """Parametrization base + difference in fp32."""

    base: Tensor
    scale: Tensor | None

    def __init__(self, base: Tensor, scale: Tensor | None = None, part: Slice | None = None) -> None:
        """scale: factor of the stored base, None: no factor; part: the slice that trains, None: the whole weight."""
        super().__init__()
        self.register_buffer("base", base, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.part = part

    def forward(self, difference: Tensor) -> Tensor:
        """Layer's weight in fp32, on the difference's device. difference: in the shape of the trained part, fp32."""
        base = widened(self.base, self.scale, difference.device, torch.float32)
        if self.part is None:
            return base + difference
        dim, start, length = self.part
        return base.slice_scatter(base.narrow(dim, start, length) + difference, dim, start, start + length)


class AddProduct(AddBase):
    """Parametrization base + up @ down in fp32."""

    def __init__(
        self, base: Tensor, up: Tensor, down: Tensor, scale: Tensor | None = None, part: Slice | None = None
    ) -> None:
        super().__init__(base, scale, part)
        self.start = (up, down)

    def forward(self, up: Tensor, down: Tensor) -> Tensor:  # type: ignore[override]
        """Layer's weight in fp32, on the device of the factors. up: (out, rank), down: (rank, in), fp32."""
        return super().forward(up @ down)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Initial factors; torch calls this once, to register the parameters."""
        return self.start


@dataclass(frozen=True)
class Differences:
    """Trained differences by host name; those of low rank have `NAME.up` and `NAME.down`."""

    parameters: dict[str, nn.Parameter]
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)
    """Shapes of the whole weights."""
    slices: Mapping[str, Slice] = field(default_factory=dict)
    """Slices that are trained, by the names of their weights; other weights are trained whole."""

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name, without gradients."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def by_weight(self) -> dict[Key, Difference]:
        """Differences by the host name of their weight, or by (name, slice), in fp32 on the CPU."""
        tensors = {name: tensor.cpu() for name, tensor in self.tensors().items()}
        found: dict[Key, Difference] = {}
        for name, tensor in tensors.items():
            if name.endswith(UP):
                weight = name.removesuffix(UP)
                found[self._key(weight)] = LowRank(tensor, tensors[weight + DOWN])
            elif not name.endswith(DOWN):
                found[self._key(name)] = tensor
        return found

    def _key(self, weight: str) -> Key:
        return (weight, self.slices[weight]) if weight in self.slices else weight

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values by name into the parameters. Raises ValueError where the names or the shapes differ."""
        wrong = sorted(tensors.keys() ^ self.parameters.keys()) or sorted(
            name for name, tensor in tensors.items() if tensor.shape != self.parameters[name].shape
        )
        if wrong:
            raise ValueError(
                f"{len(wrong)} weights are not those that train, first {wrong[0]}. Set trainable, blocks and rank as "
                "they were when the file was trained."
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.parameters[name].copy_(tensor)


def selected(
    key_map: KeyMap,
    trainable: str,
    blocks: str,
    subsets: Mapping[str, str] = UNET_SUBSETS,
    sides: Mapping[str, str] = UNET_SIDES,
) -> list[str]:
    """Host names of the base's tensors to train, sorted.

    trainable: a key of `subsets`, over the host's names, or `re:EXPRESSION` (a `Pattern`), over the names that
    `key_map` maps from; blocks: in the form of `parse_blocks`; sides: start of the host's names of each group of
    blocks. Raises ConfigError where a choice other than `none` selects nothing, and for a subset or a group of blocks
    that the base lacks.
    """
    names = {published: as_target(target).name for published, target in key_map.items()}
    if trainable.startswith("re:"):
        search = Pattern(trainable[3:]).search
        found = {name for published, name in names.items() if search(published)}
    elif trainable not in subsets:
        raise ConfigError(f"trainable: this base has no {trainable!r}. Choose {', '.join(subsets)} or re:EXPRESSION.")
    else:
        found = set(filter(re.compile(subsets[trainable]).search, names.values()))
    chosen_blocks = parse_blocks(blocks)
    if absent := [side for side in chosen_blocks if side not in sides]:
        raise ConfigError(f"blocks: this base has no blocks named {absent[0]}. Choose {', '.join(sides)}.")
    wanted = {sides[side]: numbers for side, numbers in chosen_blocks.items()}
    chosen = sorted(name for name in found if not wanted or _inside(name, wanted))
    if not chosen and trainable != "none":
        raise ConfigError(
            f"trainable: {trainable!r} in blocks {blocks or 'of every kind'!r} selects none of the {len(key_map)} "
            "weights of this base. Set trainable = none to train the encoder alone."
        )
    return chosen


def _inside(name: str, wanted: Mapping[str, range | None]) -> bool:
    """True: the name is in one of the wanted blocks. wanted: start of host names -> numbers of blocks, None for all."""
    for start, numbers in wanted.items():
        if name.startswith(start):
            return numbers is None or int(name.split(".")[1]) in numbers
    return False


def train_differences(
    network: nn.Module,
    names: list[str],
    device: torch.device,
    rank: int = 0,
    seed: int = 0,
    slices: Mapping[str, Slice] | None = None,
) -> Differences:
    """Replace the tensors of these names by base + difference; the difference, initially zero, trains on `device`.

    rank: of the differences of matrices, 0 for full ones; a matrix that is not wider than the rank, and tensors other
    than matrices, get a full one. seed: of the factors that do not start at zero. slices: parts to train of fused
    weights.
    """
    parameters: dict[str, nn.Parameter] = {}
    shapes, slices = {}, slices or {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = network.get_submodule(path)
        base: Tensor = getattr(module, leaf).detach()
        scale = getattr(module, SCALE, None) if leaf == "weight" else None
        shapes[name], part = base.shape, slices.get(name)
        shape = sliced(base.shape, part)
        if rank and base.ndim == 2 and rank < min(shape):
            factors = _factors(shape, rank, device, seed, name)
            up, down = _train_product(module, leaf, AddProduct(base, *factors, scale, part))
            parameters[name + UP], parameters[name + DOWN] = up, down
            continue
        module.register_parameter(leaf, nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device)))
        parametrize.register_parametrization(module, leaf, AddBase(base, scale, part), unsafe=part is not None)
        parameters[name] = module.parametrizations[leaf].original  # type: ignore[union-attr, index]
    return Differences(parameters, shapes, {name: slices[name] for name in names if name in slices})


def _factors(shape: torch.Size, rank: int, device: torch.device, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Factors (up of zeros, down uniform within 1 / sqrt(in)), so that their product is zero and has a gradient.

    Source: Hu et al. 2021 (LoRA), and its released code.
    """
    down = torch.rand(rank, shape[1], generator=generator(seed, f"low rank {name}", 0)) * 2 - 1
    return torch.zeros(shape[0], rank, device=device), (down * shape[1] ** -0.5).to(device)


def _train_product(module: nn.Module, leaf: str, added: AddProduct) -> tuple[nn.Parameter, nn.Parameter]:
    """Register the two parameters; `unsafe`, since their weight is in fp32 whatever the dtype of the base."""
    parametrize.register_parametrization(module, leaf, added, unsafe=True)
    made: Any = module.parametrizations[leaf]  # type: ignore[index]
    return made.original0.requires_grad_(True), made.original1.requires_grad_(True)
