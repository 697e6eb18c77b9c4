"""Parts that diffusion transformers share: the picture's tokens as a map, and the three ways to the end of a block.

Tokens are (rows, N, D), a picture's row by row; text, references of other pictures and padding may stand around them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .base import AddControls, Block, Forward, put_first
from .forward_options import TransformerOptions

WRAPPERS_KEY = "controlnext_block"
PATCH = 2
"""Latent cells along one side of a token."""

REFERENCE_KEY: Final = "controlnext_reference"
"""Our key in `transformer_options`: shape of the reference latent that the coming forward is given."""

Start = Callable[[Tensor, int, TransformerOptions], int]
"""(tokens, number of the picture's tokens, options of the forward) -> index of the picture's first token."""


def note_reference(options: TransformerOptions, given: Mapping[str, Any]) -> None:
    """Note the shape of the coming forward's reference latent, or None; given: its conditions by the host's names."""
    reference = given.get("reference_latent")
    options[REFERENCE_KEY] = tuple(reference.shape) if isinstance(reference, Tensor) else None


def from_the_front(tokens: Tensor, count: int, options: TransformerOptions) -> int:
    """Index of the picture's first token in a stream that begins with the picture."""
    return 0


def after_the_reference(tokens: Tensor, count: int, options: TransformerOptions) -> int:
    """Number of tokens of the reference frame, (rows, C, H, W), which come first; 0 without one."""
    reference = options.get(REFERENCE_KEY)
    return 0 if reference is None else (reference[-2] // PATCH) * (reference[-1] // PATCH)


@dataclass(frozen=True, slots=True)
class FromTheEnd:
    """Index of the picture's first token where they come last, padded at the end to a multiple of `multiple`."""

    multiple: int = 1

    def __call__(self, tokens: Tensor, count: int, options: TransformerOptions) -> int:
        return tokens.shape[1] - math.ceil(count / self.multiple) * self.multiple


@dataclass(frozen=True, slots=True)
class PictureTokens:
    """The way between (rows, N, D) and maps (rows, D, H, W): `Place.to_map` and `Place.from_map`.

    A latent of an odd size is padded by the host to whole tokens. The frames of a latent that has some lie below each
    other, in one sample: (rows, D, T * H, W).
    """

    start: Start = from_the_front

    def to_map(self, tokens: Tensor, forward: Forward) -> Tensor | None:
        """A view of the picture's tokens; None where there are fewer than the latent has."""
        found = self._range(tokens, forward)
        if found is None:
            return None
        start, count, width = found
        return tokens[:, start : start + count].transpose(1, 2).unflatten(2, (-1, width))

    def from_map(self, added: Tensor, tokens: Tensor, forward: Forward) -> Tensor:
        """New tokens: the picture's from the map, all others as they were."""
        found = self._range(tokens, forward)
        assert found is not None, "a map without its tokens"
        start, count, _ = found
        picture = added.flatten(2).transpose(1, 2)
        if count == tokens.shape[1]:
            return picture.contiguous()
        return torch.cat([tokens[:, :start], picture, tokens[:, start + count :]], dim=1)

    def _range(self, tokens: Tensor, forward: Forward) -> tuple[int, int, int] | None:
        """(first, count, tokens along a row of the picture)"""
        height, width = (math.ceil(side / PATCH) for side in forward.latent[-2:])
        frames = forward.latent[2] if len(forward.latent) == 5 else 1
        count = frames * height * width
        start = self.start(tokens, count, forward.options)
        return (start, count, width) if 0 <= start and start + count <= tokens.shape[1] else None


class BlockReplacement:
    """Replacement in the host's slot for one block: runs the block, or an earlier replacement; adds the controls."""

    def __init__(self, block: Block, add: AddControls, options: TransformerOptions, earlier: Any) -> None:
        self.block, self.add, self.options, self.earlier = block, add, options, earlier

    def __call__(self, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        out = extra["original_block"](args) if self.earlier is None else self.earlier(args, extra)
        return {**out, "img": self.add(out["img"], args.get("transformer_options", self.options))}


def replace_block(options: TransformerOptions, block: Block, add: AddControls) -> None:
    """Door after a block that the host allows to be replaced; another pack's replacement runs inside this one."""
    replaced = dict(options.get("patches_replace", {}))
    blocks = dict(replaced.get("dit", {}))
    earlier = blocks.get(block)
    if isinstance(earlier, BlockReplacement):
        earlier = earlier.earlier
    blocks[block] = BlockReplacement(block, add, options, earlier)
    options["patches_replace"] = {**replaced, "dit": blocks}


class BlockPatch:
    """Patch that the host calls after every block, and that acts on one of them."""

    def __init__(self, block: Block, add: AddControls) -> None:
        self.block, self.add = block, add

    def after(self, args: dict[str, Any]) -> dict[str, Any]:
        """args: `img` is the picture's tokens with their padding, as a view of the host's."""
        if args["block_index"] != self.block[1]:
            return {}
        tokens = args["img"]
        if tokens.requires_grad:  # the host overwrites them with the result, and autograd needs them
            tokens = tokens.clone()
        return {"img": self.add(tokens, args["transformer_options"])}


def patch_block(options: TransformerOptions, block: Block, add: AddControls) -> None:
    """Door after a block of a host that calls patches named as the kind of block."""
    put_first(options, block[0], BlockPatch(block, add).after)


class HookedForward:
    """A wrapper around the model's forward that hooks one of its blocks while it runs."""

    def __init__(self, block: Block, add: AddControls, options: TransformerOptions) -> None:
        self.block, self.add, self.options = block, add, options

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = kwargs.get("transformer_options", self.options)
        module = executor.class_obj.layers[
            self.block[1]
        ]  # several GPUs have a copy of the model each: the one that runs
        handle = module.register_forward_hook(lambda module, inputs, tokens: self.add(tokens, options))
        try:
            return executor(*args, **kwargs)
        finally:
            handle.remove()


def hook_block(options: TransformerOptions, block: Block, add: AddControls) -> None:
    """Door after a block of `layers`, where the host has no other."""
    wrappers = dict(options.get("wrappers", {}))
    kind = WrappersMP.DIFFUSION_MODEL
    ours = {f"{WRAPPERS_KEY}_{block[1]}": [HookedForward(block, add, options)]}
    options["wrappers"] = {**wrappers, kind: {**wrappers.get(kind, {}), **ours}}
