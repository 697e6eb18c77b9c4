"""State of one sampling run that a control needs; every value is read from the device once."""

from __future__ import annotations

import functools
import sys
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ... import encodable
from ...injection import pool_to
from ...keyframes import Keyframe, keyframe_of_steps
from ...latent_clips import Clip, Frames
from ...schedule import percent_of
from ..bases.base import LoadedBase
from ..bases.forward_options import TransformerOptions
from .hint_inputs import clip_rows, frames_needed, frames_of, hint_rows
from .hint_tiles import KnownTiles

log = encodable.logger(__name__)

SIGMA_KEY: Final = "controlnext_sigma"


@dataclass
class Counts:
    """Numbers of forwards of a run: in the control's range, that reached its block, and with the control added."""

    in_range: int = 0
    reached: int = 0
    added: int = 0


@dataclass
class SamplingRun:
    """State of one sampling run; made in `pre_run`, dropped by `cleanup`."""

    base: LoadedBase
    model_sampling: Any
    percents: dict[float, float] = field(default_factory=dict)
    timesteps: dict[float, float] = field(default_factory=dict)
    sigmas: tuple[float, ...] | None = None
    """Sigmas of the sampler's schedule, in its order, without 0; None until known."""
    hints: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    recent: dict[Hashable, Tensor] = field(default_factory=dict)
    """Features used by the last forward."""
    ready: dict[Hashable, Tensor] = field(default_factory=dict)
    """Result of projecting the last forward's features to the base's channels."""
    keyframe_of: dict[float, int] | None = None
    """Sigma of a step -> index of its keyframe, once the schedule is known."""
    factors: dict[tuple[Hashable, int], Tensor] = field(default_factory=dict)
    """(factors of a keyframe, number of latents or frames) -> the factors as a mask."""
    counted: bool = False
    """True: the number of hints has been compared with that of the frames. False: not yet."""
    tiled: KnownTiles[Any] = field(default_factory=KnownTiles)
    """Copies of the control whose hints are tiles of its hint."""
    counts: Counts = field(default_factory=Counts)

    def of_tiles(self) -> SamplingRun:
        """Run of a control whose hint is a set of tiles: its hints, masks and features are other ones."""
        return replace(self, hints={}, masks={}, recent={}, ready={}, tiled=KnownTiles(), counted=True)

    def percent(self, sigma: float) -> float:
        """Host's percent at a sigma, 0..1."""
        if sigma not in self.percents:
            self.percents[sigma] = percent_of(sigma, self.model_sampling.percent_to_sigma)
        return self.percents[sigma]

    def timestep(self, sigma: float) -> float:
        """Timestep of the control's encoder at a sigma."""
        if sigma not in self.timesteps:
            self._work_out((sigma,))
        return self.timesteps[sigma]

    def note_schedule(self, sample_sigmas: Tensor | None) -> None:
        """Record the sampler's schedule with all its timesteps, once: every read from a device waits for it."""
        if self.sigmas is None and sample_sigmas is not None:
            self.sigmas = tuple(sigma for sigma in sample_sigmas.flatten().tolist() if sigma > 0)
            self._work_out(self.sigmas)

    def keyframe(self, keyframes: tuple[Keyframe, ...], sigma: float) -> Keyframe | None:
        """Keyframe at a sigma; None: before the first. Between two steps it is that of the first of them."""
        if not keyframes:
            return None
        if self.sigmas and self.keyframe_of is None:
            starts = [float(self.model_sampling.percent_to_sigma(keyframe.start)) for keyframe in keyframes]
            indices = keyframe_of_steps(keyframes, starts, self.sigmas)
            self.keyframe_of = dict(zip(self.sigmas, indices, strict=True))
        if self.keyframe_of is None:
            number = sum(keyframe.start <= self.percent(sigma) for keyframe in keyframes) - 1
        else:
            above = [step for step in self.keyframe_of if step >= sigma]
            number = self.keyframe_of[min(above) if above else max(self.keyframe_of)]
        return None if number < 0 else keyframes[number]

    def keyframe_masks(
        self, keyframe: Keyframe, latents: int, options: TransformerOptions, clip: Clip | None
    ) -> tuple[Tensor, ...]:
        """Mask of a keyframe, and its factors as a mask (n, 1, 1, 1), one per image or frame of the video."""
        found = [] if keyframe.mask is None else [keyframe.mask]
        if keyframe.latents is not None:
            here = latents if clip is None else clip.length
            count = frames_of(here, options) or here
            key = ((keyframe.latents, keyframe.rest), count)
            if key not in self.factors:
                first, *others = keyframe.factors(count)
                frames = 1 if clip is None else clip.frames
                whole = [first, *(factor for factor in others for _ in range(frames))]
                self.factors[key] = torch.tensor(whole).view(-1, 1, 1, 1)
            found.append(self.factors[key])
        return tuple(found)

    def sigmas_after(self, sigma: float) -> tuple[float, ...]:
        """Sigmas of the schedule after this one; empty for a sigma that is not in it."""
        sigmas = self.sigmas or ()
        return sigmas[sigmas.index(sigma) + 1 :] if sigma in sigmas else ()

    def sized_hint(
        self,
        hint: Tensor,
        rows: tuple[int, ...],
        size: tuple[int, int],
        method: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        """Rows of a hint (n, C, H, W), scaled and cropped as in the stock nodes: (len(rows), 3, *size)."""
        height, width = size
        key = (rows, height, width, device, dtype)
        if key not in self.hints:
            sized = comfy.utils.common_upscale(hint[list(rows)], width, height, method, "center")
            sized = sized.to(device, dtype).expand(-1, 3, -1, -1)
            if device.type == "cpu":  # whose convolutions are a fifth faster so
                sized = sized.contiguous(memory_format=torch.channels_last)
            self.hints = {key: sized}
        return self.hints[key]

    def count_hints(self, name: str, hints: int, frames: int | None) -> None:
        """Log, once per run, that the numbers of hints and frames differ. frames: None where unknown."""
        if self.counted or frames is None:
            return
        self.counted = True
        if hints not in (1, frames):
            what = f"the last {hints - frames} are not used" if hints > frames else "they repeat from the start"
            log.warning("%s: %d hints for %d frames or images: %s.", name, hints, frames, what)

    def count_frames(self, name: str, hints: int, clip: Clip, options: TransformerOptions) -> None:
        """Log, once per run, that a hint has fewer or more frames than its clip."""
        if self.counted or hints == 1:
            return
        needed = frames_needed(clip, options)
        whole = frames_of(clip.length, options)
        if hints < needed:
            log.warning(
                "%s: the hint has %d frames, the clip at least %d: its last frame is held.", name, hints, needed
            )
        elif whole is not None and hints > clip.frames * (whole - 1) + 1:
            unused = hints - clip.frames * (whole - 1) - 1
            log.warning("%s: the hint has %d frames: the last %d are not used.", name, hints, unused)
        else:
            return
        self.counted = True

    def mask(
        self, masks: tuple[Tensor, ...], latents: int, h: Tensor, options: TransformerOptions, clip: Clip | None = None
    ) -> Tensor | None:
        """Product of all masks at the size of h, by area: (1 or latents, 1, H, W), or None.

        For a clip, whose latent frames are stacked along the height of h: (1, 1, T * H, W).
        """
        if not masks:
            return None
        rows = tuple(
            hint_rows(latents, mask.shape[0], options) if clip is None else clip_rows(clip, mask.shape[0], options)
            for mask in masks
        )
        key = (tuple(map(id, masks)), rows, h.shape[-2:], h.device)
        if key not in self.masks:
            size = (h.shape[-2] // (1 if clip is None else clip.length), h.shape[-1])
            sized = (_sized_mask(mask, of_mask, size).to(h.device) for of_mask, mask in zip(rows, masks, strict=True))
            self.masks[key] = functools.reduce(torch.mul, sized)
        return self.masks[key]

    def _work_out(self, sigmas: tuple[float, ...]) -> None:
        numbers = self.base.row.encoder_time(self.model_sampling, torch.tensor(sigmas)).float().tolist()
        self.timesteps.update(zip(sigmas, numbers, strict=True))


def _sized_mask(mask: Tensor, rows: tuple[int, ...] | tuple[Frames, ...], size: tuple[int, int]) -> Tensor:
    """Rows of a mask (n, 1, h, w) at this size; groups of frames are averaged and stacked along the height."""
    parts = [pool_to(mask[list(row)], size).mean(0, keepdim=True) for row in rows if isinstance(row, tuple)]
    return torch.cat(parts, dim=-2) if parts else pool_to(mask[list(rows)], size)


def sigma_of(t: Tensor, transformer_options: TransformerOptions) -> float:
    """Sigma of the coming forward. t: (rows,), all equal; read once per forward for all controls."""
    known = transformer_options.get(SIGMA_KEY)
    if known is None or known[0] is not t:
        known = transformer_options[SIGMA_KEY] = (t, float(t[0]))
    return known[1]


def release_after_failure(control: Any, model: Any) -> None:
    """Release the control's `run` where an exception, such as Cancel, ends a sampling run.

    The host calls `cleanup` of controls only after complete runs, but that of the patcher after every run. model: the
    host's BaseModel, which knows its patcher during sampling.
    """
    patcher = getattr(model, "current_patcher", None)
    if patcher is None:
        return
    key = f"{SIGMA_KEY}_{id(control)}"

    def release(over: Any) -> None:
        over.remove_callbacks_with_key(CallbacksMP.ON_CLEANUP, key)
        if not over.callbacks.get(CallbacksMP.ON_CLEANUP, True):
            del over.callbacks[CallbacksMP.ON_CLEANUP]  # restores the MODEL's callbacks
        if sys.exc_info()[0] is not None:
            control.run = None

    patcher.remove_callbacks_with_key(CallbacksMP.ON_CLEANUP, key)
    patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, key, release)
