"""Options of a control, set by ControlNeXtOptions and ControlNeXtApply."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...keyframes import Keyframe
from ...schedule import Schedule
from ...specs import Halves
from .hint_inputs import clean_mask, content_id

NO_PARTS = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class ControlOptions:
    """Options of one control: half of the guidance, masks, schedule, parts of the base."""

    apply_to: Halves = Halves.AUTO
    masks: tuple[Tensor, ...] = ()
    """Masks, each (1 or latents, 1, h, w) in [0, 1]; they are multiplied."""
    schedule: Schedule = Schedule(())
    parts: tuple[float, float, float] = NO_PARTS
    """Factors of the additions to the base's encoder, middle and decoder, multiplied with the strength; ControlNet-XS
    only."""
    keyframes: tuple[Keyframe, ...] = ()
    """Keyframes, ascending; their masks as in `masks`."""
    time_mix: float | None = None
    """Weight of the control's own time embedding (ControlNet-XS only). None: use `strength`."""

    @functools.cached_property
    def ids(self) -> tuple[str, str]:
        """Texts that differ with the masks, by their content, and with the keyframes."""
        of_keyframes = content_id(keyframe.mask for keyframe in self.keyframes if keyframe.mask is not None)
        return content_id(self.masks), f"{[replace(each, mask=None) for each in self.keyframes]} {of_keyframes}"

    @functools.cached_property
    def masked_out(self) -> bool:
        """True: a mask is zero everywhere, so the control never acts. False: every mask leaves some of it."""
        return not all(bool(mask.any()) for mask in self.masks)

    @property
    def for_xs(self) -> bool:
        """True: an option is set that only ControlNet-XS has. False: none is."""
        return self.parts != NO_PARTS or self.time_mix is not None

    def changed(
        self,
        masks: tuple[Tensor | None, ...] = (),
        parts: tuple[float, float, float] = NO_PARTS,
        keyframes: tuple[Keyframe, ...] | None = None,
        **others: Any,
    ) -> ControlOptions:
        """Copy with changed options: masks and parts multiply with the present ones, other options replace them."""
        if keyframes is not None:
            others["keyframes"] = tuple(replace(keyframe, mask=clean_mask(keyframe.mask)) for keyframe in keyframes)
        cleaned = tuple(mask for mask in map(clean_mask, masks) if mask is not None)
        encoder, middle, decoder = (new * old for new, old in zip(parts, self.parts, strict=True))
        return replace(self, masks=self.masks + cleaned, parts=(encoder, middle, decoder), **others)
