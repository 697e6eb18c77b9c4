"""What a control knows during one sampling run, each fact read from the device once."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ..schedule import percent_of
from .bases.base import LoadedBase

SIGMA_KEY = "controlnext_sigma"


@dataclass
class Run:
    """What one sampling run needs; made in `pre_run`, gone after `cleanup`."""

    base: LoadedBase
    model_sampling: Any
    percents: dict[float, float] = field(default_factory=dict)
    timesteps: dict[float, float] = field(default_factory=dict)
    sigmas: tuple[float, ...] | None = None
    """Of the sampler's schedule, in its order, without 0; None until it is known."""
    hints: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    recent: dict[Hashable, Tensor] = field(default_factory=dict)
    """Features that the last forward used."""
    counted: bool = False
    """Whether the hints have been counted against the frames."""
    in_range: int = 0
    reached: int = 0
    added: int = 0

    def percent(self, sigma: float) -> float:
        """The host's percent at a sigma, 0..1."""
        if sigma not in self.percents:
            self.percents[sigma] = percent_of(sigma, self.model_sampling.percent_to_sigma)
        return self.percents[sigma]

    def timestep(self, sigma: float) -> float:
        """The number that the control's encoder is given at a sigma."""
        if sigma not in self.timesteps:
            self._work_out((sigma,))
        return self.timesteps[sigma]

    def note_schedule(self, sample_sigmas: Tensor | None) -> None:
        """Take in the sampler's schedule, once, with all its timesteps: each look at a device makes it wait."""
        if self.sigmas is None and sample_sigmas is not None:
            self.sigmas = tuple(sigma for sigma in sample_sigmas.flatten().tolist() if sigma > 0)
            self._work_out(self.sigmas)

    def sigmas_after(self, sigma: float) -> tuple[float, ...]:
        """The rest of the schedule; nothing at a sigma that is not in it."""
        sigmas = self.sigmas or ()
        return sigmas[sigmas.index(sigma) + 1 :] if sigma in sigmas else ()

    def _work_out(self, sigmas: tuple[float, ...]) -> None:
        numbers = self.base.row.encoder_time(self.model_sampling, torch.tensor(sigmas)).float().tolist()
        self.timesteps.update(zip(sigmas, numbers, strict=True))


def sigma_of(t: Tensor, transformer_options: dict[str, Any]) -> float:
    """The sigma of the coming forward. t: (rows,), all equal; it is looked at once a forward, for all controls."""
    known = transformer_options.get(SIGMA_KEY)
    if known is None or known[0] is not t:
        known = transformer_options[SIGMA_KEY] = (t, float(t[0]))
    return known[1]


def release_after_failure(control: Any, model: Any) -> None:
    """Have a run that an exception ends, Cancel among them, let go of the control's `run`.

    The host calls `cleanup` of controls after whole runs alone, that of the patcher after every run. model: the host's
    BaseModel, which knows its patcher while it samples.
    """
    patcher = getattr(model, "current_patcher", None)
    if patcher is None:
        return
    key = f"{SIGMA_KEY}_{id(control)}"

    def release(over: Any) -> None:
        over.remove_callbacks_with_key(CallbacksMP.ON_CLEANUP, key)
        if sys.exc_info()[0] is not None:
            control.run = None

    patcher.remove_callbacks_with_key(CallbacksMP.ON_CLEANUP, key)
    patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, key, release)
