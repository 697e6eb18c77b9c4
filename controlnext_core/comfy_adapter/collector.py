"""The patches of one forward: every control of a site adds itself in one go, against the same features."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..injection import Term, fuse
from .base_facts import Block

KEY = "controlnext"
"""Our key in `transformer_options` and for wrappers, attachments and additional models."""

AFTER_SKIP, BEFORE_OUTPUT = "input_block_patch_after_skip", "output_block_patch"


@dataclass(frozen=True)
class Job:
    """One control's part in one forward."""

    block: Block
    order: tuple[Any, ...]
    """Sorts the controls of a site, so that the order of nodes does not change the rounding."""
    term: Callable[[Tensor, dict[str, Any]], Term | None]
    """(h, transformer_options) -> what to add, or None."""


class Collector:
    """Holds the jobs of one forward; its two methods are the patches that the host calls."""

    def __init__(self, jobs: tuple[Job, ...] = ()) -> None:
        self.jobs = jobs
        self.blocks = tuple({job.block for job in jobs})
        self.add = untraced(self._add)

    def __deepcopy__(self, memo: dict[int, Any]) -> Collector:
        return self  # packs that copy transformer_options must not copy encoders with it

    def after_skip(self, h: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        """input_block_patch_after_skip: the skip is stored, the next block gets the control."""
        return self.add(h, transformer_options) if transformer_options["block"] in self.blocks else h

    def before_output(self, h: Tensor, skip: Tensor, transformer_options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """output_block_patch: acts on h, before it meets the skip."""
        return (self.add(h, transformer_options) if transformer_options["block"] in self.blocks else h), skip

    def _add(self, h: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        block = tuple(transformer_options["block"])
        jobs = sorted((job for job in self.jobs if job.block == block), key=lambda job: job.order)
        terms = [term for job in jobs if (term := job.term(h, transformer_options)) is not None]
        return fuse(h, terms) if terms else h


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as torch.compile leaves it alone: one break of the graph, and no guards on what is inside.

    Where nobody has compiled anything it stays as it is: to ask for more would import the compiler, for a second.
    """
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


def collect(transformer_options: dict[str, Any], job: Job) -> None:
    """Put a job into the options of the coming forward, which must belong to that forward alone.

    The lists and dictionaries inside are replaced, not written to. Our patches come first in their lists, so
    that others (FreeU, deep shrink) see the controlled features.
    """
    old: Collector | None = transformer_options.get(KEY)
    new = Collector((*(old.jobs if old else ()), job))
    patches = dict(transformer_options.get("patches", {}))
    for name in (AFTER_SKIP, BEFORE_OUTPUT):
        others = [p for p in patches.get(name, []) if not isinstance(getattr(p, "__self__", None), Collector)]
        ours = new.after_skip if name == AFTER_SKIP else new.before_output
        patches[name] = [ours, *others]
    transformer_options["patches"] = patches
    transformer_options[KEY] = new
