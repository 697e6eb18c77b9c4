"""Batches: both halves in one batch or in two, several latents, several hints, hints of every shape."""

from __future__ import annotations

from typing import Any

import comfyui_controlnext.tests.fixtures.sampling_fixtures as fixtures
import pytest
import torch
from comfyui_controlnext.tests.fixtures.sampling_fixtures import CELLS, REASSOCIATED, Studio, picture, relative
from torch import Tensor

pytestmark = pytest.mark.comfy


class LowMemory:
    """Stand-in for the host's memory manager with no free memory, as the sampler queries it."""

    def __getattr__(self, name: str) -> Any:
        import comfy.model_management

        return getattr(comfy.model_management, name)

    def get_free_memory(self, *_: Any, **__: Any) -> float:
        return 0.0


def no_memory_for_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the sampler run the halves of the guidance one after the other."""
    import comfy.model_patcher
    import comfy.samplers

    if hasattr(comfy.samplers, "model_management"):
        monkeypatch.setattr(comfy.samplers, "model_management", LowMemory())
    else:  # later hosts ask the model
        monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda *_: 0.0)


def rows_per_forward(studio: Studio, run: Any) -> tuple[Tensor, list[int]]:
    """Result of `run`, and the batch size of each of the UNet's forwards."""
    rows: list[int] = []
    unet = studio.model.model.diffusion_model
    handle = unet.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    try:
        return run(), rows
    finally:
        handle.remove()


@pytest.mark.parametrize("apply_to", ["both", "positive"])
@pytest.mark.parametrize("door", ["stock", "ours"])
def test_both_halves_in_one_batch_and_in_two_give_the_same(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, door: str, apply_to: str
) -> None:
    loaded = studio.load()
    control = studio.options(loaded.control, apply_to)

    def run() -> Tensor:
        if door == "stock":
            return studio.sample(loaded.model, *studio.stock(control, picture()))
        return studio.sample(studio.ours(loaded.model, control, picture()))

    together, rows = rows_per_forward(studio, run)
    assert rows == [2, 2]
    no_memory_for_two(monkeypatch)
    apart, rows = rows_per_forward(studio, run)
    assert rows == [1, 1, 1, 1]
    assert relative(apart, together) < REASSOCIATED


def test_prompts_of_different_lengths_run_apart_through_both_doors(studio: Studio) -> None:
    loaded = studio.load()
    long = studio.encode("a cat on a mat " * 80)
    assert long[0][0].shape[1] > 4 * studio.negative[0][0].shape[1]
    conds = studio.apply_to(long, studio.negative, loaded.control, picture())
    through_stock, rows = rows_per_forward(studio, lambda: studio.sample(loaded.model, *conds))
    assert rows == [1, 1, 1, 1]
    through_ours = studio.sample(studio.ours(loaded.model, loaded.control, picture()), long)
    assert torch.equal(through_stock, through_ours)


@pytest.mark.parametrize("apart", [False, True], ids=["one batch", "two batches"])
def test_each_image_of_a_batch_gets_its_own_hint(studio: Studio, monkeypatch: pytest.MonkeyPatch, apart: bool) -> None:
    if apart:
        no_memory_for_two(monkeypatch)
    loaded = studio.load()
    hints = picture(count=2)
    assert relative(hints[1], hints[0]) > 0.1
    conds = studio.stock(loaded.control, hints)
    found = studio.sample(loaded.model, *conds, batch=2)
    assert torch.equal(found, studio.sample(studio.ours(loaded.model, loaded.control, hints), batch=2))
    for i in range(2):
        alone = studio.ours(loaded.model, loaded.control, hints[i : i + 1])
        assert relative(found[i : i + 1], studio.sample(alone, first=i)) < REASSOCIATED


@pytest.mark.parametrize(("latents", "hints"), [(3, 1), (3, 2), (1, 3)])
def test_hints_repeat_from_the_start_and_those_left_over_are_not_used(studio: Studio, latents: int, hints: int) -> None:
    loaded = studio.load()
    images = picture(count=hints)
    with fixtures.counted_calls(loaded) as encoded:
        found = studio.sample(studio.ours(loaded.model, loaded.control, images), batch=latents)
    assert sum(encoded) == 2 * min(hints, latents)  # two steps, each hint in use once
    last = latents - 1
    row = last % hints
    alone = studio.ours(loaded.model, loaded.control, images[row : row + 1])
    assert relative(found[last:], studio.sample(alone, first=last)) < REASSOCIATED


@pytest.mark.parametrize("door", ["stock", "ours"])
def test_gray_alpha_and_mask_like_hints_count_as_their_pictures(studio: Studio, door: str) -> None:
    loaded = studio.load()

    def run(hint: Tensor) -> Tensor:
        if door == "stock":
            return studio.sample(loaded.model, *studio.stock(loaded.control, hint), steps=1)
        return studio.sample(studio.ours(loaded.model, loaded.control, hint), steps=1)

    with_alpha = picture(channels=4)
    assert torch.equal(run(with_alpha), run(with_alpha[..., :3]))
    gray = picture(channels=1)
    expected = run(gray.expand(-1, -1, -1, 3))
    assert torch.equal(run(gray), expected)
    assert torch.equal(run(gray[..., 0]), expected)  # a MASK, (batch, height, width)
    assert relative(run(gray.transpose(1, 2)), expected) > 0.001


@pytest.mark.parametrize("size", [(104, 52), (16, 16), (64, 65)], ids=str)
@pytest.mark.parametrize("door", ["stock", "ours"])
def test_a_hint_of_another_size_is_sized_as_the_stock_node_does(
    studio: Studio, size: tuple[int, int], door: str
) -> None:
    """Nearest exact, the centre cut to the picture's proportions."""
    import comfy.utils

    loaded = studio.load()
    hint = torch.nn.functional.interpolate(picture().movedim(-1, 1), size=size, mode="bilinear").movedim(1, -1)
    cells = (8, 12)
    sized = comfy.utils.common_upscale(hint.movedim(-1, 1), 8 * cells[1], 8 * cells[0], "nearest-exact", "center")

    def run(image: Tensor) -> Tensor:
        latent = torch.zeros(1, 4, *cells)
        if door == "stock":
            return studio.sample(loaded.model, *studio.stock(loaded.control, image), latent=latent, steps=1)
        return studio.sample(studio.ours(loaded.model, loaded.control, image), latent=latent, steps=1)

    assert torch.equal(run(hint), run(sized.movedim(1, -1)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("door", ["stock", "ours"])
def test_a_hint_that_is_no_picture_is_refused_at_the_apply_node(studio: Studio, bad: float, door: str) -> None:
    loaded = studio.load()
    hint = picture()
    hint[0, 3, 4, 1] = bad
    with pytest.raises(ValueError, match=r"gen2\.safetensors: the hint holds NaN or infinite values"):
        studio.stock(loaded.control, hint) if door == "stock" else studio.ours(loaded.model, loaded.control, hint)
    with pytest.raises(ValueError, match=r"gen2\.safetensors: the hint has shape \[1, 5, 64, 64\].*1, 3 or 4 channels"):
        studio.stock(loaded.control, torch.zeros(1, 64, 64, 5))


def test_a_constant_hint_gives_finite_latents_in_half_precision(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of a black and white hint in fp16 have their statistics in fp32."""
    from comfy_extras.nodes_model_advanced import ModelComputeDtype
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling import next_forward

    seen: set[torch.dtype] = set()
    fuse = next_forward.fuse
    monkeypatch.setattr(next_forward, "fuse", lambda h, terms: (seen.add(h.dtype), fuse(h, terms))[1])
    loaded = studio.load()
    (half,) = ModelComputeDtype().patch(loaded.model, "fp16")
    for value in (0.0, 1.0):
        model = studio.ours(half, loaded.control, torch.full((1, 8 * CELLS, 8 * CELLS, 3), value))
        assert studio.sample(model, steps=1).isfinite().all()
    assert seen == {torch.float16}
