"""Base class of this pack's CONTROL_NETs: hint, strength, range, masks, life cycle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from comfy.controlnet import ControlBase
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ... import encodable
from ...keyframes import Keyframe
from ...latent_clips import Clip, Frames
from ...memory import rows_at_once
from ...specs import Gain
from ..bases.base import LoadedBase
from ..bases.forward_options import TransformerOptions
from ..bases.table import loaded_base
from ..bases.tokens import note_reference
from ..feedback import warn_of_whole_hints, warn_once
from .cautions import control_cautions, has_one_colour, model_cautions, patcher_of
from .control_options import ControlOptions
from .features import CACHE
from .halves import chunk_gains, half_gains, latents_of, needs_halves, places_hook
from .hint_inputs import clean_hint, clip_rows, content_id, frames_of, hint_rows
from .hint_tiles import HintTiles, first_of_equals, fits, parted, row_gains, with_masks
from .networks import on_device
from .run_state import SamplingRun, release_after_failure, sigma_of

log = encodable.logger(__name__)

STEPS_TO_KEEP = 50
"""Number of steps whose features the memory manager is asked to leave room for, within the cache's budget."""


class HostControl(ControlBase):
    """Control with the interface of the host's Apply nodes, samplers and memory manager."""

    name: str
    """Name of the control's file, for messages."""
    gain: Gain = Gain()
    """Gain of each half at strength 1, with the file's learned `scale` where it has one."""
    scale: float | None = None
    weights_source: str | None = None
    """File of base weights that the loader added to its MODEL; None: no weights."""
    hints_together = 1
    """Number of hints averaged into one feature map: the frames of a latent frame of a clip, else 1."""
    has_parts = False
    """True: the options `parts` and `time_mix` apply (ControlNet-XS). False: they are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.options = ControlOptions()
        self.run: SamplingRun | None = None
        self.multigpu_clones: dict[torch.device, HostControl] = {}
        """Copies on further devices that sample at the same time; the host reads this attribute."""
        self.tiles: HintTiles | None = None
        """Facts about the hint where its rows are tiles of another control's hint; None: they are whole."""

    # -- set up ---------------------------------------------------------------------------------------------

    def set_cond_hint(
        self,
        cond_hint: Tensor,
        strength: float = 1.0,
        timestep_percent_range: tuple[float, float] = (0.0, 1.0),
        vae: Any = None,
        extra_concat: Any = (),
    ) -> HostControl:
        """Set the hint; called by the Apply nodes. cond_hint: (n, C, H, W) in [0, 1], C = 1, 3 or 4 (alpha is dropped).

        A batch of masks, which the Apply nodes pass as (n, W, H), is used as a gray hint. Raises ValueError for other
        shapes and for hints with NaN.
        """
        super().set_cond_hint(clean_hint(cond_hint, self.name), strength, timestep_percent_range)
        for known in ("hint_id", "one_colour"):
            self.__dict__.pop(known, None)
        return self

    def copy_to(self, c: ControlBase) -> None:
        super().copy_to(c)
        assert isinstance(c, HostControl)
        c.options = self.options

    def with_options(self, **changes: Any) -> HostControl:
        """Copy with other options; masks and parts multiply with the present ones.

        Raises ValueError for options that this kind of control does not have.
        """
        options = self.options.changed(**changes)
        if options.for_xs and not self.has_parts:
            raise ValueError(
                f"{self.name}: encoder_strength, middle_strength, decoder_strength and time_mix are for ControlNet-XS. "
                "Leave them as they are (1, 1, 1, -1) for this control."
            )
        c = self.copy()
        c.options = options
        c.previous_controlnet = self.previous_controlnet
        c.set_hooks()
        return c

    def set_hooks(self) -> None:
        """Set the hook that records the halves, where the gain depends on them."""
        self.extra_hooks = places_hook() if needs_halves(self.options.apply_to, self.gain) else None

    def get_extra_hooks(self) -> list[Any]:
        """Hooks of previous controls only.

        The host registers this control's hook through the attribute `extra_hooks`. It treats the result of this method
        as hooks on weights: later hosts then sample from a second model, read from disk.
        """
        previous = self.previous_controlnet
        return [] if previous is None else previous.get_extra_hooks()

    @functools.cached_property
    def hint_id(self) -> str:
        """Content hash of the hint, computed once per Apply."""
        # channels last, as an IMAGE lies in memory; one at a time: a copy of a long video would be gigabytes
        return content_id(frame.movedim(0, -1) for frame in self.cond_hint_original)

    @functools.cached_property
    def one_colour(self) -> bool:
        """True: the hint is one colour everywhere. False: it is not. Computed once per Apply."""
        return has_one_colour(self.cond_hint_original)

    # -- life cycle, called by the host ---------------------------------------------------------------------

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        super().pre_run(model, percent_to_timestep_function)
        base = loaded_base(model)
        self.check(base)
        self.cond_hint = None  # of a run with tiles that was cut off
        for caution in (*control_cautions(self), *model_cautions(self, patcher_of(model))):
            warn_once(caution)
        self.run = SamplingRun(base, model.model_sampling)
        release_after_failure(self, model)
        CACHE.begin_run()

    def get_control(
        self, x_noisy: Tensor, t: Tensor, cond: Any, batched_number: int, transformer_options: TransformerOptions
    ) -> Any:
        """Add this pack's patches to the coming forward; returns the result of the previous control."""
        previous = None
        if self.previous_controlnet is not None:
            previous = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)
        note_reference(transformer_options, cond)
        self.add_to(transformer_options, x_noisy, sigma_of(t, transformer_options))
        return previous

    def add_to(
        self, transformer_options: TransformerOptions, x: Tensor, sigma: float, owner: object | None = None
    ) -> None:
        """Engine of both doors: join one forward at this sigma, or leave it unchanged.

        x: (rows, C, H, W), the latent that the UNet gets next. owner: object whose earlier job in these options is
        replaced; None: this control.
        """
        if self.run is not None:
            self.run.note_schedule(transformer_options.get("sample_sigmas"))
        strength = self.strength_at(sigma)
        if strength != 0:
            control = self.of_tiles(x)
            assert control.run is not None
            control.run.counts.in_range += 1
            control.join(transformer_options, x, sigma, strength, self if owner is None else owner)

    @property
    def preprocess_image(self) -> Callable[[Tensor], Tensor]:
        """Function (n, C, H, W) -> the same hint with the masks as a last channel; packs that cut hints call it."""
        return lambda hint: with_masks(hint, self.options.masks)

    @preprocess_image.setter
    def preprocess_image(self, function: object) -> None:
        """The host's constructor and copies set its own, which changes nothing."""

    def of_tiles(self, x: Tensor) -> HostControl:
        """Copy whose hint is the tiles that another pack left for this latent in `cond_hint`; without tiles, itself."""
        if (cut := self.cond_hint) is None:
            return self
        if not fits(cut, self.cond_hint_original.shape[1] + bool(self.options.masks), x, self.compression_ratio):
            warn_of_whole_hints(self.name)
            return self
        assert self.run is not None
        control = self.run.tiled.of(cut)
        if control is None:
            if any(keyframe.mask is not None or keyframe.latents for keyframe in self.options.keyframes):
                warn_once(f"{self.name}: masks and latent keyframes of keyframes are left out in tiles.")
            hint, masks = parted(cut, masked=bool(self.options.masks))
            control = self.copy()
            control.cond_hint_original = clean_hint(hint, self.name)
            control.options = replace(self.options, masks=masks)
            control.timestep_range, control.run = self.timestep_range, self.run.of_tiles()
            control.tiles = HintTiles(first_of_equals(control.cond_hint_original))
            self.run.tiled.put(cut, control)
        assert control.tiles is not None
        control.tiles.forwards += 1
        return control

    def cleanup(self) -> None:
        everywhere = (self, *self.multigpu_clones.values())
        self._warn_without_effect([control.run for control in everywhere if control.run is not None])
        for control in everywhere:
            control.run = None
        super().cleanup()

    def _warn_without_effect(self, runs: list[SamplingRun]) -> None:
        """Log a warning where the control had no effect on any device; with several, each may have run one
        half only.
        """
        if not any(run.counts.in_range for run in runs):
            return
        if not any(run.counts.reached for run in runs):
            log.warning("%s: had no effect: the model never reached the block where it is added.", self.name)
        elif not any(run.counts.added for run in runs):
            log.warning(
                "%s: had no effect: apply_to=%s and the conditioning that it is wired to have nothing in common.",
                self.name,
                self.options.apply_to.value,
            )

    def get_models(self) -> list[ModelPatcher]:
        """Networks to load for sampling: those of previous controls and of clones, then this control's."""
        return [*super().get_models(), self.network]

    def deepclone_multigpu(self, load_device: torch.device, autoregister: bool = False) -> HostControl:
        """Copy for a device that samples at the same time, with a separate network and run.

        autoregister: True registers it with `get_instance_for_device`; False does not.
        """
        c = self.with_network(on_device(self.network, load_device))
        if autoregister:
            self.multigpu_clones[load_device] = c
        return c

    # -- to be given by each kind ---------------------------------------------------------------------------

    @property
    def network(self) -> ModelPatcher:
        """Network of this control, in the host's patcher."""
        raise NotImplementedError

    def with_network(self, network: ModelPatcher) -> HostControl:
        """Copy that runs another copy of the network."""
        raise NotImplementedError

    def check(self, base: LoadedBase) -> None:
        """Raise ValueError unless the control fits the base model."""
        raise NotImplementedError

    def join(
        self, transformer_options: TransformerOptions, x: Tensor, sigma: float, strength: float, owner: object
    ) -> None:
        """Add this control's patches to the options of the coming forward, in place of those of the same owner."""
        raise NotImplementedError

    def bytes_per_pixel(self, dtype: torch.dtype) -> int:
        """Bytes of the hint encoder's peak working memory per hint pixel."""
        raise NotImplementedError

    def kept_bytes(self, dtype: torch.dtype) -> int:
        """Bytes on a device of the cached features of one hint over a run."""
        raise NotImplementedError

    # -- per step -------------------------------------------------------------------------------------------

    def strength_at(self, sigma: float) -> float:
        """Strength times schedule inside start/end, 0 outside, and 0 where a mask is zero everywhere."""
        if self.run is None or self.timestep_range is None:
            raise RuntimeError(f"{self.name}: was asked for control outside a sampling run (no pre_run).")
        start, end = self.timestep_range
        if sigma > start or sigma < end or self.options.masked_out:
            return 0.0
        schedule, keyframe = self.options.schedule, self.keyframe_at(sigma)
        strength = self.strength * (schedule.at(self.run.percent(sigma)) if schedule.points else 1.0)
        return strength if keyframe is None else strength * keyframe.strength

    def keyframe_at(self, sigma: float) -> Keyframe | None:
        """Keyframe that holds at a sigma; None: no keyframes, or before the first."""
        return None if self.run is None else self.run.keyframe(self.options.keyframes, sigma)

    def sized_hint(self, rows: tuple[int, ...], x: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the hint at the picture's size, on the latent's device: (len(rows), 3, 8H, 8W)."""
        assert self.run is not None
        height, width = (side * self.compression_ratio for side in x.shape[-2:])
        return self.run.sized_hint(
            self.cond_hint_original, rows, (height, width), self.upscale_algorithm, x.device, dtype
        )

    def hint_rows(self, latents: int, transformer_options: TransformerOptions) -> tuple[int, ...]:
        """Row of the hint for each latent of a chunk; for tiles, for each row of the batch."""
        assert self.run is not None
        if self.tiles is not None:
            return self.tiles.rows
        hints = self.cond_hint_original.shape[0]
        self.run.count_hints(self.name, hints, frames_of(latents, transformer_options))
        return hint_rows(latents, hints, transformer_options)

    def layout(self, rows: int, transformer_options: TransformerOptions) -> tuple[list[float], int]:
        """(gains at strength 1, one per chunk of a batch of this many rows; number of latents of a chunk).

        For tiles, whose rows differ also where a chunk repeats them: (one gain per row, number of rows).
        """
        chunks = transformer_options.get("cond_or_uncond") or [0]
        if self.tiles is None:
            chunks = [0] if rows % len(chunks) else chunks
            return self.chunk_gains(chunks, transformer_options), rows // len(chunks)
        gains = self.chunk_gains(chunks, transformer_options)
        return row_gains(gains, latents_of(transformer_options), rows), rows

    def chunk_gains(self, chunks: list[int], transformer_options: TransformerOptions) -> list[float]:
        """Gains at strength 1, one per chunk of the guided batch."""
        gains = half_gains(self.options.apply_to, self.gain, self.scale)
        return chunk_gains(chunks, gains, transformer_options, self.name, self.options.apply_to)

    def clip_rows(self, clip: Clip, transformer_options: TransformerOptions) -> tuple[Frames, ...]:
        """Frames of the hint for each latent frame of a clip."""
        assert self.run is not None
        hints = self.cond_hint_original.shape[0]
        self.run.count_frames(self.name, hints, clip, transformer_options)
        return clip_rows(clip, hints, transformer_options)

    def mask(
        self, latents: int, h: Tensor, transformer_options: TransformerOptions, sigma: float, clip: Clip | None = None
    ) -> Tensor | None:
        """Product of all masks and of a keyframe's factors at the size of h: (1 or latents, 1, H, W), or None."""
        assert self.run is not None
        if self.tiles is not None:
            return self.run.mask(self.options.masks, latents, h, {})
        masks = self.options.masks
        if (keyframe := self.keyframe_at(sigma)) is not None:
            masks += self.run.keyframe_masks(keyframe, latents, transformer_options, clip)
        return self.run.mask(masks, latents, h, transformer_options, clip)

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        """Memory of a run in bytes: the peak of an encoder's pass or of a forward, and the features cached on the
        device.

        The latent's size is unknown here: the hint is assumed to have 8 times its height and width. dtype: of the
        model's weights.
        """
        own, hint = 0, self.cond_hint_original
        if hint is not None:
            dtype = dtype if dtype.itemsize > 1 else torch.float16  # a format of one byte is for storage alone
            row_bytes = hint.shape[-1] * hint.shape[-2] * self.bytes_per_pixel(dtype)
            together, hints = self.hints_together, hint.shape[0]
            passes = row_bytes * min(hints, together * rows_at_once(row_bytes * together))
            maps = 1 + -(-(hints - 1) // together)
            kept = 0
            if self.network.load_device.type != "cpu":
                kept = min(self.kept_bytes(dtype) * maps, CACHE.room())
            own = max(passes, self.bytes_beside_base(dtype) * maps) + kept
        return own + super().inference_memory_requirements(dtype)

    def bytes_beside_base(self, dtype: torch.dtype) -> int:
        """Bytes that the rows of one hint need in a forward, beside the base's tensors."""
        return 0
