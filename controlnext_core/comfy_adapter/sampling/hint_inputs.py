"""Hints and masks from the graph: checked, brought to one shape, and identified by their content."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

from torch import Tensor

from ...latent_clips import Clip, Frames, frame_groups
from ..bases.forward_options import TransformerOptions


def clean_hint(hint: Tensor, name: str) -> Tensor:
    """Hint as (n, 1 or 3, H, W) in fp32; see `HostControl.set_cond_hint`."""
    if hint.ndim == 3:
        hint = hint.movedim(1, -1).unsqueeze(1)
    if hint.ndim != 4 or hint.shape[1] not in (1, 3, 4) or 0 in hint.shape:
        raise ValueError(
            f"{name}: the hint has shape {list(hint.shape)} (batch, channels, height, width); 1, 3 or 4 channels and "
            "at least one image are needed. Connect an IMAGE."
        )
    hint = hint[:, :3].float()
    if not math.isfinite(float(hint.sum())) and not bool(hint.isfinite().all()):
        raise ValueError(f"{name}: the hint holds NaN or infinite values. Check the node that makes it.")
    return hint


def clean_mask(mask: Tensor | None) -> Tensor | None:
    """MASK (H, W), (n, H, W) or (n, 1, H, W) as (n, 1, H, W) in [0, 1]; None for no mask or one that is 1
    everywhere.
    """
    if mask is None:
        return None
    if mask.ndim not in (2, 3, 4) or 0 in mask.shape:
        raise ValueError(f"mask: shape {list(mask.shape)} is not a MASK (batch, height, width). Connect a MASK.")
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float().clamp(0, 1)
    return None if bool((mask == 1).all()) else mask


def hint_rows(latents: int, hints: int, transformer_options: TransformerOptions) -> tuple[int, ...]:
    """Index of the hint for each latent of a chunk: one for all, or one each; in a context window that of its frame.

    Fewer hints than latents repeat from the start, hints beyond the latents are not used, as in the stock nodes.
    """
    if hints == 1:
        return (0,)
    return tuple(frame % hints for frame in _frames_at_hand(latents, transformer_options))


def clip_rows(clip: Clip, hints: int, transformer_options: TransformerOptions) -> tuple[Frames, ...]:
    """Frames of a hint for each latent frame of a clip, see `frame_groups`; in a context window those of the window."""
    return frame_groups(_frames_at_hand(clip.length, transformer_options), hints, clip.frames)


def _frames_at_hand(count: int, transformer_options: TransformerOptions) -> Frames:
    """Indices in the whole clip of the `count` frames of this forward: those of a context window, or all."""
    host_window = transformer_options.get("context_window")
    window = getattr(host_window, "hint_list", getattr(host_window, "index_list", None))
    if window is None:
        window = (transformer_options.get("ad_params") or {}).get("sub_idxs")
    anchor = getattr(host_window, "causal_anchor_index", None)
    if window is not None and anchor is not None and len(window) + 1 == count:  # a frame before the window's own
        window = [anchor, *window]
    frames = window if window is not None and len(window) == count else range(count)
    return tuple(int(frame) for frame in frames)


def frames_of(latents: int, transformer_options: TransformerOptions) -> int | None:
    """Number of frames of the whole video, or images of the batch, to which the latents belong; None: unknown."""
    window = transformer_options.get("context_window")
    if window is not None:
        return getattr(window, "frames", None) or getattr(window, "total_frames", None)
    params = transformer_options.get("ad_params") or {}
    return params.get("full_length") if params.get("sub_idxs") is not None else latents


def frames_needed(clip: Clip, transformer_options: TransformerOptions) -> int:
    """Number of frames that the clip's latent frames in this forward need, up to the last one."""
    return clip.frames * max(_frames_at_hand(clip.length, transformer_options)) + 1


def content_id(images: Iterable[Tensor]) -> str:
    """Content hash over the values and shapes of tensors."""
    digest = hashlib.sha256()  # processors have instructions for it
    for image in images:
        digest.update(str(tuple(image.shape)).encode())
        digest.update(image.cpu().contiguous().numpy().data)
    return digest.hexdigest()
