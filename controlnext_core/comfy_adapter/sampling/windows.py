"""Context windows for videos of any length: the host's handler, extended to frames along the batch.

The host's handler compares the whole timestep vector with the schedule, which fails for windows along the batch, leaves
per-frame conditioning whole, and identifies slots of a window by their frame, which fails around the end of a loop.
This one reads the step from one timestep, slices values with one entry per frame, weights by slot, and can give each
window the first hint (the reference pose), as the released long-video pipeline does.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import comfy.context_windows as host
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...families import FAMILIES
from ..bases.forward_options import TransformerOptions
from ..bases.table import loaded_base

SCHEDULES = (
    host.ContextSchedules.STATIC_STANDARD,
    host.ContextSchedules.UNIFORM_STANDARD,
    host.ContextSchedules.UNIFORM_LOOPED,
    host.ContextSchedules.BATCHED,
)
WITHOUT_OVERLAP = (host.ContextSchedules.BATCHED,)
LEAST_WEIGHT = 1e-6
"""Smallest weight of a ramp: a frame that no other window covers is divided by its own weight."""


def _known(owner: type, **arguments: Any) -> dict[str, Any]:
    """Arguments that the host's class accepts; later hosts accept more of them."""
    parameters = inspect.signature(owner.__init__).parameters  # type: ignore[misc]
    return {name: value for name, value in arguments.items() if name in parameters}


class VideoWindow(host.IndexListContextWindow):
    """Frames of one window, in order, and the index of the hint for each."""

    def __init__(self, index_list: list[int], frames: int, reference_first: bool = False) -> None:
        super().__init__(index_list, dim=0, **_known(host.IndexListContextWindow, total_frames=frames))
        self.frames = frames
        """Number of frames of the whole video."""
        self.reference_first = reference_first
        """True: the first slot gets the first hint, and its result is dropped. False: every slot gets its frame's
        hint."""
        self.hint_list = [0, *index_list[1:]] if reference_first else index_list

    def get_tensor(
        self, full: Tensor, device: Any = None, dim: int | None = None, retain_index_list: Any = ()
    ) -> Tensor:
        """Frames of the window from a tensor with all frames along its first dimension; a single entry serves all
        frames.

        retain_index_list: of hosts since 0.22, for frames that every window retains; SVD's latents have none.
        """
        if full.shape[0] == 1:
            return full
        return full.index_select(0, torch.tensor(self.index_list, device=full.device)).to(device)

    def add_window(self, full: Tensor, to_add: Tensor, dim: int | None = None) -> Tensor:
        """Add the window's frames to the full tensor, in place (the handler's running sums)."""
        return full.index_add_(0, torch.tensor(self.index_list, device=full.device), to_add.to(full))


class VideoWindows(host.IndexListContextHandler):
    """Windows along the frames of a video latent (frames are the batch)."""

    def __init__(self, length: int, overlap: int, schedule: str, fuse: str, repeat_first_hint: bool = False) -> None:
        super().__init__(
            context_schedule=host.get_matching_context_schedule(schedule),
            # the host treats one of its own names specially, by frame instead of by slot
            fuse_method=host.ContextFuseMethod(f"{fuse} by place", FUSES[fuse]),
            context_length=length,
            context_overlap=overlap,
            dim=0,
            # where latents know the frames before them, the host gives a window one more in front; those of SVD do not
            **_known(host.IndexListContextHandler, causal_window_fix=False),
        )
        self.repeat_first_hint = repeat_first_hint

    def set_step(self, timestep: Tensor, model_options: dict[str, Any]) -> None:
        """Find the step from one timestep; in a sampler's sub-step the last step stays."""
        options: TransformerOptions = model_options["transformer_options"]
        sigmas = options["sample_sigmas"]
        matches = torch.nonzero(torch.isclose(sigmas, timestep[:1].to(sigmas), rtol=0.0001))
        if len(matches):
            self._step = int(matches[0].item())

    def get_context_windows(self, model: Any, x_in: Tensor, model_options: dict[str, Any]) -> list[VideoWindow]:
        """Windows of this step over x_in (frames, C, H, W)."""
        frames = x_in.shape[0]
        lists = [[int(frame) for frame in window] for window in self.context_schedule.func(frames, self, model_options)]
        # a first slot may hold the reference frame only if another window also covers the frame it replaces
        elsewhere = Counter(frame for window in lists for frame in window[int(window[0] != 0) :])
        return [
            VideoWindow(window, frames, self.repeat_first_hint and window[0] != 0 and elsewhere[window[0]] > 0)
            for window in lists
        ]

    def get_resized_cond(self, cond_in: Any, x_in: Tensor, window: VideoWindow, device: Any = None) -> Any:
        """Conditioning for one window: values with one entry per frame are sliced to the window's frames."""
        resized = super().get_resized_cond(cond_in, x_in, window, device)
        for cond in resized or []:
            for name, value in cond.get("model_conds", {}).items():
                inner = getattr(value, "cond", None)
                if isinstance(inner, Tensor) and inner.ndim and inner.shape[0] == x_in.shape[0] > 1:
                    cond["model_conds"][name] = value._copy_with(window.get_tensor(inner, device))
        return resized

    def combine_context_window_results(
        self, x_in: Tensor, sub_conds_out: list[Tensor], sub_conds: Any, window: VideoWindow, *rest: Any
    ) -> None:
        """Add one window to the sums, without a first slot that holds the reference frame."""
        if window.reference_first:
            window = VideoWindow(window.index_list[1:], window.frames)
            sub_conds_out = [out[1:] for out in sub_conds_out]
        super().combine_context_window_results(x_in, sub_conds_out, sub_conds, window, *rest)


def _relative(length: int, **_: Any) -> list[float]:
    """Weights that fall linearly from the middle of a window to almost 0 at its ends, as the host's `relative`."""
    middle = (length - 1) / 2
    return [max(1e-2, 1 - abs(place - middle) / (middle + 5e-3)) for place in range(length)]


def _overlap_linear(length: int, full_length: int, idxs: list[int], handler: VideoWindows, **_: Any) -> Tensor:
    """Weights of 1 with linear ramps over the overlaps with other windows, as the host's method of that name."""
    weights = torch.ones(length)
    ramp = torch.linspace(LEAST_WEIGHT, 1, handler.context_overlap)[:length]
    if len(ramp) and idxs[0] > 0:
        weights[: len(ramp)] *= ramp
    if len(ramp) and idxs[-1] < full_length - 1:
        weights[-len(ramp) :] *= ramp.flip(0)
    return weights.clamp(min=LEAST_WEIGHT)


FUSES: dict[str, Callable[..., Any]] = {
    host.ContextFuseMethods.PYRAMID: host.create_weights_pyramid,
    host.ContextFuseMethods.RELATIVE: _relative,
    host.ContextFuseMethods.FLAT: host.create_weights_flat,
    host.ContextFuseMethods.OVERLAP_LINEAR: _overlap_linear,
}
"""Name -> function of (length of a window, arguments of the host) that gives each slot's weight; a frame's weights are
normalised to sum 1."""


def problem_of(length: int, overlap: int, schedule: str, repeat_first_hint: bool) -> str:
    """Fault of these settings in combination, as a sentence; empty for none."""
    if not 0 <= overlap < length:
        return f"overlap {overlap} must be 0 or more and less than length {length}, or no window ever gets further."
    if repeat_first_hint and (overlap == 0 or schedule in WITHOUT_OVERLAP):
        return (
            f"repeat_first_hint needs windows that overlap, as each window's first frame is dropped; schedule "
            f"{schedule} with overlap {overlap} has none. Set an overlap of 1 or more and another schedule than "
            f"{WITHOUT_OVERLAP[0]}."
        )
    return ""


def _problem_of_model(model: ModelPatcher) -> str:
    """Fault of a model whose frames of a clip are not the batch, as a sentence; empty for none."""
    family = loaded_base(model.model).family
    if family not in FAMILIES or FAMILIES[family].frames is None:
        return ""
    return (
        f"the connected model is {family.value}, whose frames are inside one latent. Connect ComfyUI's own node WAN "
        "Context Windows in place of this one: the control follows its windows, and each gets its own hints."
    )


def add_video_windows(
    model: ModelPatcher, length: int, overlap: int, schedule: str, fuse: str, repeat_first_hint: bool
) -> ModelPatcher:
    """Clone `model` so that it samples videos longer than `length` frames in windows; shorter ones in one piece.

    Raises ValueError for settings that do not go together, and for models whose frames are not the batch.
    """
    problem = problem_of(length, overlap, schedule, repeat_first_hint) or _problem_of_model(model)
    if problem:
        raise ValueError(problem)
    windowed = model.clone()
    windowed.model_options["context_handler"] = VideoWindows(length, overlap, schedule, fuse, repeat_first_hint)
    host.create_prepare_sampling_wrapper(windowed)
    return windowed
