"""Trainable weights of the base, as differences, because a difference is saved and loaded.

The base's weight stays frozen in its own dtype; the layer computes with base + difference, formed in fp32, exactly
as the host does when the saved file is put on a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..controlnext_core.key_maps import KeyMap, as_target
from .choices import SUBSETS
from .config import ConfigError, parse_blocks
from .patterns import Pattern

SIDES = {"input": "input_blocks.", "middle": "middle_block.", "output": "output_blocks."}
"""Side of the UNet in a setting -> start of the host's names."""


class AddBase(nn.Module):
    """Parametrization: base + difference in fp32."""

    base: Tensor

    def __init__(self, base: Tensor) -> None:
        super().__init__()
        self.register_buffer("base", base, persistent=False)

    def forward(self, difference: Tensor) -> Tensor:
        """difference: any shape, fp32. Returns the layer's weight in fp32 on the difference's device."""
        return self.base.to(difference.device, torch.float32) + difference


@dataclass(frozen=True)
class Differences:
    """The differences that train, by host name."""

    parameters: dict[str, nn.Parameter]

    def tensors(self) -> dict[str, Tensor]:
        """Differences by host name, without gradients."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values by host name into the parameters. Raises ValueError where the names differ."""
        if tensors.keys() != self.parameters.keys():
            wrong = sorted(tensors.keys() ^ self.parameters.keys())
            raise ValueError(
                f"{len(wrong)} weights are not those that train, first {wrong[0]}. Set trainable and blocks as they "
                "were when the file was trained."
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.parameters[name].copy_(tensor)


def selected(key_map: KeyMap, trainable: str, blocks: str) -> list[str]:
    """Host names of the UNet's tensors that train, sorted.

    trainable: a key of SUBSETS or `re:EXPRESSION` (a `Pattern`), over published names; blocks: as `parse_blocks` reads
    it. Raises ConfigError where a choice other than `none` selects nothing.
    """
    search = Pattern(trainable[3:]).search if trainable.startswith("re:") else re.compile(SUBSETS[trainable]).search
    sides = parse_blocks(blocks)
    names = {as_target(target).name for published, target in key_map.items() if search(published)}
    chosen = sorted(name for name in names if not sides or _inside(name, sides))
    if not chosen and trainable != "none":
        raise ConfigError(
            f"trainable: {trainable!r} in blocks {blocks or 'of every kind'!r} selects none of the {len(key_map)} "
            "weights of this UNet. Set trainable = none to train the encoder alone."
        )
    return chosen


def _inside(name: str, sides: Mapping[str, range | None]) -> bool:
    for side, numbers in sides.items():
        if name.startswith(SIDES[side]):
            return numbers is None or int(name.split(".")[1]) in numbers
    return False


def train_differences(unet: nn.Module, names: list[str], device: torch.device) -> Differences:
    """Make the tensors of these names base + difference; the difference, zero on `device`, trains."""
    parameters = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = unet.get_submodule(path)
        base: Tensor = getattr(module, leaf).detach()
        module.register_parameter(leaf, nn.Parameter(torch.zeros(base.shape, dtype=torch.float32, device=device)))
        parametrize.register_parametrization(module, leaf, AddBase(base))
        parameters[name] = module.parametrizations[leaf].original  # type: ignore[union-attr, index]
    return Differences(parameters)
