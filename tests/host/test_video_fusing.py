"""Fusing of the windows' results, the first hint for every window, and refused settings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures import video_fixtures as video
from torch import Tensor

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore:::diffusers")]

SCHEDULES = ("standard_static", "standard_uniform", "looped_uniform", "batched")
FUSES = ("pyramid", "relative", "flat", "overlap-linear")
NAME = "svd_v2"


@pytest.fixture(autouse=True)
def _one_run() -> Iterator[None]:
    """Context of one run of the host: inference mode, an empty cache."""
    yield from video.one_run()


# -- putting windows together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", FUSES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_and_fuse_covers_every_frame_with_weight(schedule: str, fuse: str) -> None:
    """Coverage of all lengths, overlaps and steps of short videos: no frame is left out, and equal
    results stay equal.
    """
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.windows import VideoWindows

    for length, frames, step in itertools.product(range(1, 6), range(2, 13), (0, 1, 2, 5)):
        for overlap, repeat in itertools.product(range(min(length, 4)), (False, True)):
            if frames <= length:
                continue
            handler = VideoWindows(length, overlap, schedule, fuse, repeat)
            handler._step = step
            assert torch.allclose(_fused_ones(handler, frames), torch.ones(frames), rtol=1e-5)


def _fused_ones(handler: Any, frames: int) -> Tensor:
    """Result of the handler for windows whose results are all 1, and for dropped slots, which are 1e9."""
    x = torch.zeros(frames, 1, 1, 1)
    final, count = [torch.zeros_like(x)], [torch.zeros_like(x)]
    for number, window in enumerate(handler.get_context_windows(None, x, {})):
        ones = torch.ones(len(window.index_list), 1, 1, 1)
        if window.hint_list[0] != window.index_list[0]:
            ones[0] = 1e9
        handler.combine_context_window_results(x, [ones], None, window, number, 0, None, final, count, [[0.0] * frames])
    return (final[0] / count[0]).flatten()


@pytest.mark.parametrize("fuse", FUSES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_and_fuse_samples_to_finite_latents(schedule: str, fuse: str) -> None:
    """9 frames in windows of 4: `batched` ends with a window of one frame, less than the overlap."""
    model = video.windowed(video.controlled(video.toy_patcher(), NAME, video.hints(9)), 4, 2, schedule, fuse)
    assert video.sample(model, 9, 1).isfinite().all()


@pytest.mark.parametrize("fuse", FUSES)
def test_weights_are_the_hosts_where_the_hosts_work(fuse: str) -> None:
    import comfy.context_windows as host
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.windows import VideoWindows

    x = torch.zeros(10, 1, 1, 1)
    stock = host.IndexListContextHandler(
        host.get_matching_context_schedule("standard_static"), host.get_matching_fuse_method(fuse), 5, 2
    )
    results = []
    for handler in (stock, VideoWindows(5, 2, "standard_static", fuse)):
        relative_by_name = handler.fuse_method.name == "relative"
        final, count, bias = [torch.zeros_like(x)], [torch.zeros_like(x)], [[0.0] * 10]
        for number, window in enumerate(handler.get_context_windows(None, x, {})):
            out = torch.arange(5.0).view(5, 1, 1, 1) + 10 * number
            handler.combine_context_window_results(x, [out], None, window, number, 3, None, final, count, bias)
        results.append(final[0] if relative_by_name else final[0] / count[0])
    assert torch.allclose(results[0], results[1], rtol=1e-5)
    assert results[0].flatten().unique().numel() == 10


def test_relative_weighs_by_place_also_around_the_end() -> None:
    """The host's own would weigh the ends of a window around the end of the loop most."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.windows import FUSES as OURS

    around = OURS["relative"](4, idxs=[8, 9, 0, 1], full_length=10)
    assert around == pytest.approx(OURS["relative"](4, idxs=[3, 4, 5, 6], full_length=10))
    assert around[1] > 2 * around[0]


# -- the first hint for every window ----------------------------------------------------------------------------------


def test_the_first_hint_stands_first_in_every_window_and_its_result_is_dropped() -> None:
    """7 frames, windows of 3, overlap 1, one step: against the windows' own forwards, put together by hand."""
    frames, images = 7, video.hints(7)
    base = video.toy_patcher()
    captured: list[tuple[list[int], Tensor]] = []
    model = video.windowed(video.controlled(base, NAME, images), 3, 1, "standard_static", "flat", True)
    handler = model.model_options["context_handler"]
    combine = type(handler).combine_context_window_results

    def note(self: Any, x: Tensor, outs: list[Tensor], conds: Any, window: Any, *rest: Any) -> None:
        captured.append((list(window.hint_list), torch.stack(outs).clone()))
        captured_frames.append(list(window.index_list))
        combine(self, x, outs, conds, window, *rest)
        sums[:] = [rest[-3][0].clone(), rest[-2][0].clone()]

    captured_frames: list[list[int]] = []
    sums: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch, video.seen_hints() as seen:
        patch.setattr(type(handler), "combine_context_window_results", note)
        result = video.sample(model, frames, 1)
    assert captured_frames == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    assert [hints for hints, _ in captured] == [[0, 1, 2], [0, 3, 4], [0, 5, 6]]
    assert [entry["hints"] for entry in seen] == [hints for hints, _ in captured]
    (first, second, third) = (outs[0] for _, outs in captured)
    by_hand = torch.cat([first, second[1:], third[1:]])
    assert torch.allclose(sums[0] / sums[1], by_hand, rtol=1e-6)
    assert sums[1].flatten().tolist() == [1.0] * frames
    assert result.isfinite().all()


def test_overlapping_results_beyond_the_first_are_averaged() -> None:
    """8 frames, windows of 4, overlap 2: frame 3 counts twice, frame 2 once, as its second place is dropped."""
    frames = 8
    model = video.windowed(video.toy_patcher(), 4, 2, "standard_static", "flat", True)
    handler = model.model_options["context_handler"]
    x = torch.zeros(frames, 1, 1, 1)
    final, count = [torch.zeros_like(x)], [torch.zeros_like(x)]
    for number, window in enumerate(handler.get_context_windows(None, x, {})):
        out = torch.tensor(window.index_list).view(-1, 1, 1, 1) + 10.0 * number
        handler.combine_context_window_results(x, [out], None, window, number, 3, None, final, count, [[0.0] * frames])
    # windows 0-3, 2-5, 4-7; frame 3: (3 + 13) / 2, frame 5: (15 + 25) / 2
    assert (final[0] / count[0]).flatten().tolist() == [0, 1, 2, 8, 14, 20, 26, 27]


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
@pytest.mark.parametrize("step", range(5))
def test_a_first_place_is_given_away_only_where_its_frame_stands_elsewhere(schedule: str, step: int) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.windows import VideoWindows

    for frames, length, overlap in itertools.product(range(5, 14), (3, 4), (1, 2)):
        handler = VideoWindows(length, overlap, schedule, "flat", True)
        handler._step = step
        windows = handler.get_context_windows(None, torch.zeros(frames, 1, 1, 1), {})
        for window in windows:
            given_away = window.hint_list != window.index_list
            assert window.hint_list[1:] == window.index_list[1:]
            assert window.hint_list[0] == (0 if given_away else window.index_list[0])
            others = [w.index_list[int(w.hint_list[0] != w.index_list[0]) :] for w in windows if w is not window]
            assert not given_away or any(window.index_list[0] in other for other in others)
        if schedule == "standard_static":
            assert all(w.hint_list[0] == 0 for w in windows)


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "overlap", "schedule", "repeat", "message"),
    [
        (4, 4, "standard_static", False, r"overlap 4 must be 0 or more and less than length 4"),
        (4, 9, "looped_uniform", False, r"overlap 9 must be .* less than length 4"),
        (4, 0, "standard_static", True, r"repeat_first_hint needs windows that overlap.*Set an overlap of 1 or more"),
        (4, 2, "batched", True, r"schedule batched with overlap 2 has none"),
    ],
)
def test_settings_without_progress_or_overlap_are_refused(
    length: int, overlap: int, schedule: str, repeat: bool, message: str
) -> None:
    from comfyui_controlnext.nodes.video import ControlNeXtVideoWindows

    with pytest.raises(ValueError, match=message):
        video.windowed(video.toy_patcher(), length, overlap, schedule, "flat", repeat)
    said = ControlNeXtVideoWindows.validate_inputs(length, overlap, schedule, "flat", repeat)
    assert isinstance(said, str) and re.search(message, said)
    assert ControlNeXtVideoWindows.validate_inputs(14, 4, "standard_static", "pyramid") is True


def test_the_model_that_goes_in_stays_without_windows() -> None:
    model = video.toy_patcher()
    before = video.sample(model, 6, 1)
    video.sample(video.windowed(model), 6, 1)
    assert "context_handler" not in model.model_options
    assert torch.equal(video.sample(model, 6, 1), before)


def test_memory_is_asked_for_a_window_not_for_the_video(monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.sampler_helpers

    asked: list[int] = []
    estimate = comfy.sampler_helpers.estimate_memory

    def note(model: Any, noise_shape: Any, conds: Any) -> Any:
        asked.append(noise_shape[0])
        return estimate(model, noise_shape, conds)

    monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory", note)
    video.sample(video.windowed(video.toy_patcher()), 9, 1)
    assert asked == [4]


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2s_ancestral"])
def test_samplers_that_evaluate_between_steps(sampler: str) -> None:
    model = video.windowed(video.toy_patcher(), 4, 1, "looped_uniform")
    assert video.sample(model, 6, 2, sampler=sampler).isfinite().all()


def test_without_guidance() -> None:
    model = video.windowed(video.controlled(video.toy_patcher(), NAME, video.hints(6)))
    with video.seen_hints() as seen:
        assert video.sample(model, 6, 1, cfg=1.0).isfinite().all()
    assert [entry["hints"] for entry in seen] == [[0, 1, 2, 3], [2, 3, 4, 5]]
