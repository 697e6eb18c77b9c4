"""Keys of the host's `transformer_options` that this pack reads or writes; nothing else of it is touched.

The host makes a fresh dictionary for each forward. Other packs add keys of their own, which are left alone.
"""

from __future__ import annotations

from typing import Any, TypedDict

from torch import Tensor


class AnimateDiffWindow(TypedDict, total=False):
    """Window of AnimateDiff-Evolved, in `ad_params`."""

    sub_idxs: list[int] | None
    """Frames of the window, by their place in the whole video; None outside of windows."""
    full_length: int
    """Frames of the whole video."""


class TransformerOptions(TypedDict, total=False):
    """The host's options of one forward. A key may be missing: hosts differ, and so do their models."""

    block: tuple[str, int]
    """UNets: the block that calls a patch, such as ("input", 3)."""
    original_shape: list[int]
    """UNets: shape of the latent that the forward was given."""
    patches: dict[str, list[Any]]
    """Name of a patch -> functions, in the order in which they are called."""
    patches_replace: dict[str, dict[Any, Any]]
    """Kind of network ("dit") -> block -> function that runs in its place."""
    wrappers: dict[str, dict[Any, list[Any]]]
    """Kind of wrapper -> key of its owner -> functions."""
    cond_or_uncond: list[int]
    """One number for each chunk of the batch: its place in the list of conditionings, 0 positive and 1 negative."""
    sample_sigmas: Tensor
    """The sampler's schedule, (steps + 1,), descending."""
    context_window: Any
    """The host's window over a video (IndexListContextWindow), and that of this pack; None outside of windows."""
    ad_params: AnimateDiffWindow | None
    optimized_attention_override: Any
    """Function that computes attention in place of the host's own; the trainer sets it."""

    controlnext: dict[tuple[str, int], Any]
    """Ours: block -> the `Collector` of the controls there."""
    controlnext_conds: int
    """Ours: length of the list of conditionings, see halves.py."""
    controlnext_sigma: tuple[Tensor, float]
    """Ours: the sigmas of the forward on their device, and the first of them as a number."""
    controlnext_reference: tuple[int, ...] | None
    """Ours: shape of the reference latent that the coming forward is given."""
