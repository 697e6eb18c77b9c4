"""Memory of encoders and videos: the measured table, passes within it, and the requirement reported to the host."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.benchmarks.bench_video_memory import (
    Allocations,
    encoder_peak,
    numbers_per_pixel,
    plan,
    spec_of,
)
from comfyui_controlnext.controlnext_core import memory
from comfyui_controlnext.controlnext_core.memory import (
    NUMBERS_PER_PIXEL,
    ROWS_AT_ONCE,
    WORKING_BYTES,
    feature_bytes,
    rows_at_once,
)
from comfyui_controlnext.controlnext_core.specs import BUILDS, SPECS, Spec, config_of
from comfyui_controlnext.tests.fixtures import video_fixtures as video

HALF, FULL = torch.float16, torch.float32
PUBLISHED = [spec_of(build) for build in BUILDS]


def named(spec: Spec) -> str:
    return spec.build


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("spec", PUBLISHED, ids=named)
def test_the_table_holds_what_a_pass_needs_and_little_more(spec: Spec, dtype: torch.dtype) -> None:
    assert NUMBERS_PER_PIXEL.keys() == BUILDS.keys()
    for height, width in ((512, 768), (1024, 1024)):
        measured = numbers_per_pixel(spec, dtype, height, width)
        assert measured < 1.0001 * NUMBERS_PER_PIXEL[spec.build] < 1.17 * measured
    several, one = numbers_per_pixel(spec, dtype, 512, 512, rows=4), numbers_per_pixel(spec, dtype, 512, 512)
    assert 0.93 * one < several <= one  # products of convolutions are there once for all hints


@pytest.mark.parametrize("spec", PUBLISHED, ids=named)
def test_shapes_without_numbers_are_counted_as_real_ones(spec: Spec) -> None:
    on_cpu = encoder_peak(spec, 64, 64, FULL, device="cpu")
    assert on_cpu == pytest.approx(encoder_peak(spec, 64, 64, FULL), rel=0.02)


@pytest.mark.parametrize("spec", PUBLISHED, ids=named)
def test_small_hints_need_no_more_than_the_law_says(spec: Spec) -> None:
    """Hints without merged convolutions, with some of them, and just below the size from which the table applies."""
    parts = []
    for side in (64, 128, 192, 256, 504):
        law = memory.numbers_per_pixel(spec.build, side * side)
        parts.append(numbers_per_pixel(spec, FULL, side, side) / law)
    assert 0.8 < max(parts) < 1.01, parts


def test_what_is_gone_is_not_counted() -> None:
    weight = torch.zeros(10)
    with Allocations([weight]) as allocations:
        first = torch.zeros(1000)
        weight.view(2, 5)
        del first
        kept = torch.ones(500).double()
    assert allocations.peak == 500 * 4 + 500 * 8
    assert sum(size for _, size in allocations.live.values()) == kept.nbytes + 500 * 4  # seen at the next operation


def test_a_pass_takes_fewer_hints_the_larger_they_are() -> None:
    def rows(build: str, height: int, width: int) -> int:
        return rows_at_once(NUMBERS_PER_PIXEL[build] * 2 * height * width)

    assert rows("gen2_unpadded", 256, 256) == ROWS_AT_ONCE
    assert rows("gen2_unpadded", 576, 1024) == 4
    assert rows("gen1a", 2048, 2048) == 1  # one hint needs more than the budget, and gets it
    for build in BUILDS:
        row = NUMBERS_PER_PIXEL[build] * 2 * 576 * 1024
        assert row * rows_at_once(row) <= WORKING_BYTES or rows_at_once(row) == 1


@pytest.mark.parametrize(("name", "expected"), [("svd_v1", 1280 * 9 * 16), ("svd_v2", 320 * 36 * 64)])
def test_features_of_a_frame_at_576_by_1024(name: str, expected: int) -> None:
    spec = SPECS[name]
    assert feature_bytes(spec, config_of(spec).out_channels, 576, 1024, 2) == 2 * expected


def test_the_page_about_video_states_what_the_formula_gives() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "video.md").read_text("utf-8")
    plans = [plan(SPECS[name], 240, 576, 1024).split()[1:] for name in ("svd_v1", "svd_v2")]
    for first, second in zip(*plans, strict=True):
        assert f"| {first} | {second} |" in page
    for name in ("NUMBERS_PER_PIXEL", "rows_at_once", "WORKING_BYTES", "ROWS_AT_ONCE", "feature_bytes"):
        assert f"`{name}" in page and hasattr(memory, name)


# in the host


@pytest.fixture
def one_run() -> Iterator[None]:
    yield from video.one_run()


@pytest.fixture
def hinted(one_run: None) -> Any:
    """Control with 12 hints of 64 x 64, ready to give features."""
    control = video.control("svd_v2_padded").copy().set_cond_hint(video.hints(12, (8, 8)).movedim(-1, 1))
    control.pre_run(video.base().host, video.base().host.model_sampling.percent_to_sigma)
    yield control
    control.cleanup()


@pytest.mark.comfy
@pytest.mark.filterwarnings("ignore:::diffusers")
@pytest.mark.parametrize("rows", [1, 3, ROWS_AT_ONCE])
def test_encoding_many_frames_needs_what_the_host_is_told(
    hinted: Any, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = 64 * 64 * hinted.bytes_per_pixel(FULL)
    assert row == 64 * 64 * 139 * 4
    monkeypatch.setattr(memory, "WORKING_BYTES", rows * row)
    told = hinted.inference_memory_requirements(FULL)
    assert told == rows * row
    x, h = torch.zeros(12, 4, 8, 8), torch.zeros(12, video.WIDTH, 4, 4)
    old = [*hinted.net.patcher.model.parameters(), hinted.cond_hint_original]
    with Allocations(old) as allocations:
        result = hinted.features(tuple(range(12)), h, x, 1.0)
    assert 0.9 * told < allocations.peak - 2 * result.nbytes < 1.02 * told


@pytest.mark.comfy
@pytest.mark.filterwarnings("ignore:::diffusers")
@pytest.mark.parametrize("name", video.VARIANTS)
def test_a_frame_is_kept_at_the_sites_size(name: str, one_run: None) -> None:
    """Channels x height x width there, not the encoder's output."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.features import CACHE

    frames, steps = 3, 2
    video.sample(video.controlled(video.toy_patcher(), name, video.hints(frames, (8, 8))), frames, steps, cells=(8, 8))
    side = 8 // 2 if name != "svd_v1" else 8 // 4
    assert len(CACHE) == frames * steps
    assert CACHE.used["host"] == frames * steps * video.out_channels(name) * side * side * 4


@pytest.mark.comfy
@pytest.mark.filterwarnings("ignore:::diffusers")
def test_a_long_video_stays_within_the_budgets(one_run: None) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.features import CACHE

    budgets = dict(CACHE.budgets)
    entry = video.WIDTH * 2 * 2 * 4
    try:
        CACHE.budgets = {"device": 0, "host": 7 * entry + 10}
        model = video.windowed(video.controlled(video.toy_patcher(), "svd_v2", video.hints(20)), 4, 1)
        assert video.sample(model, 20, 2).isfinite().all()
        assert len(CACHE) == 7 and CACHE.used == {"device": 0, "host": 7 * entry}
    finally:
        CACHE.budgets = budgets


@pytest.mark.comfy
@pytest.mark.filterwarnings("ignore:::diffusers")
def test_room_for_features_is_asked_for_on_a_device_as_far_as_the_cache_goes(
    hinted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling import host_control
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.features import CACHE

    passes = hinted.inference_memory_requirements(HALF)
    assert passes == rows_at_once(64 * 64 * 139 * 2) * 64 * 64 * 139 * 2, "nothing more on the CPU"
    monkeypatch.setattr(hinted.net.patcher, "load_device", torch.device("cuda"))
    frame = video.WIDTH * 4 * 4 * 2
    steps = host_control.STEPS_TO_KEEP
    assert hinted.inference_memory_requirements(HALF) == passes + 12 * frame * steps
    monkeypatch.setattr(CACHE, "budgets", {"device": 1000, "host": 0})
    assert hinted.inference_memory_requirements(HALF) == passes + 1000
    monkeypatch.setattr(CACHE, "used", {"device": 400, "host": 0})
    assert hinted.inference_memory_requirements(HALF) == passes + 600


@pytest.mark.comfy
@pytest.mark.filterwarnings("ignore:::diffusers")
def test_both_doors_tell_the_host_the_same(one_run: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Controls count once each, and their encoders are loaded."""
    import comfy.model_management

    asked: list[tuple[int, int]] = []
    load = comfy.model_management.load_models_gpu

    def note(models: Any, memory_required: float = 0, **more: Any) -> Any:
        asked.append((len({id(model.model) for model in models}), int(memory_required)))
        return load(models, memory_required=memory_required, **more)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", note)
    images, model, frames = video.hints(4), video.toy_patcher(), 4
    conds = video.conditioning()

    def once(model: Any, conds: Any) -> tuple[int, int]:
        asked.clear()
        video.sample(model, frames, 1, conds)
        (found,) = [entry for entry in asked if entry[1]]
        return found

    bare = once(model, conds)
    one = once(model, video.stock_apply(conds, "svd_v2", images))
    assert one[1] - bare[1] == 4 * math.prod(images.shape[1:3]) * 139 * 4
    ours = video.controlled(model, "svd_v2", images)
    assert once(ours, conds) == one == (bare[0] + 1, one[1])
    both = once(model, video.stock_apply(video.stock_apply(conds, "svd_v2", images), "svd_v1", images))
    assert once(video.controlled(ours, "svd_v1", images), conds) == both == (bare[0] + 2, both[1])
    assert both[1] - one[1] == 4 * math.prod(images.shape[1:3]) * 74 * 4


@pytest.mark.comfy
@pytest.mark.filterwarnings("ignore:::diffusers")
def test_knowing_a_long_hint_by_its_content_copies_a_frame_at_a_time(hinted: Any) -> None:
    hint = hinted.cond_hint_original
    hinted.__dict__.pop("hint_id", None)
    with Allocations([hint]) as allocations:
        found = hinted.hint_id
    assert allocations.peak == 0, "an IMAGE has channels last and is read where it lies"
    other = hinted.copy().set_cond_hint(hint.contiguous())
    with Allocations([other.cond_hint_original]) as allocations:
        assert other.hint_id == found
    assert 0 < allocations.peak <= 2 * hint[0].nbytes
    changed = hint.clone()
    changed[11, 0, 0, 0] += 0.5
    assert hinted.copy().set_cond_hint(changed).hint_id != found
