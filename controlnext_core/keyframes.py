"""Keyframes of ComfyUI-Advanced-ControlNet: strength, mask and factors of a control from a percent of sampling on.

Source of the rules: that pack's code of July 2026. Its groups are read by the names of their attributes; nothing of the
pack is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

WEIGHTS = ("weights_input", "weights_middle", "weights_output", "weight_func", "weight_mask")


@dataclass(frozen=True)
class Keyframe:
    """Strength, mask and factors of a control from one percent of sampling to the next keyframe."""

    start: float = 0.0
    """Percent of sampling, 0..1."""
    strength: float = 1.0
    """Factor of the control's strength."""
    steps: int = 0
    """Number of steps that it keeps at least, where it starts within the sampled range."""
    latents: tuple[tuple[int, float], ...] | None = None
    """Pairs (number of an image of the batch or a latent frame, factor); negative numbers count from the end. None: all
    have the factor 1."""
    rest: float = 0.0
    """Factor of images and frames without a pair."""
    mask: Tensor | None = None
    """Mask, (n, H, W) or (H, W) in [0, 1]; None: no mask."""

    def factors(self, count: int) -> list[float]:
        """Factor of each of `count` images or latent frames."""
        if self.latents is None:
            return [1.0] * count
        found = [self.rest] * count
        for number, factor in self.latents:
            if -count <= number < count:
                found[number] = factor
        return found


def read_keyframes(timesteps: Any = None, latents: Any = None) -> tuple[Keyframe, ...]:
    """Keyframes of a TIMESTEP_KEYFRAME, ascending; a LATENT_KEYFRAME holds for all of them in place of their own.

    What a keyframe leaves open it has from the one before, unless it says otherwise. Raises ValueError for other
    objects, for numbers outside of their range, and for keyframes with weights of blocks.
    """
    everywhere = None if latents is None else _pairs(latents, "latent_keyframes")
    if timesteps is None:
        return () if everywhere is None else (Keyframe(latents=everywhere),)
    found: list[Keyframe] = []
    own: tuple[tuple[int, float], ...] | None = None
    mask: Tensor | None = None
    entries = _entries(timesteps, "timestep_keyframes", "start_percent")
    for given in sorted(entries, key=lambda entry: float(entry.start_percent)):
        _refuse_weights(getattr(given, "control_weights", None))
        keep = bool(getattr(given, "inherit_missing", True))
        its_latents, its_mask = getattr(given, "latent_keyframes", None), getattr(given, "mask_hint_orig", None)
        own = (own if keep else None) if its_latents is None else _pairs(its_latents, "timestep_keyframes")
        mask = (mask if keep else None) if its_mask is None else its_mask
        start = _number(given.start_percent, "timestep_keyframes: start_percent")
        if not 0 <= start <= 1:
            raise ValueError(
                f"timestep_keyframes: start_percent {start:g} is outside 0..1 (0 start, 1 end of sampling)."
            )
        found.append(
            Keyframe(
                start,
                _number(getattr(given, "strength", 1.0), "timestep_keyframes: strength"),
                int(getattr(given, "guarantee_steps", 0)),
                own if everywhere is None else everywhere,
                _number(getattr(given, "null_latent_kf_strength", 0.0), "timestep_keyframes: null_latent_kf_strength"),
                mask,
            )
        )
    return tuple(found)


def keyframe_of_steps(keyframes: Sequence[Keyframe], starts: Sequence[float], sigmas: Sequence[float]) -> list[int]:
    """Index of the keyframe of each step; -1: before the first.

    starts: sigmas at which the keyframes start; sigmas: of the steps, descending. A keyframe that starts within the
    sampled range keeps its number of steps, also where the next one has started by then.
    """

    def kept(index: int) -> int:
        return 0 if starts[index] > sigmas[0] else keyframes[index].steps

    found: list[int] = []
    current, used = -1, 0
    for sigma in sigmas:
        if current < 0 or used >= kept(current):
            for index in range(current + 1, len(keyframes)):
                if starts[index] < sigma:
                    break
                current, used = index, 0
                if kept(index) > 0:
                    break
        used += 1
        found.append(current)
    return found


def _entries(group: Any, name: str, attribute: str) -> list[Any]:
    entries = getattr(group, "keyframes", None)
    if not isinstance(entries, list) or not all(hasattr(entry, attribute) for entry in entries):
        raise ValueError(
            f"{name}: is a {type(group).__name__}, which holds no keyframes. Connect a keyframe node of "
            "ComfyUI-Advanced-ControlNet."
        )
    return entries


def _pairs(group: Any, name: str) -> tuple[tuple[int, float], ...]:
    entries = _entries(group, name, "batch_index")
    return tuple((int(entry.batch_index), _number(entry.strength, f"{name}: strength")) for entry in entries)


def _number(value: Any, what: str) -> float:
    number = float(value)
    if not abs(number) < float("inf"):
        raise ValueError(f"{what} {number:g} is not a finite number.")
    return number


def _refuse_weights(weights: Any) -> None:
    """Raise ValueError for weights of blocks, or other ones than 1 for all."""
    if weights is None:
        return
    plain = all(getattr(weights, name, None) is None for name in WEIGHTS) and not getattr(weights, "extras", None)
    if not plain or getattr(weights, "base_multiplier", 1.0) != 1 or getattr(weights, "uncond_multiplier", 1.0) != 1:
        raise ValueError(
            "timestep_keyframes: cn_weights are for blocks that this control does not have. Disconnect them. ControlNet"
            "-XS Options has strengths of encoder, middle and decoder, and apply_to chooses a half of the guidance."
        )
