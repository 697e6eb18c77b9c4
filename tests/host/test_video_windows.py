"""Videos in windows, sampled on a toy SVD: the hint of every frame in every window.

The hints are recorded where the encoder's features are requested, per window, in the order of the frames.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures import video_fixtures as video
from comfyui_controlnext.tests.fixtures.sampling_fixtures import REASSOCIATED, relative
from torch import Tensor

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore:::diffusers")]

SCHEDULES = ("standard_static", "standard_uniform", "looped_uniform", "batched")
NAME = "svd_v2"
ANIMATEDIFF = {"ad_params": {"sub_idxs": [5, 6, 7], "full_length": 9}}


@pytest.fixture(autouse=True)
def _one_run() -> Iterator[None]:
    """Context of one run of the host: inference mode, an empty cache."""
    yield from video.one_run()


# -- which hint -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [2, 6])
def test_every_frame_of_every_window_gets_its_own_hint(schedule: str, steps: int) -> None:
    """7 frames in windows of 3: with 6 steps (frames == steps + 1) and with 2."""
    frames = 7
    model = video.windowed(video.toy_patcher(), 3, 1, schedule)
    with video.seen_hints() as seen:
        result = video.sample(video.controlled(model, NAME, video.hints(frames)), frames, steps)
    assert result.isfinite().all()
    assert len({entry["sigma"] for entry in seen}) == steps
    for _, group in itertools.groupby(seen, key=lambda entry: entry["sigma"]):
        windows = [entry["frames"] for entry in group]
        assert {frame for window in windows for frame in window} == set(range(frames))
        assert len(windows) > 1
    assert all(entry["hints"] == entry["frames"] for entry in seen)
    around_the_end = [entry["frames"] for entry in seen if entry["frames"] != sorted(entry["frames"])]
    assert bool(around_the_end) == (schedule == "looped_uniform")


def test_features_follow_the_frame_not_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features equal to the hint's index, by a stand-in encoder: the value is checked in every
    frame of every window.
    """
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling import next_control, next_forward

    frames = 9
    given: list[tuple[list[int], list[int]]] = []
    fuse, window = next_forward.fuse, {}
    term = next_control.ControlNeXtControl.term

    def note_window(self: Any, h: Tensor, transformer_options: dict[str, Any], **more: Any) -> Any:
        window["frames"] = list(transformer_options["context_window"].index_list)
        return term(self, h, transformer_options, **more)

    def note_values(h: Tensor, terms: Any) -> Tensor:
        (only,) = terms
        given.append((window["frames"], only.control[:, 0, 0, 0].round().int().tolist()))
        return fuse(h, terms)

    class NumberOfTheHint(torch.nn.Module):
        def begin(self, hint: Tensor) -> Tensor:
            return hint

        def finish(self, hint: Tensor, timestep: Tensor) -> Tensor:
            return (hint[:, :1, :1, :1] * 100).expand(-1, video.WIDTH, video.CELLS // 2, video.CELLS // 2)

    monkeypatch.setattr(next_control, "prepare", lambda encoded, size, fusion: encoded)
    monkeypatch.setattr(next_control.ControlNeXtControl, "term", note_window)
    monkeypatch.setattr(next_forward, "fuse", note_values)
    real = video.control(NAME).net
    patcher = video.patcher_of(NumberOfTheHint())
    patcher.model.config = real.patcher.model.config
    numbered = next_control.ControlNeXtControl(dataclasses.replace(real, patcher=patcher, uid="numbers"))
    side = 8 * video.CELLS
    images = torch.arange(frames).view(-1, 1, 1, 1).expand(-1, side, side, 3) / 100
    model = video.windowed(video.toy_patcher(), 4, 1, "looped_uniform")
    video.sample(video.controlled(model, NAME, images, control=numbered), frames, 3)
    assert len(given) >= 9 and all(values == window for window, values in given)


# -- the same as without windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [3, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_video_of_one_window_is_sampled_as_without(schedule: str, frames: int) -> None:
    controlled = video.controlled(video.toy_patcher(), NAME, video.hints(frames))
    expected = video.sample(controlled, frames, 1)
    model = video.windowed(controlled, 4, 1, schedule, "relative")
    with video.seen_windows(model) as windows:
        assert torch.equal(video.sample(model, frames, 1), expected)
    assert windows == []


def test_each_window_is_the_plain_forward_of_its_frames() -> None:
    """Windows of `batched`, side by side, equal plain sampling of their parts, after one step."""
    frames, conds = 8, video.conditioning()
    images = video.hints(frames)
    model = video.windowed(video.controlled(video.toy_patcher(), NAME, images), 4, 0, "batched")
    whole, outputs = video.recorded_outputs(model, lambda: video.sample(model, frames, 1, conds))
    assert [output.shape[0] for output in outputs] == [8, 8]
    noise = torch.randn(frames, 4, video.CELLS, video.CELLS, generator=torch.manual_seed(1))
    for start in (0, 4):
        part = images[start : start + 4]
        alone = video.controlled(video.toy_patcher(), NAME, part)
        (expected,) = _sample_noise(alone, noise[start : start + 4], conds)
        assert relative(whole[start : start + 4], expected) < REASSOCIATED


def _sample_noise(model: Any, noise: Tensor, conds: Any) -> tuple[Tensor]:
    """Run one step of the stock sampler from given noise."""
    import comfy.sample

    latent = torch.zeros_like(noise)
    return (comfy.sample.sample(model, noise, 1, 2.5, "euler", "karras", *conds, latent, seed=1),)


@pytest.mark.parametrize("name", video.VARIANTS)
@pytest.mark.parametrize("repeat_first_hint", [False, True])
def test_both_doors_give_the_same_latents_in_windows(name: str, repeat_first_hint: bool) -> None:
    frames, images = 6, video.hints(6)
    model = video.windowed(video.toy_patcher(), 4, 1, "looped_uniform", "pyramid", repeat_first_hint)
    through_stock = video.sample(model, frames, conds=video.stock_apply(video.conditioning(), name, images))
    assert torch.equal(through_stock, video.sample(video.controlled(model, name, images), frames))
    assert relative(through_stock, video.sample(model, frames)) > 1e-3


# -- conditioning per frame -------------------------------------------------------------------------------------------


def test_conditioning_with_one_entry_per_frame_is_cut_to_the_window() -> None:
    """Conditioning with a start image for each frame: every window gets those of its frames."""
    frames = 6
    conds = video.conditioning(images=frames)
    given: list[Tensor] = []
    model = video.windowed(video.toy_patcher(), 4, 1, "looped_uniform")
    unet = model.model.diffusion_model
    handle = unet.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0][:, 4:].clone()))
    with video.seen_windows(model) as windows:
        try:
            video.sample(model, frames, 2, conds)
        finally:
            handle.remove()
    latents = conds[0][0][1]["concat_latent_image"]
    assert len(windows) == len(given) == 4
    for window, image in zip(windows, given, strict=True):
        positive, negative = sorted(image.chunk(2), key=lambda half: -float(half.abs().sum()))
        assert torch.equal(positive, latents[window]) and not negative.any()


# -- windows of others ------------------------------------------------------------------------------------------------


def test_the_hosts_own_windows_are_respected_where_they_work() -> None:
    """Along the batch they run where frames == steps + 1; in later hosts always."""
    import comfy.context_windows as host
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    frames = 6
    settings = (3, 1, host.ContextSchedules.UNIFORM_LOOPED, 1, False, host.ContextFuseMethods.FLAT, 0)
    known = inspect.signature(ContextWindowsManualNode.execute).parameters
    later = {name: False for name in ("freenoise", "causal_window_fix") if name in known}
    model = ContextWindowsManualNode.execute(video.toy_patcher(), *settings, **later)[0]
    with video.seen_hints() as seen, _quiet_list_indexing():
        found = video.sample(video.controlled(model, NAME, video.hints(frames)), frames, frames - 1)
    assert found.isfinite().all() and len(seen) > frames
    assert all(entry["hints"] == entry["frames"] for entry in seen)
    assert any(entry["frames"] != sorted(entry["frames"]) for entry in seen)


def test_what_later_hosts_want_to_know_of_windows_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interface of later hosts: their windows divide by the length of the video, and their handler prepends a frame by
    default.
    """
    import comfy.context_windows as host
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.windows import VideoWindows

    def window(self: Any, index_list: list[int], dim: int = 0, total_frames: int = 0) -> None:
        self.index_list, self.context_length, self.dim = index_list, len(index_list), dim
        self.center = (min(index_list) + max(index_list)) / (2 * total_frames)

    before = host.IndexListContextHandler.__init__

    def handler(self: Any, *args: Any, causal_window_fix: bool = True, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        self.prepends = causal_window_fix

    monkeypatch.setattr(host.IndexListContextWindow, "__init__", window)
    monkeypatch.setattr(host.IndexListContextHandler, "__init__", handler)
    windows = VideoWindows(4, 0, "batched", "flat")
    assert windows.prepends is False
    x = torch.zeros(8, 4, 2, 2)
    assert [each.center for each in windows.get_context_windows(None, x, {})] == [3 / 16, 11 / 16]
    assert windows.get_context_windows(None, x, {})[1].get_tensor(x, retain_index_list=[]).shape[0] == 4


@contextmanager
def _quiet_list_indexing() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [7, 8, 0, 1], [5, 6]])
def test_windows_announced_as_animatediff_does(rows: list[int]) -> None:
    """`ad_params["sub_idxs"]` in the options of the forward; None outside a window."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.hint_inputs import hint_rows

    options = {"ad_params": {"sub_idxs": rows, "full_length": 9}}
    assert hint_rows(len(rows), 9, options) == tuple(rows)
    assert hint_rows(4, 9, {"ad_params": {"sub_idxs": None, "full_length": 9}}) == (0, 1, 2, 3)
    assert hint_rows(4, 1, options) == (0,)


@pytest.mark.parametrize("options", [{"context_window": SimpleNamespace(index_list=[5, 6, 7])}, ANIMATEDIFF], ids=str)
def test_a_window_of_another_length_than_the_latents_is_not_theirs(options: dict[str, Any]) -> None:
    """A pack may cut a window into smaller batches without saying so."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.hint_inputs import hint_rows

    assert hint_rows(3, 9, options) == (5, 6, 7)
    assert hint_rows(2, 9, options) == (0, 1)


def test_animatediffs_windows_are_honoured_in_a_run() -> None:
    """A sampling function that cuts the video as that pack does: per window, with `ad_params`, and no host window."""
    frames, images = 6, video.hints(6)
    windows = [[0, 1, 2], [2, 3, 4], [4, 5, 0]]

    def in_windows(executor: Any, model: Any, conds: Any, x: Tensor, timestep: Tensor, options: Any) -> Any:
        totals, counts = [torch.zeros_like(x) for _ in conds], torch.zeros(frames, 1, 1, 1)
        for window in windows:
            params = {"sub_idxs": window, "full_length": frames, "context_length": 3}
            inner = {**options, "transformer_options": {**options["transformer_options"], "ad_params": params}}
            cut = [[_cut(cond, window) for cond in half] for half in conds]
            parts = executor(model, cut, x[window], timestep[window], inner)
            counts[window] += 1
            for total, part in zip(totals, parts, strict=True):
                total[window] += part
        return [total / counts for total in totals]

    from comfy.patcher_extension import WrappersMP

    model = video.toy_patcher()
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "a", in_windows)
    with video.seen_hints() as seen:
        found = video.sample(video.controlled(model, NAME, images), frames, 2)
    assert found.isfinite().all()
    assert [entry["hints"] for entry in seen] == windows * 2


def _cut(cond: dict[str, Any], window: list[int]) -> dict[str, Any]:
    conds = dict(cond["model_conds"])
    conds["num_video_frames"] = conds["num_video_frames"]._copy_with(len(window))
    conds["c_concat"] = conds["c_concat"]._copy_with(conds["c_concat"].cond[window])
    return {**cond, "model_conds": conds}


def test_the_control_does_not_pass_for_one_of_advanced_controlnets() -> None:
    """Objects with `sub_idxs` are treated by AdvancedControlNet as its own controls."""
    assert not hasattr(video.control(NAME), "sub_idxs")


# -- the encoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 0])
def test_a_frame_in_two_neighbouring_windows_is_encoded_once_per_step(budget: int | None) -> None:
    """Features of the previous window are reused, also where the cache has no room."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.features import CACHE

    frames, steps = 10, 2
    model = video.controlled(video.windowed(video.toy_patcher(), 4, 2), NAME, video.hints(frames))
    expected = video.sample(model, frames, steps)
    CACHE.clear()
    budgets = dict(CACHE.budgets)
    try:
        if budget is not None:
            CACHE.budgets = {"device": budget, "host": budget}
        with video.encoded_frames(NAME) as calls:
            assert torch.equal(video.sample(model, frames, steps), expected)
        new = [4, 2, 2, 2]  # with room, all steps of a window at once
        assert calls == (new * steps if budget == 0 else [rows for rows in new for _ in range(steps)])
    finally:
        CACHE.budgets = budgets


def test_many_frames_are_encoded_a_few_at_a_time() -> None:
    from comfyui_controlnext.controlnext_core.memory import ROWS_AT_ONCE

    frames = ROWS_AT_ONCE + 3
    model = video.controlled(video.toy_patcher(), NAME, video.hints(frames))
    with video.encoded_frames(NAME) as calls:
        video.sample(model, frames, 1)
    assert calls == [ROWS_AT_ONCE, 3]


# -- not as many hints as frames --------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_windows", [False, True])
@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [0, 0, 0, 0, 0, 0]),
        (6, [0, 1, 2, 3, 4, 5]),
        (4, [0, 1, 2, 3, 0, 1]),
        (8, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_more_or_fewer_hints_than_frames_are_told_once_a_run(
    in_windows: bool, count: int, expected: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Hints: one serves the whole video; fewer repeat from the start; superfluous ones are not used."""
    base = video.windowed(video.toy_patcher()) if in_windows else video.toy_patcher()
    model = video.controlled(base, NAME, video.hints(count))
    for _ in range(2):
        caplog.clear()
        with video.seen_hints() as seen:
            video.sample(model, 6, 1)
        windows = [[0, 1, 2, 3], [2, 3, 4, 5]] if in_windows else [list(range(6))]
        for entry, window in zip(seen, windows, strict=True):
            assert entry["hints"] == ([0] if count == 1 else [expected[frame] for frame in window])
        told = [record.getMessage() for record in caplog.records if "hints for" in record.getMessage()]
        if count in (1, 6):
            assert told == []
        else:
            what = "they repeat from the start" if count == 4 else "the last 2 are not used"
            assert told == [f"svd_v2.safetensors: {count} hints for 6 frames or images: {what}."]


def test_the_count_of_windows_that_others_make_is_not_guessed(caplog: pytest.LogCaptureFixture) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.hint_inputs import frames_of

    class Other:
        index_list = (0, 1)

    assert frames_of(2, {"context_window": Other()}) is None
    assert frames_of(2, {"ad_params": {"sub_idxs": [3, 4], "full_length": 9}}) == 9
    assert frames_of(2, {"ad_params": {"sub_idxs": None}}) == frames_of(2, {}) == 2


def test_a_control_of_another_family_is_refused_by_both_doors() -> None:
    from comfyui_controlnext.controlnext_core import checkpoint
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_control
    from comfyui_controlnext.controlnext_core.detection import read_control_file
    from comfyui_controlnext.controlnext_core.specs import Family

    images, model = video.hints(2), video.toy_patcher()
    for family, name in ((Family.SD15, "sd15"), (Family.SDXL, "sdxl")):
        control = load_control(read_control_file(checkpoint.peek(video.control_file(NAME))), family)
        message = rf"svd_v2\.safetensors: is a {family.value} control \({name}\), but the connected model is SVD"
        with pytest.raises(ValueError, match=message):
            video.controlled(model, NAME, images, control=control)
        with pytest.raises(ValueError, match=message):
            conds = video.stock_apply(video.conditioning(), NAME, images, control=control)
            video.sample(model, 2, 1, conds)
