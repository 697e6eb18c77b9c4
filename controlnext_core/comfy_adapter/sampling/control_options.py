"""Options of a control, set by ControlNeXtOptions and ControlNeXtApply."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

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
    time_mix: float | None = None
    """Weight of the control's own time embedding (ControlNet-XS only). None: use `strength`."""

    @functools.cached_property
    def mask_id(self) -> str:
        """Content hash of the masks."""
        return content_id(self.masks)

    @functools.cached_property
    def masked_out(self) -> bool:
        """True: a mask is zero everywhere, so the control never acts. False: every mask leaves some of it."""
        return not all(bool(mask.any()) for mask in self.masks)

    @property
    def for_xs(self) -> bool:
        """True: an option is set that only ControlNet-XS has. False: none is."""
        return self.parts != NO_PARTS or self.time_mix is not None

    def changed(
        self, masks: tuple[Tensor | None, ...] = (), parts: tuple[float, float, float] = NO_PARTS, **others: Any
    ) -> ControlOptions:
        """Copy with changed options: masks and parts multiply with the present ones, other options replace them."""
        cleaned = tuple(mask for mask in map(clean_mask, masks) if mask is not None)
        encoder, middle, decoder = (new * old for new, old in zip(parts, self.parts, strict=True))
        return replace(self, masks=self.masks + cleaned, parts=(encoder, middle, decoder), **others)
