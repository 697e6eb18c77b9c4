"""Options that ControlNeXtOptions and ControlNeXtApply add to a control."""

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
    """Limits of one control: to a half of the guidance, a region, a part of the run, parts of the base."""

    apply_to: Halves = Halves.AUTO
    masks: tuple[Tensor, ...] = ()
    """Masks, each (1 or latents, 1, h, w) in [0, 1]; their product counts."""
    schedule: Schedule = Schedule(())
    parts: tuple[float, float, float] = NO_PARTS
    """Strengths of what the base's encoder, middle and decoder get, beside the strength; ControlNet-XS only."""
    time_mix: float | None = None
    """Weight of the control's own time embedding (ControlNet-XS only). None: use `strength`."""

    @functools.cached_property
    def mask_id(self) -> str:
        """Content hash of the masks."""
        return content_id(self.masks)

    @functools.cached_property
    def masked_out(self) -> bool:
        """True: a mask is zero everywhere, which means no control at all."""
        return not all(bool(mask.any()) for mask in self.masks)

    @property
    def for_xs(self) -> bool:
        """True: something is set that ControlNet-XS alone has."""
        return self.parts != NO_PARTS or self.time_mix is not None

    def changed(
        self, masks: tuple[Tensor | None, ...] = (), parts: tuple[float, float, float] = NO_PARTS, **others: Any
    ) -> ControlOptions:
        """Masks and parts multiply onto those that are there, other options take their place."""
        cleaned = tuple(mask for mask in map(clean_mask, masks) if mask is not None)
        encoder, middle, decoder = (new * old for new, old in zip(parts, self.parts, strict=True))
        return replace(self, masks=self.masks + cleaned, parts=(encoder, middle, decoder), **others)
