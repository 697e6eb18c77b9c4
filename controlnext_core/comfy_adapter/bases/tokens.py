"""Tools shared by the diffusion transformers: the picture's tokens as a map, and three doors after a block.

Tokens are (batch, N, D), those of a picture row by row. Tokens of text, of other reference pictures and of padding may
come before and after them.
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
"""Key of this pack in `transformer_options`: shape of the reference latent given to the coming forward."""

Start = Callable[[Tensor, int, TransformerOptions], int]
"""(tokens, number of the picture's tokens, options of the forward) -> index of the picture's first token."""


def note_reference(options: TransformerOptions, given: Mapping[str, Any]) -> None:
    """Record the shape of the coming forward's reference latent, or None. given: its conditions by the host's names."""
    reference = given.get("reference_latent")
    options[REFERENCE_KEY] = tuple(reference.shape) if isinstance(reference, Tensor) else None


def from_the_front(tokens: Tensor, count: int, options: TransformerOptions) -> int:
    """Start index 0, for a stream that begins with the picture's tokens."""
    return 0


def after_the_reference(tokens: Tensor, count: int, options: TransformerOptions) -> int:
    """Number of tokens of the reference frame, (batch, C, H, W), which come first; 0 without one."""
    reference = options.get(REFERENCE_KEY)
    return 0 if reference is None else (reference[-2] // PATCH) * (reference[-1] // PATCH)


@dataclass(frozen=True, slots=True)
class FromTheEnd:
    """Index of the picture's first token where they come last, padded at the end to a multiple of `multiple` tokens."""

    multiple: int = 1

    def __call__(self, tokens: Tensor, count: int, options: TransformerOptions) -> int:
        return tokens.shape[1] - math.ceil(count / self.multiple) * self.multiple


@dataclass(frozen=True, slots=True)
class PictureTokens:
    """Conversion between tokens (batch, N, D) and maps (batch, D, H, W): `Place.to_map` and `Place.from_map`.

    The host pads a latent of an odd size to whole tokens. The frames of a video latent are stacked along the height
    into one sample: (batch, D, T * H, W).
    """

    start: Start = from_the_front

    def to_map(self, tokens: Tensor, forward: Forward) -> Tensor | None:
        """View of the picture's tokens as a map; None where there are fewer tokens than the latent needs."""
        found = self._range(tokens, forward)
        if found is None:
            return None
        start, count, width = found
        return tokens[:, start : start + count].transpose(1, 2).unflatten(2, (-1, width))

    def from_map(self, added: Tensor, tokens: Tensor, forward: Forward) -> Tensor:
        """New tokens: those of the picture from the map, all others unchanged."""
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
    """Replacement in the host's slot for one block: runs the block, or an earlier replacement; then adds
    the controls.
    """

    def __init__(self, block: Block, add: AddControls, options: TransformerOptions, earlier: Any) -> None:
        self.block, self.add, self.options, self.earlier = block, add, options, earlier

    def __call__(self, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        out = extra["original_block"](args) if self.earlier is None else self.earlier(args, extra)
        return {**out, "img": self.add(out["img"], args.get("transformer_options", self.options))}


def replace_block(options: TransformerOptions, block: Block, add: AddControls) -> None:
    """Door after a block that the host lets packs replace; another pack's replacement runs inside this one."""
    replaced = dict(options.get("patches_replace", {}))
    blocks = dict(replaced.get("dit", {}))
    earlier = blocks.get(block)
    if isinstance(earlier, BlockReplacement):
        earlier = earlier.earlier
    blocks[block] = BlockReplacement(block, add, options, earlier)
    options["patches_replace"] = {**replaced, "dit": blocks}


class BlockPatch:
    """Patch that the host calls after every block; it acts only on its own block."""

    def __init__(self, block: Block, add: AddControls) -> None:
        self.block, self.add = block, add

    def after(self, args: dict[str, Any]) -> dict[str, Any]:
        """Add the controls to `img` of args: the picture's tokens with their padding, as a view of
        the host's tensor.
        """
        if args["block_index"] != self.block[1]:
            return {}
        tokens = args["img"]
        if tokens.requires_grad:  # the host overwrites them with the result, and autograd needs them
            tokens = tokens.clone()
        return {"img": self.add(tokens, args["transformer_options"])}


def patch_block(options: TransformerOptions, block: Block, add: AddControls) -> None:
    """Door after a block, for hosts that call a list of patches named after the kind of block."""
    put_first(options, block[0], BlockPatch(block, add).after)


class HookedForward:
    """Wrapper around the model's forward that hooks one of its blocks during the call."""

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
    """Door after a block of `layers` by a forward hook, for hosts without patches there."""
    wrappers = dict(options.get("wrappers", {}))
    kind = WrappersMP.DIFFUSION_MODEL
    ours = {f"{WRAPPERS_KEY}_{block[1]}": [HookedForward(block, add, options)]}
    options["wrappers"] = {**wrappers, kind: {**wrappers.get(kind, {}), **ours}}
