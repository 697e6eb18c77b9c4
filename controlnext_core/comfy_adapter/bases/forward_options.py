"""Keys of the host's `transformer_options` that this pack reads or writes; it touches no others.

The host makes a fresh dictionary for each forward. Other packs add further keys, which are left alone.
"""

from __future__ import annotations

from typing import Any, TypedDict

from torch import Tensor


class AnimateDiffWindow(TypedDict, total=False):
    """Window of AnimateDiff-Evolved, the value of `ad_params`."""

    sub_idxs: list[int] | None
    """Indices of the window's frames in the whole video; None outside of windows."""
    full_length: int
    """Number of frames of the whole video."""


class TransformerOptions(TypedDict, total=False):
    """Host's options for one forward. Any key may be missing: hosts differ, and so do their models."""

    block: tuple[str, int]
    """UNets: the block that calls a patch, such as ("input", 3)."""
    original_shape: list[int]
    """UNets: shape of the latent given to the forward."""
    patches: dict[str, list[Any]]
    """Name of a patch -> functions, in calling order."""
    patches_replace: dict[str, dict[Any, Any]]
    """Kind of network ("dit") -> block -> function that runs in place of the block."""
    wrappers: dict[str, dict[Any, list[Any]]]
    """Kind of wrapper -> key of its owner -> functions."""
    cond_or_uncond: list[int]
    """One number for each chunk of the batch: its index in the list of conditionings, 0 positive and 1 negative."""
    sample_sigmas: Tensor
    """The sampler's schedule, (steps + 1,), descending."""
    context_window: Any
    """Window over a video, the host's (IndexListContextWindow) or this pack's; None outside of windows."""
    ad_params: AnimateDiffWindow | None
    optimized_attention_override: Any
    """Function that computes attention in place of the host's own; the trainer sets it."""

    controlnext: dict[tuple[str, int], Any]
    """Key of this pack: block -> the `Collector` of the controls there."""
    controlnext_conds: int
    """Key of this pack: length of the list of conditionings, see halves.py."""
    controlnext_latents: int
    """Key of this pack: number of latents of the sampled batch, see halves.py."""
    controlnext_sigma: tuple[Tensor, float]
    """Key of this pack: sigmas of the forward on their device, and the first of them as a number."""
    controlnext_reference: tuple[int, ...] | None
    """Key of this pack: shape of the reference latent given to the coming forward."""
