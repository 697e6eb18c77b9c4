"""Memory of ControlNet-XS: the formulas against counts, and the requirement reported to the host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.benchmarks.bench_video_memory import Allocations
from comfyui_controlnext.benchmarks.bench_xs_memory import network, numbers_per_cell, numbers_per_pixel, released_shape
from comfyui_controlnext.controlnext_core.memory import (
    XS_ROWS_PER_HINT,
    rows_at_once,
    xs_numbers_per_cell,
    xs_numbers_per_pixel,
)
from comfyui_controlnext.controlnext_core.specs import Halves
from comfyui_controlnext.controlnext_core.xs_specs import XSShape
from comfyui_controlnext.tests.fixtures.sampling_fixtures import Studio, picture
from comfyui_controlnext.tests.fixtures.xs_fixtures import SD_LIKE, SDXL_LIKE, Forward, hint_for, make_file, shape_of
from comfyui_controlnext.tools import tiny_models

HALF, FULL = torch.float16, torch.float32
SHAPES: dict[str, XSShape] = {
    **{name: released_shape(name) for name in tiny_models.RELEASED_XS},
    "as wide as the base": shape_of(SDXL_LIKE, (32, 64, 64)),
    "twice as wide": shape_of(SD_LIKE, (64, 128, 128, 128)),  # transformers need most
    "wide above": shape_of(SDXL_LIKE, (128, 32, 32)),  # the second norms need most
    "narrow above": shape_of({**SDXL_LIKE, "channel_mult": (4, 1, 1)}, (32, 32, 32)),  # the first norms do
    "half as wide": shape_of(SDXL_LIKE, (16, 16, 16)),  # norms in fp32 need most in half precision
}
HEADS = {name: () if name in tiny_models.RELEASED_XS else (2,) for name in SHAPES}


def formula(shape: XSShape, dtype: torch.dtype, heads: tuple[int, ...]) -> float:
    return xs_numbers_per_cell(network(shape, dtype, heads).config, shape.fp32_norms and dtype != FULL)


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_the_formula_holds_what_a_forward_needs_and_little_more(name: str, dtype: torch.dtype) -> None:
    shape, heads = SHAPES[name], HEADS[name]
    for height, width in ((256, 384), (512, 512)):
        measured = numbers_per_cell(shape, dtype, height, width, heads=heads)
        assert measured < 1.001 * formula(shape, dtype, heads) < 1.15 * measured


def test_shapes_without_numbers_are_counted_as_real_ones() -> None:
    shape = SHAPES["as wide as the base"]
    for dtype in (FULL, HALF):
        on_cpu, on_meta = (numbers_per_cell(shape, dtype, 128, 128, 2, (2,), device) for device in ("cpu", "meta"))
        assert on_cpu == pytest.approx(on_meta, rel=0.02)


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
def test_the_formula_holds_what_a_hint_needs(dtype: torch.dtype) -> None:
    for name in tiny_models.RELEASED_XS:
        told = xs_numbers_per_pixel(network(SHAPES[name], dtype).config)
        for rows in (1, 3):
            assert numbers_per_pixel(SHAPES[name], dtype, 256, 384, rows) == pytest.approx(told, rel=0.001)


# in the host


@pytest.fixture
def forward() -> Iterator[Forward]:
    """Forward with a batch of two, as one picture has under guidance."""
    with torch.inference_mode():
        yield Forward.make(SDXL_LIKE, size=(32, 32), labels=True)


@pytest.fixture
def control(forward: Forward, tmp_path: Path) -> Any:
    """Control of half the base's widths."""
    return load(make_file(tmp_path / "xs.safetensors", shape_of(SDXL_LIKE, (32, 32, 32), True)))


def load(path: Path) -> Any:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.features import CACHE

    CACHE.clear()
    return load_controlnet_xs(path).control


def peak_of(forward: Forward, *controls: Any, **options: Any) -> int:
    """Peak bytes in one forward, beside weights and inputs."""
    old = [*forward.unet.parameters(), forward.x, forward.t, forward.context, forward.y]
    for one in controls:
        old += [*one.loaded.net.parameters(), one.cond_hint_original]
    with Allocations([tensor for tensor in old if tensor is not None]) as allocations:
        forward.run(*controls, **options)
    return allocations.peak


@pytest.mark.comfy
@pytest.mark.parametrize("how", ["plain", "masked", "one half"])
def test_a_forward_needs_no_more_than_the_host_is_told(how: str, forward: Forward, control: Any) -> None:
    """Requirement above that of the base; hints are encoded before the forward, with a separate peak."""
    changes = {"masked": {"masks": (torch.eye(32)[None],)}, "one half": {"apply_to": Halves.POSITIVE}}.get(how, {})
    hinted = control.with_options(**changes).set_cond_hint(hint_for(forward.x), 1.0, (0.0, 1.0))
    chunks = {"cond_or_uncond": [1, 0]}
    peak_of(forward, hinted, **chunks)  # the hint's features are in the cache now
    more = peak_of(forward, hinted, **chunks) - peak_of(forward, **chunks)
    told = hinted.bytes_beside_base(FULL)
    assert told == XS_ROWS_PER_HINT * 32 * 32 * 4 * xs_numbers_per_cell(control.loaded.net.config, False)
    assert 0.2 * told < more < told


@pytest.mark.comfy
@pytest.mark.parametrize("rows", [1, 3])
def test_encoding_many_hints_needs_what_the_host_is_told(
    rows: int, forward: Forward, control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfyui_controlnext.controlnext_core import memory

    count, pixels = 8, 256 * 256
    hinted = control.set_cond_hint(hint_for(forward.x, count=count), 1.0, (0.0, 1.0))
    row = pixels * hinted.bytes_per_pixel(FULL)
    monkeypatch.setattr(memory, "WORKING_BYTES", rows * row)
    hinted.pre_run(forward.base, forward.base.model_sampling.percent_to_sigma)
    with Allocations([*control.loaded.net.parameters(), hinted.cond_hint_original]) as allocations:
        features = hinted.hint_features(tuple(range(count)), forward.x)
    assert 0.9 * rows * row < allocations.peak - 2 * features.nbytes < 1.02 * rows * row


@pytest.mark.comfy
def test_the_host_is_told_the_larger_of_both_and_the_room_for_the_features(
    forward: Forward, control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hinted = control.set_cond_hint(hint_for(forward.x, count=2), 1.0, (0.0, 1.0))
    beside, row = hinted.bytes_beside_base(HALF), 256 * 256 * hinted.bytes_per_pixel(HALF)
    assert hinted.inference_memory_requirements(HALF) == max(2 * beside, row * min(2, rows_at_once(row)))
    assert hinted.inference_memory_requirements(torch.float8_e4m3fn) == hinted.inference_memory_requirements(HALF)
    assert hinted.inference_memory_requirements(FULL) == 2 * hinted.inference_memory_requirements(HALF)
    before = hinted.inference_memory_requirements(HALF)
    monkeypatch.setattr(hinted.loaded.patcher, "load_device", torch.device("cuda"))
    assert hinted.inference_memory_requirements(HALF) == before + 2 * 32 * (32 * 32) * 2  # once, not per step
    chained = control.copy().set_cond_hint(hint_for(forward.x), 1.0, (0.0, 1.0))
    alone = chained.inference_memory_requirements(HALF)
    chained.previous_controlnet = hinted
    assert chained.inference_memory_requirements(HALF) == alone + hinted.inference_memory_requirements(HALF)


@pytest.mark.comfy
def test_both_doors_tell_the_host_the_same(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management

    asked: list[int] = []
    real = comfy.model_management.load_models_gpu

    def note(models: Any, memory_required: float = 0, **more: Any) -> Any:
        asked.append(int(memory_required))
        return real(models, memory_required=memory_required, **more)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", note)
    control = load(tiny_models.make_controlnet_xs(tmp_path / "xs.safetensors"))

    def once(*run: Any) -> int:
        asked.clear()
        studio.sample(*run, steps=1)
        return max(asked)

    bare, stock = once(), once(None, *studio.stock(control, picture()))
    assert once(studio.ours(studio.model, control, picture())) == stock
    hinted = control.copy().set_cond_hint(picture().movedim(-1, 1))
    assert stock - bare == hinted.inference_memory_requirements(studio.model.model_dtype()) > 0
