"""Videos of any length through context windows: the host's handler, made to work for frames in the batch.

The host's handler compares the whole timestep vector with the schedule, which fails for windows along the batch, and
leaves per-frame conditioning whole. This one takes the step from one timestep, slices what has one entry per frame,
and can give each window the first hint (the reference pose), as the released long-video pipeline does.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import comfy.context_windows as host
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

log = logging.getLogger(__name__)

SCHEDULES = (
    host.ContextSchedules.STATIC_STANDARD,
    host.ContextSchedules.UNIFORM_STANDARD,
    host.ContextSchedules.UNIFORM_LOOPED,
    host.ContextSchedules.BATCHED,
)
FUSES = tuple(host.ContextFuseMethods.LIST_STATIC)


class VideoWindow(host.IndexListContextWindow):
    """Frames of one window, in order, and the hint frame that each of them gets."""

    def __init__(self, index_list: list[int], hint_list: list[int] | None = None) -> None:
        super().__init__(index_list, dim=0)
        self.hint_list = index_list if hint_list is None else hint_list

    def get_tensor(self, full: Tensor, device: Any = None, dim: int | None = None) -> Tensor:
        """The window's frames of a tensor with all frames along its first dimension; one entry stands for all."""
        if full.shape[0] == 1:
            return full
        return full.index_select(0, torch.tensor(self.index_list, device=full.device)).to(device)

    def add_window(self, full: Tensor, to_add: Tensor, dim: int | None = None) -> Tensor:
        """Add the window's frames into the whole, in place (the handler's own sums)."""
        return full.index_add_(0, torch.tensor(self.index_list, device=full.device), to_add.to(full.dtype))


class VideoWindows(host.IndexListContextHandler):
    """Windows along the frames of a video latent (frames are the batch)."""

    def __init__(self, length: int, overlap: int, schedule: str, fuse: str, repeat_first_hint: bool = False) -> None:
        super().__init__(
            context_schedule=host.get_matching_context_schedule(schedule),
            fuse_method=host.get_matching_fuse_method(fuse),
            context_length=length,
            context_overlap=overlap,
            dim=0,
        )
        self.repeat_first_hint = repeat_first_hint
        self.covered: Counter[int] = Counter()
        """How often each frame stands where its result counts, over the windows of the present step."""

    def set_step(self, timestep: Tensor, model_options: dict[str, Any]) -> None:
        """Find the step by one timestep; inside a sampler's sub-step the last step stays."""
        sigmas = model_options["transformer_options"]["sample_sigmas"]
        matches = torch.nonzero(torch.isclose(sigmas, timestep[:1].to(sigmas), rtol=0.0001))
        if len(matches):
            self._step = int(matches[0].item())

    def get_context_windows(self, model: Any, x_in: Tensor, model_options: dict[str, Any]) -> list[VideoWindow]:
        """The windows of this step over x_in (frames, C, H, W)."""
        lists = [list(map(int, w)) for w in self.context_schedule.func(x_in.shape[0], self, model_options)]
        windows = [VideoWindow(w, [0, *w[1:]] if self.repeat_first_hint else None) for w in lists]
        self.covered = Counter(frame for w in windows for frame in w.index_list[self._skip(w) :])
        return windows

    def get_resized_cond(self, cond_in: Any, x_in: Tensor, window: VideoWindow, device: Any = None) -> Any:
        """Conditioning for one window: what has one entry per frame is sliced to the window's frames."""
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
        """Sum one window into the whole, without a first frame that stood in for the reference."""
        skip = self._skip(window)
        if skip and self.covered[window.index_list[0]]:
            window = VideoWindow(window.index_list[skip:])
            sub_conds_out = [out[skip:] for out in sub_conds_out]
        super().combine_context_window_results(x_in, sub_conds_out, sub_conds, window, *rest)

    def _skip(self, window: VideoWindow) -> int:
        """1 where the window's first result belongs to the reference hint and not to its frame."""
        return int(window.hint_list[0] != window.index_list[0] and len(window.index_list) > 1)


def add_video_windows(
    model: ModelPatcher, length: int, overlap: int, schedule: str, fuse: str, repeat_first_hint: bool
) -> ModelPatcher:
    """A clone of `model` that samples videos longer than `length` frames in windows; shorter ones as before.

    Raises ValueError where the overlap leaves no progress.
    """
    if not 0 <= overlap < length:
        raise ValueError(f"overlap {overlap} must be less than length {length}, or no window ever gets further.")
    if repeat_first_hint and overlap == 0:
        raise ValueError("repeat_first_hint needs an overlap of 1 or more: each window's first frame is dropped.")
    windowed = model.clone()
    windowed.model_options["context_handler"] = VideoWindows(length, overlap, schedule, fuse, repeat_first_hint)
    host.create_prepare_sampling_wrapper(windowed)
    return windowed
