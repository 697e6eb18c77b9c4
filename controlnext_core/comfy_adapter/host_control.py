"""The part of a CONTROL_NET that every kind of control of ours shares: hint, strength, range, masks, life cycle."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import comfy.utils
import torch
from comfy.controlnet import ControlBase
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .. import encodable
from ..injection import pool_to
from ..memory import rows_at_once
from ..schedule import Schedule
from ..specs import Gain, Halves
from .bases.base import LoadedBase
from .bases.table import loaded_base
from .encoders import on_device
from .features import CACHE
from .feedback import log_once
from .halves import half_gains, is_plain, needs_halves, places_hook
from .hint_inputs import clean_hint, clean_mask, content_id, frames_of, hint_rows
from .run_state import Run, release_after_failure, sigma_of

log = encodable.logger(__name__)

NO_PARTS = (1.0, 1.0, 1.0)
STEPS_TO_KEEP = 50
"""Steps of a run whose features the memory manager is asked to leave room for, as far as the cache goes."""


@dataclass(frozen=True)
class ControlOptions:
    """What ControlNeXtOptions and ControlNeXtApply add to a control."""

    apply_to: Halves = Halves.AUTO
    masks: tuple[Tensor, ...] = ()
    """Each (1 or latents, 1, h, w) in [0, 1]; they multiply."""
    schedule: Schedule = Schedule(())
    parts: tuple[float, float, float] = NO_PARTS
    """Strengths of what the base's encoder, middle and decoder get, beside the strength; ControlNet-XS only."""
    time_mix: float | None = None
    """Takes the strength's place in the mix of an own time embedding; ControlNet-XS only."""

    @functools.cached_property
    def mask_id(self) -> str:
        """Content hash of the masks."""
        return content_id(self.masks)

    @functools.cached_property
    def masked_out(self) -> bool:
        """Whether a mask is zero everywhere: no control at all."""
        return not all(bool(mask.any()) for mask in self.masks)


class HostControl(ControlBase):
    """A control as the host's Apply nodes, samplers and memory manager know it."""

    name: str
    """The control's file, for messages."""
    gain: Gain = Gain()
    """The gain of each half at strength 1, with the learned `scale` of the file where it has one."""
    scale: float | None = None
    has_parts = False
    """Whether `ControlOptions.parts` and `time_mix` mean something."""

    def __init__(self) -> None:
        super().__init__()
        self.options = ControlOptions()
        self.run: Run | None = None
        self.multigpu_clones: dict[torch.device, HostControl] = {}
        """Copies on further devices that sample at the same time; the host looks them up by this name."""

    # -- set up ---------------------------------------------------------------------------------------------

    def set_cond_hint(
        self,
        cond_hint: Tensor,
        strength: float = 1.0,
        timestep_percent_range: tuple[float, float] = (0.0, 1.0),
        vae: Any = None,
        extra_concat: Any = (),
    ) -> HostControl:
        """Called by the Apply nodes. cond_hint: (n, C, H, W) in [0, 1], C = 1, 3 or 4 (alpha is dropped).

        A batch of masks, which the Apply nodes hand over as (n, W, H), is taken as a gray hint. Raises ValueError
        for other shapes and for hints with NaN.
        """
        super().set_cond_hint(clean_hint(cond_hint, self.name), strength, timestep_percent_range)
        self.__dict__.pop("hint_id", None)
        return self

    def copy_to(self, c: ControlBase) -> None:
        super().copy_to(c)
        assert isinstance(c, HostControl)
        c.options = self.options

    def with_options(self, **changes: Any) -> HostControl:
        """A copy with other options; masks and parts multiply onto those that are there.

        Raises ValueError for options that this kind of control does not have.
        """
        parts = changes.pop("parts", NO_PARTS)
        if not self.has_parts and (parts != NO_PARTS or changes.get("time_mix") is not None):
            raise ValueError(
                f"{self.name}: encoder_strength, middle_strength, decoder_strength and time_mix are for ControlNet-XS. "
                "Leave them as they are (1, 1, 1, -1) for this control."
            )
        changes["parts"] = tuple(new * old for new, old in zip(parts, self.options.parts, strict=True))
        c = self.copy()
        masks = tuple(m for m in (clean_mask(mask) for mask in changes.pop("masks", ())) if m is not None)
        c.options = replace(self.options, masks=self.options.masks + masks, **changes)
        c.previous_controlnet = self.previous_controlnet
        c.set_hooks()
        return c

    def set_hooks(self) -> None:
        """Bring the hook that tells the halves apart, where the gain depends on them."""
        self.extra_hooks = places_hook() if needs_halves(self.options.apply_to, self.gain) else None

    def get_extra_hooks(self) -> list[Any]:
        """The hooks of previous controls alone.

        The host registers ours by the attribute `extra_hooks`. What this method returns it takes for hooks on weights:
        later hosts then sample from a second model, read from disk.
        """
        previous = self.previous_controlnet
        return [] if previous is None else previous.get_extra_hooks()

    @functools.cached_property
    def hint_id(self) -> str:
        """Content hash of the hint, once per Apply."""
        # channels last, as an IMAGE lies in memory; one at a time: a copy of a long video would be gigabytes
        return content_id(frame.movedim(0, -1) for frame in self.cond_hint_original)

    # -- life cycle, called by the host ---------------------------------------------------------------------

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        super().pre_run(model, percent_to_timestep_function)
        base = loaded_base(model)
        self.check(base)
        self.run = Run(base, model.model_sampling)
        release_after_failure(self, model)
        CACHE.begin_run()

    def get_control(
        self, x_noisy: Tensor, t: Tensor, cond: Any, batched_number: int, transformer_options: dict[str, Any]
    ) -> Any:
        """Add our patches to the coming forward; returns what the previous control returned."""
        previous = None
        if self.previous_controlnet is not None:
            previous = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)
        self.add_to(transformer_options, x_noisy, sigma_of(t, transformer_options))
        return previous

    def add_to(self, transformer_options: dict[str, Any], x: Tensor, sigma: float) -> None:
        """The engine under both doors: join one forward, at this sigma, or leave it untouched.

        x: (rows, C, H, W), the latent that the UNet is about to see.
        """
        strength = self.strength_at(sigma)
        if strength != 0:
            assert self.run is not None
            self.run.in_range += 1
            self.run.note_schedule(transformer_options.get("sample_sigmas"))
            self.join(transformer_options, x, sigma, strength)

    def cleanup(self) -> None:
        everywhere = (self, *self.multigpu_clones.values())
        self._warn_without_effect([control.run for control in everywhere if control.run is not None])
        for control in everywhere:
            control.run = None
        super().cleanup()

    def _warn_without_effect(self, runs: list[Run]) -> None:
        """Say where no device had a use for the control; with several, each may have seen one half alone."""
        if not any(run.in_range for run in runs):
            return
        if not any(run.reached for run in runs):
            log.warning("%s: had no effect: the model never reached the block where it is added.", self.name)
        elif not any(run.added for run in runs):
            log.warning(
                "%s: had no effect: apply_to=%s and the conditioning that it is wired to have nothing in common.",
                self.name,
                self.options.apply_to.value,
            )

    def get_models(self) -> list[ModelPatcher]:
        """Networks to be on their devices while sampling: those of previous controls and of clones, our own last."""
        return [*super().get_models(), self.network]

    def deepclone_multigpu(self, load_device: torch.device, autoregister: bool = False) -> HostControl:
        """A copy for a device that samples at the same time, with a network and a run of its own.

        autoregister: True means that `get_instance_for_device` gives it from now on.
        """
        c = self.with_network(on_device(self.network, load_device))
        if autoregister:
            self.multigpu_clones[load_device] = c
        return c

    # -- to be given by each kind ---------------------------------------------------------------------------

    @property
    def network(self) -> ModelPatcher:
        """Our own network in the host's hands."""
        raise NotImplementedError

    def with_network(self, network: ModelPatcher) -> HostControl:
        """A copy that runs another copy of our network."""
        raise NotImplementedError

    def check(self, base: LoadedBase) -> None:
        """Raise ValueError unless the control fits the base model."""
        raise NotImplementedError

    def join(self, transformer_options: dict[str, Any], x: Tensor, sigma: float, strength: float) -> None:
        """Put this control's patches into the options of the coming forward."""
        raise NotImplementedError

    def bytes_per_pixel(self, dtype: torch.dtype) -> int:
        """Peak working memory of the hint's encoder per hint pixel."""
        raise NotImplementedError

    def kept_bytes(self, dtype: torch.dtype) -> int:
        """What the features of one hint take on a device over a run."""
        raise NotImplementedError

    # -- per step -------------------------------------------------------------------------------------------

    def strength_at(self, sigma: float) -> float:
        """strength x schedule inside start/end, 0 outside, and 0 where a mask is all zero."""
        if self.run is None or self.timestep_range is None:
            raise RuntimeError(f"{self.name}: was asked for control outside a sampling run (no pre_run).")
        start, end = self.timestep_range
        if sigma > start or sigma < end or self.options.masked_out:
            return 0.0
        schedule = self.options.schedule
        return self.strength * (schedule.at(self.run.percent(sigma)) if schedule.points else 1.0)

    def sized_hint(self, rows: tuple[int, ...], x: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the hint at 8x the latent's size, on its device: (len(rows), 3, 8H, 8W). As the stock nodes size."""
        assert self.run is not None
        height, width = (side * self.compression_ratio for side in x.shape[-2:])
        key = (rows, height, width, x.device, dtype)
        if key not in self.run.hints:
            hint = self.cond_hint_original[list(rows)]
            sized = comfy.utils.common_upscale(hint, width, height, self.upscale_algorithm, "center")
            sized = sized.to(x.device, dtype).expand(-1, 3, -1, -1)
            if x.device.type == "cpu":  # whose convolutions are a fifth faster so
                sized = sized.contiguous(memory_format=torch.channels_last)
            self.run.hints = {key: sized}
        return self.run.hints[key]

    def hint_rows(self, latents: int, transformer_options: dict[str, Any]) -> tuple[int, ...]:
        """`hint_rows` of this control's hint; where there are not as many as frames, the log says so, once a run."""
        assert self.run is not None
        hints = self.cond_hint_original.shape[0]
        frames = frames_of(latents, transformer_options)
        if not self.run.counted and frames is not None:
            self.run.counted = True
            if hints not in (1, frames):
                what = f"the last {hints - frames} are not used" if hints > frames else "they repeat from the start"
                log.warning("%s: %d hints for %d frames or images: %s.", self.name, hints, frames, what)
        return hint_rows(latents, hints, transformer_options)

    def chunk_gains(self, chunks: list[int], transformer_options: dict[str, Any]) -> list[float]:
        """One gain per chunk of the guided batch, at strength 1."""
        apply_to = self.options.apply_to
        positive, negative = half_gains(apply_to, self.gain, self.scale)
        if positive != negative and not is_plain(transformer_options):
            log_once(
                "%s: this guider does not number its halves as plain guidance does, so apply_to=%s cannot be followed; "
                "the control goes to both.",
                self.name,
                apply_to.value,
            )
            positive = negative = max(positive, negative)
        return [negative if chunk else positive for chunk in chunks]

    def mask(self, latents: int, h: Tensor, transformer_options: dict[str, Any]) -> Tensor | None:
        """The product of all masks at the size of h, by area: (1 or latents, 1, H, W), or None."""
        assert self.run is not None
        if not self.options.masks:
            return None
        rows = tuple(hint_rows(latents, mask.shape[0], transformer_options) for mask in self.options.masks)
        key = (rows, h.shape[-2:], h.device)
        if key not in self.run.masks:
            sized = (
                pool_to(mask[list(of_mask)], (h.shape[-2], h.shape[-1])).to(h.device)
                for of_mask, mask in zip(rows, self.options.masks, strict=True)
            )
            self.run.masks[key] = functools.reduce(torch.mul, sized)
        return self.run.masks[key]

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        """Peak of an encoder's pass or of a forward, and room for the features that a run keeps on the device.

        The latent's size is not known here: the hint is taken to have 8 times that size. dtype: the model's weights'.
        """
        own, hint = 0, self.cond_hint_original
        if hint is not None:
            dtype = dtype if dtype.itemsize > 1 else torch.float16  # a format of one byte is for storage alone
            row_bytes = hint.shape[-1] * hint.shape[-2] * self.bytes_per_pixel(dtype)
            passes = row_bytes * min(hint.shape[0], rows_at_once(row_bytes))
            kept = 0
            if self.network.load_device.type != "cpu":
                kept = min(self.kept_bytes(dtype) * hint.shape[0], CACHE.room())
            own = max(passes, self.beside_bytes(dtype) * hint.shape[0]) + kept
        return own + super().inference_memory_requirements(dtype)

    def beside_bytes(self, dtype: torch.dtype) -> int:
        """What one hint's rows need in a forward for tensors that live beside the base's."""
        return 0
