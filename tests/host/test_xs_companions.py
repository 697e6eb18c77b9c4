"""ControlNet-XS with other features in one forward: halves, masks, other controls, other patches, broken hosts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.controlnext_core.specs import Halves
from comfyui_controlnext.tests.fixtures.xs_fixtures import BASE_HEADS, SDXL_LIKE, Forward, hint_for, make_file, shape_of
from comfyui_controlnext.tests.references import reference_xs as reference
from torch import Tensor

pytestmark = pytest.mark.comfy

PARITY = 1e-5
WIDTHS = (40, 48, 96)
"""Widths with groups of two and three channels: groups of one would hide the time embedding."""


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def forward() -> Forward:
    """Forward with a batch of two: by `cond_or_uncond`, two images of one chunk or one of each half."""
    return Forward.make(SDXL_LIKE, labels=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of two controls with time embeddings."""
    folder = tmp_path_factory.mktemp("xs")
    return [make_file(folder / f"{seed}.safetensors", shape_of(SDXL_LIKE, WIDTHS, True), seed=seed) for seed in (1, 2)]


def load(path: Path, hint: Tensor, strength: float = 1.0, **options: Any) -> Any:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

    control = load_controlnet_xs(path).control.with_options(**options)
    return control.set_cond_hint(hint, strength, (0.0, 1.0))


def worst(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


HALVES = {"both": (True, True), "positive": (False, True), "negative": (True, False)}  # rows are (negative, positive)


@pytest.mark.parametrize("apply_to", HALVES)
def test_a_half_without_control_is_the_plain_model(apply_to: str, forward: Forward, files: list[Path]) -> None:
    hint = hint_for(forward.x)
    chunks = {"cond_or_uncond": [1, 0]}
    out = forward.run(load(files[0], hint, 0.5, apply_to=Halves(apply_to)), **chunks)
    plain = forward.run(**chunks)
    controlled = forward.plain_loop(checkpoint.load(files[0]), hint, scale=0.5)
    for row, gets_it in enumerate(HALVES[apply_to]):
        if gets_it:
            assert worst(out[row], controlled[row]) < PARITY
        else:
            assert torch.equal(out[row], plain[row])


def test_each_image_of_a_batch_gets_its_own_hint(forward: Forward, files: list[Path]) -> None:
    hints = hint_for(forward.x, count=2)
    out = forward.run(load(files[0], hints))
    assert worst(out, forward.plain_loop(checkpoint.load(files[0]), hints)) < PARITY
    window = SimpleNamespace(index_list=[1, 0])
    turned = forward.run(load(files[0], hints), context_window=window)
    assert worst(turned, forward.plain_loop(checkpoint.load(files[0]), hints.flip(0))) < PARITY


def test_a_mask_multiplies_what_the_base_gets_at_every_size(forward: Forward, files: list[Path]) -> None:
    """The half of the picture that is masked out gets nothing: with a control that hears the base but not the text."""
    hint, left = hint_for(forward.x), torch.zeros(1, 128, 128)
    left[..., :64] = 1
    out = forward.run(load(files[0], hint, masks=(left,)))
    whole = forward.run(load(files[0], hint))
    assert not torch.equal(out, whole)
    assert torch.equal(forward.run(load(files[0], hint, masks=(torch.ones(1, 8, 8),))), whole)
    assert torch.equal(forward.run(load(files[0], hint, masks=(torch.zeros(1, 8, 8),))), forward.run())
    expected = masked_loop(forward, checkpoint.load(files[0]), hint, left)
    assert worst(out, expected) < PARITY


def masked_loop(forward: Forward, weights: dict[str, Tensor], hint: Tensor, mask: Tensor) -> Tensor:
    """Plain loop with every 1x1 convolution towards the base followed by the mask, averaged to its size."""

    class Masked(reference.Network):
        def conv(self, name: str, h: Tensor, stride: int = 1) -> Tensor:
            out = super().conv(name, h, stride)
            if name.startswith(("enc_zero_convs_out", "middle_block_out", "dec_zero_convs_out")):
                side = mask.shape[-1] // out.shape[-1]
                out = out * torch.nn.functional.avg_pool2d(mask[None], side)
            return out

    base = reference.Network(forward.unet.state_dict(), heads=lambda inner: BASE_HEADS)
    control = Masked(weights, heads=lambda inner: 2)
    return reference.forward(base, control, forward.x, forward.t, forward.context, hint, y=forward.y)


def test_several_controls_give_the_same_bits_in_any_order(forward: Forward, files: list[Path]) -> None:
    one, two = (load(path, hint_for(forward.x, seed=i), 0.5) for i, path in enumerate(files))
    assert torch.equal(forward.run(one, two), forward.run(two, one))
    assert worst(forward.run(one, two), forward.run(one)) > 0.01


def test_masks_alone_order_controls_that_are_otherwise_the_same(forward: Forward, files: list[Path]) -> None:
    hint, side = hint_for(forward.x), torch.linspace(0.1, 1, 128).expand(1, 128, -1)
    controls = [load(files[0], hint, 0.7, masks=(mask,)) for mask in (side, 1 - side / 3, side.mT**2)]
    expected = forward.run(*controls)
    for order in ((2, 1, 0), (1, 2, 0), (2, 0, 1)):
        assert torch.equal(forward.run(*(controls[number] for number in order)), expected), order


def test_own_time_embeddings_add_their_differences_to_the_base(forward: Forward, files: list[Path]) -> None:
    """Embedding emb = base + sum of k_i (own_i - base), read by a patch after this pack's."""
    seen: list[Tensor] = []

    def look(emb: Tensor, model_channels: int, options: Any) -> Tensor:
        seen.append(emb)
        return emb

    controls = [load(path, hint_for(forward.x), strength) for path, strength in zip(files, (0.5, 0.8), strict=True)]
    forward.run(*controls, patches={"emb_patch": [look]})
    angles = reference.sinusoid(forward.t, 32)
    base = reference.Network(forward.unet.state_dict(), heads=lambda inner: 1).mlp("time_embed", angles)
    expected = base
    for path, strength in zip(files, (0.5, 0.8), strict=True):
        own = reference.Network(checkpoint.load(path), heads=lambda inner: 1).mlp("control_model.time_embed", angles)
        expected = expected + strength**0.3 * (own - base)
    assert worst(seen[0], expected) < PARITY
    assert worst(expected, base) > 0.1


def test_two_halves_of_a_control_are_the_whole_without_own_time(forward: Forward, tmp_path: Path) -> None:
    """Chained copies at half strength: the streams hear the same base, so what they add is the sum."""
    path = make_file(tmp_path / "xs.safetensors", shape_of(SDXL_LIKE, WIDTHS))
    hint = hint_for(forward.x)
    halves = forward.run(load(path, hint, 0.5), load(path, hint, 0.5))
    assert worst(halves, forward.run(load(path, hint, 1.0))) < PARITY


def test_attention_patches_of_the_base_do_not_run_in_the_control(forward: Forward, files: list[Path]) -> None:
    calls = []

    def count(q: Tensor, k: Tensor, v: Tensor, options: Any) -> Any:
        calls.append(q.shape[-1])
        return q, k, v

    patches = {"patches": {"attn1_patch": [count], "attn2_patch": [count]}}
    forward.run(**patches)
    alone = list(calls)
    forward.run(load(files[0], hint_for(forward.x)), **patches)
    assert len(alone) > 0
    assert calls == alone * 2


def test_deep_shrink_may_change_the_size_on_the_way(forward: Forward, files: list[Path]) -> None:
    """A patch that halves the features after a block, before or after the skip is stored, and one that undoes it."""
    import torch.nn.functional as functional

    def shrink(h: Tensor, options: Any) -> Tensor:
        at_block = tuple(options["block"]) == ("input", 2)
        return functional.interpolate(h, scale_factor=0.5, mode="bilinear") if at_block else h

    def grow(h: Tensor, skip: Tensor, options: Any) -> tuple[Tensor, Tensor]:
        return functional.interpolate(h, size=skip.shape[-2:], mode="bilinear"), skip

    for where in ("input_block_patch", "input_block_patch_after_skip"):
        patches = {"patches": {where: [shrink], "output_block_patch": [grow]}}
        out = forward.run(load(files[0], hint_for(forward.x)), **patches)
        assert out.isfinite().all()
        assert worst(out, forward.run(**patches)) > 0.01


def test_freeu_comes_after_the_control(forward: Forward, files: list[Path]) -> None:
    order = []

    def freeu(h: Tensor, skip: Tensor, options: Any) -> tuple[Tensor, Tensor]:
        order.append(h.clone())
        return h, skip

    patches = {"patches": {"output_block_patch": [freeu]}}
    forward.run(**patches)
    plain = order[0]
    forward.run(load(files[0], hint_for(forward.x), parts=(0.0, 0.0, 1.0), time_mix=0.0), **patches)
    assert worst(order[len(order) // 2], plain) > 0.01


def test_deep_shrink_before_the_skip_comes_after_the_control(forward: Forward, files: list[Path]) -> None:
    """Patches of the same name see what the base's first block gave with the control's part in it."""
    seen: list[Tensor] = []

    def shrink(h: Tensor, options: Any) -> Tensor:
        seen.append(h.clone())
        return h

    patches = {"patches": {"input_block_patch": [shrink]}}
    forward.run(**patches)
    plain, blocks = seen[0], len(seen)
    forward.run(load(files[0], hint_for(forward.x), parts=(1.0, 0.0, 0.0), time_mix=0.0), **patches)
    assert worst(seen[blocks], plain) > 0.01


def test_nothing_stays_in_the_options_or_in_the_model(forward: Forward, files: list[Path]) -> None:
    before = forward.run()
    mine: dict[str, Any] = {"patches": {"emb_patch": []}, "wrappers": {"diffusion_model": {"other": []}}}
    control = load(files[0], hint_for(forward.x))
    forward.run(control, **mine)
    assert mine == {"patches": {"emb_patch": []}, "wrappers": {"diffusion_model": {"other": []}}}
    assert torch.equal(forward.run(), before)


def test_a_host_that_skips_our_patch_points_is_an_error(forward: Forward, files: list[Path]) -> None:
    control = load(files[0], hint_for(forward.x))
    options = forward.options(control)

    class Cached(torch.nn.ModuleList):
        """input_blocks of which the last are skipped, as caching packs do."""

        def __iter__(self) -> Any:
            return iter(list(super().__iter__())[:5])

    blocks = forward.unet.input_blocks
    try:
        forward.unet.input_blocks = Cached(blocks)
        with pytest.raises(RuntimeError, match="DeepCache.*take that node out"):
            forward.unet(forward.x, forward.t, forward.context, forward.y, transformer_options=options)
    finally:
        forward.unet.input_blocks = blocks


def test_a_host_without_patch_points_is_an_error(
    forward: Forward, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = type(forward.unet)._forward

    def without(self: Any, x: Tensor, t: Any, context: Any, y: Any, control: Any, options: dict[str, Any]) -> Any:
        options["original_shape"] = list(x.shape)
        return real(self, x, t, context, y, control, {})

    monkeypatch.setattr(type(forward.unet), "_forward", without)
    with pytest.raises(RuntimeError, match="0 of 9 encoder"):
        forward.run(load(files[0], hint_for(forward.x)))


def test_a_step_that_another_wrapper_answers_from_its_cache_is_none(forward: Forward, files: list[Path]) -> None:
    options = forward.options(load(files[0], hint_for(forward.x)))
    options["wrappers"]["diffusion_model"]["cache"] = [lambda executor, x, *args, **kwargs: x]
    out = forward.unet(forward.x, forward.t, forward.context, forward.y, transformer_options=options)
    assert torch.equal(out, forward.x)
