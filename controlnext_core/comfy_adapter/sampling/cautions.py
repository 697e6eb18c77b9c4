"""Warnings about settings with which a control has no effect, or does harm: for the node and the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...schedule import Schedule
from .next_forward import KEY

if TYPE_CHECKING:
    from .control_options import ControlOptions
    from .host_control import HostControl

WEIGHTS_KEY = f"{KEY}_weights"
"""Attachment of a MODEL: control weights added by this pack's loaders."""
MAX_STRENGTH = 10
"""Largest strength that the Apply nodes offer; a larger one in a schedule is treated as a likely typing error."""


def control_cautions(control: HostControl) -> list[str]:
    """Warnings about the hint, the range, the masks and the schedule of a control; empty without any."""
    start, end = control.timestep_percent_range
    found = []
    if start > end:
        found.append(
            f"start_percent {start:g} is after end_percent {end:g}: the control never acts. Exchange the two numbers."
        )
    found += mask_cautions(control.options)
    if control.cond_hint_original is not None and control.one_colour:
        found.append("the hint has one colour everywhere and says nothing. Check the node that makes it.")
    found += schedule_cautions(control.options.schedule)
    return [f"{control.name}: {sentence}" for sentence in found]


def mask_cautions(options: ControlOptions) -> list[str]:
    """Warning where the masks are zero everywhere; empty without one."""
    if not options.masked_out:
        return []
    return ["the mask is 0 everywhere: the control never acts. Check the mask, or disconnect it."]


def schedule_cautions(schedule: Schedule) -> list[str]:
    """Warning about strengths of a schedule above those of the Apply nodes; empty without one."""
    high = [f"{strength:g} at {percent:g}" for percent, strength in schedule.points if strength > MAX_STRENGTH]
    if not high:
        return []
    return [f"schedule: strength {high[0]} is above {MAX_STRENGTH}. Pairs are percent:strength; is it a slip?"]


def model_cautions(control: HostControl, patcher: ModelPatcher | None) -> list[str]:
    """Warning where the sampled MODEL lacks the weights that the loader added to the MODEL it returned."""
    source = control.weights_source
    if source is None or patcher is None:
        return []
    sources = [weights.source for weights in patcher.get_attachment(WEIGHTS_KEY) or ()]
    if source in sources:
        return []
    return [
        f"{control.name}: the model lacks the weights that came with this control: its wire went past the loader. "
        "Connect MODEL from Load ControlNeXt."
    ]


def has_one_colour(hint: Tensor) -> bool:
    """True: every pixel of every image has the same value. False: at least one differs. hint: (n, C, H, W)."""
    first = hint[:1, :, :1, :1]
    return all(bool(torch.all(image == first)) for image in hint)


def patcher_of(model: Any) -> ModelPatcher | None:
    """Patcher of a host's BaseModel during sampling; None outside of it."""
    return getattr(model, "current_patcher", None)
