"""Halves of the guidance: which half a chunk of the batch belongs to, and its gain.

The host numbers chunks by their index in the list of conditionings of one call (`cond_or_uncond`): 0 positive, 1
negative under plain classifier-free guidance, where that list has two entries. Guiders that call with one or three
(DualCFG, PerpNeg, perturbed attention, self-attention guidance) number differently, so the length of the list is
recorded for each call.
"""

from __future__ import annotations

from typing import Any, Final

import comfy.hooks
from comfy.patcher_extension import WrappersMP

from ...injection import gain_of
from ...specs import Gain, Halves
from ..bases.forward_options import TransformerOptions
from ..feedback import log_once

CONDS_KEY: Final = "controlnext_conds"
LATENTS_KEY: Final = "controlnext_latents"
PLAIN_CFG_PLACES = 2


def needs_halves(halves: Halves, gain: Gain) -> bool:
    """True: the gain depends on the half. False: both halves get the same gain."""
    return not (halves is Halves.BOTH or (halves is Halves.AUTO and gain.uncond is None))


def half_gains(halves: Halves, gain: Gain, scale: float | None) -> tuple[float, float]:
    """Gains of the (positive, negative) half at strength 1; `auto` is the released behaviour."""
    cond = gain_of(gain, scale)
    return {
        Halves.AUTO: (cond, cond if gain.uncond is None else gain.uncond),
        Halves.BOTH: (cond, cond),
        Halves.POSITIVE: (cond, 0.0),
        Halves.NEGATIVE: (0.0, cond),
    }[halves]


def is_plain(transformer_options: TransformerOptions) -> bool:
    """True: this forward's chunks are numbered as in plain classifier-free guidance. False: otherwise."""
    numbers = transformer_options.get("cond_or_uncond") or [0]
    places = transformer_options.get(CONDS_KEY, PLAIN_CFG_PLACES)
    return places == PLAIN_CFG_PLACES and max(numbers) < PLAIN_CFG_PLACES


def chunk_gains(
    chunks: list[int], gains: tuple[float, float], transformer_options: TransformerOptions, name: str, apply_to: Halves
) -> list[float]:
    """Gains, one for each chunk of the guided batch. gains: (positive, negative).

    Where the guider numbers its halves differently, both get the larger gain, and the log says so once.
    """
    positive, negative = gains
    if positive != negative and not is_plain(transformer_options):
        log_once(
            "%s: this guider does not number its halves as plain guidance does, so apply_to=%s cannot be followed; "
            "the control goes to both.",
            name,
            apply_to.value,
        )
        positive = negative = max(positive, negative)
    return [negative if chunk else positive for chunk in chunks]


def latents_of(transformer_options: TransformerOptions) -> int:
    """Number of latents of the sampled batch; 1 where it was not recorded."""
    return transformer_options.get(LATENTS_KEY, 1)


def note_places(executor: Any, model: Any, conds: Any, x_in: Any, timestep: Any, model_options: dict[str, Any]) -> Any:
    """CALC_COND_BATCH wrapper: records the numbers of conditionings and of latents of this call, in a copy of its
    options.
    """
    given: TransformerOptions = model_options.get("transformer_options", {})
    options: TransformerOptions = {**given, CONDS_KEY: len(conds), LATENTS_KEY: x_in.shape[0]}
    return executor(model, conds, x_in, timestep, {**model_options, "transformer_options": options})


_WRAPPERS = {"wrappers": {WrappersMP.CALC_COND_BATCH: {CONDS_KEY: [note_places]}}}
_HOOK = comfy.hooks.TransformerOptionsHook(transformers_dict=_WRAPPERS)


def places_hook() -> comfy.hooks.HookGroup:
    """Hook with which a CONTROL_NET adds `note_places`; the same hook for every control."""
    group = comfy.hooks.HookGroup()
    group.add(_HOOK.clone())
    return group


def add_places_wrapper(model: Any) -> None:
    """Add `note_places` to a MODEL clone, once."""
    if not model.get_wrappers(WrappersMP.CALC_COND_BATCH, CONDS_KEY):
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, CONDS_KEY, note_places)
