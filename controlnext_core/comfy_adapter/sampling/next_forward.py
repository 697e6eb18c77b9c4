"""Controls of one forward: all controls at a place are added at once, measured against the same features."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ...injection import Term, fuse
from ..bases.base import Block, Forward, Place
from ..bases.forward_options import TransformerOptions
from ..feedback import log_once

KEY: Final = "controlnext"
"""Key of this pack in `transformer_options` and for wrappers, attachments and additional models."""


@dataclass(frozen=True)
class Job:
    """Part of one control in one forward."""

    order: tuple[Any, ...]
    """Sort key of the controls at a place, so that the order of nodes does not change the rounding."""
    term: Callable[[Tensor, TransformerOptions], Term | None]
    """(map at the place (samples, C, H, W), transformer_options) -> term to add, or None."""
    owner: object
    """Object that joins a forward once: its next job replaces this one."""


class Collector:
    """Jobs at one place in one forward."""

    def __init__(self, place: Place, latent: tuple[int, ...], jobs: tuple[Job, ...]) -> None:
        self.place, self.latent, self.jobs = place, latent, jobs
        self.add = untraced(self._add)

    def __deepcopy__(self, memo: dict[int, Any]) -> Collector:
        return self  # packs that copy transformer_options must not copy encoders with it

    def _add(self, tensor: Tensor, options: TransformerOptions, **given: Any) -> Tensor:
        """`AddControls` of this place."""
        forward = Forward(options, self.latent, given)
        h = self.place.to_map(tensor, forward)
        if h is None:
            log_once("a picture of %s latent cells does not fit the model's tokens: no control is added.", self.latent)
            return tensor
        jobs = sorted(self.jobs, key=lambda job: job.order)
        terms = [term for job in jobs if (term := job.term(h, options)) is not None]
        return self.place.from_map(fuse(h, terms), tensor, forward) if terms else tensor


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Function excluded from torch.compile: one break of the graph, and no guards on its contents.

    Where nothing was compiled, the function is returned unchanged: wrapping would import the compiler, which takes a
    second.
    """
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


def collect(options: TransformerOptions, place: Place, latent: tuple[int, ...], job: Job) -> None:
    """Add a job to the options of the coming forward, in place of an earlier job of the same owner.

    The options may be those of several forwards in succession, as of packs that sample in tiles, which call a control
    again for each. latent: shape of the denoised latent, see `Forward`. Dictionaries inside the options are replaced,
    not written to.
    """
    others: dict[Block, Collector] = options.get(KEY, {})
    jobs = others[place.block].jobs if place.block in others else ()
    collector = Collector(place, latent, (*(other for other in jobs if other.owner is not job.owner), job))
    options[KEY] = {**others, place.block: collector}
    place.door(options, place.block, collector.add)
