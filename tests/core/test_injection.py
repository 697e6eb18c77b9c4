"""Injection of controls against the released formula, implemented a second time in double precision."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from comfyui_controlnext.controlnext_core.injection import NORMALIZATIONS, Term, fuse, gain_of, pool_to, prepare
from comfyui_controlnext.controlnext_core.specs import SPECS, Fusion, Gain, GainFormula, with_normalization
from comfyui_controlnext.tests.references import reference_controlnext as reference
from torch import Tensor

SIZES = {
    "same": ((17, 13), (17, 13)),
    "halved": ((16, 24), (8, 12)),
    "overlapping windows": ((63, 31), (32, 16)),
    "larger": ((8, 8), (9, 11)),
}


def randn(*shape: int, seed: int = 0, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std + mean


def features(rows: int, size: tuple[int, int] = (9, 7), channels: int = 8) -> Tensor:
    """Features whose rows differ in mean and scale, as those of the two halves and of the latents of a batch."""
    x = randn(rows, channels, *size, seed=1)
    row = torch.arange(rows).view(-1, 1, 1, 1)
    return x * (1 + row) + 0.3 * row - 0.7


def control(rows: int, size: tuple[int, int] = (9, 7), channels: int = 8, seed: int = 2) -> Tensor:
    return randn(rows, channels, *size, seed=seed, mean=-0.4, std=3.0)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm()) < tolerance


def term(c: Tensor, h: Tensor, fusion: Fusion, gains: tuple[float, ...] = (1.0,), mask: Tensor | None = None) -> Term:
    return Term(prepare(c, (h.shape[-2], h.shape[-1]), fusion), gains, fusion, mask)


@pytest.mark.parametrize("name", reference.VARIANTS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_variant_is_its_released_formula(name: str, sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    variant, fusion = reference.VARIANTS[name], SPECS[name].fusion
    x, c = features(2, sizes[1]), control(2, sizes[0])
    gain = reference.gain(variant, 0.8766)
    assert gain_of(fusion.gain, 0.8766) == pytest.approx(gain, abs=1e-12)
    expected = x.double() + gain * reference.added(c.double(), x.double(), variant.order, variant.eps)
    assert close(fuse(x, [term(c, x, fusion, (gain,))]), expected)


def test_the_order_of_pooling_and_normalising_matters() -> None:
    x, c = features(1, (32, 32)), control(1, (63, 63))
    pooled_first = fuse(x, [term(c, x, SPECS["sd15"].fusion)])
    pooled_last = fuse(x, [term(c, x, dataclasses.replace(SPECS["sd15"].fusion, pool_first=False))])
    assert not close(pooled_first, pooled_last, 0.05)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
def test_eps_is_added_to_the_standard_deviation_of_the_control(eps: float) -> None:
    fusion = dataclasses.replace(SPECS["sdxl"].fusion, eps=eps)
    x, c = features(1), control(1) * 1e-4
    added = fuse(x, [term(c, x, fusion)]).double() - x.double()
    assert close(added, reference.added(c.double(), x.double(), "norm, pool", eps), 1e-4)


def test_the_released_control_has_the_moments_of_the_features() -> None:
    x, c = features(3), control(3)
    added = (fuse(x, [term(c, x, SPECS["sdxl"].fusion)]) - x).double()
    for row in range(3):
        assert float(added[row].mean()) == pytest.approx(float(x[row].double().mean()), abs=1e-5)
        assert float(added[row].std()) == pytest.approx(float(x[row].double().std()), rel=1e-5)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "svd_v2"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_papers_equation_10_is_a_row_of_the_table(
    name: str, sizes: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    fusion = with_normalization(SPECS[name], "paper").fusion
    x, c = features(2, sizes[1]), control(2, sizes[0])
    pooled = torch.nn.functional.adaptive_avg_pool2d(c.double(), sizes[1])
    expected = x.double() + 0.35 * reference.paper_equation_10(pooled, x.double(), fusion.eps)
    assert close(fuse(x, [term(c, x, fusion, (0.35,))]), expected)
    assert not close(fuse(x, [term(c, x, SPECS[name].fusion, (0.35,))]), expected, 0.05)


def test_none_adds_the_control_as_it_is() -> None:
    fusion = with_normalization(SPECS["sdxl"], "none").fusion
    x, c = features(2), control(2)
    assert close(fuse(x, [term(c, x, fusion, (0.5,))]), x.double() + 0.5 * c.double())
    assert torch.equal(fuse(x, [term(torch.zeros_like(c), x, fusion)]), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_zero_gain_gives_the_features_bit_for_bit(dtype: torch.dtype, normalization: str) -> None:
    x, c = features(4).to(dtype), control(2).to(dtype)
    fusion = with_normalization(SPECS["sdxl"], normalization).fusion
    out = fuse(x, [term(c, x, fusion, (0.0, 0.0))])
    assert out.dtype == dtype and torch.equal(out, x)
    half = fuse(x, [term(c, x, fusion, (0.0, 1.0))])
    assert torch.equal(half[:2], x[:2]) and not torch.equal(half[2:], x[2:])


def test_chunks_get_their_own_gains_and_rows_their_own_hints() -> None:
    variant, fusion = reference.VARIANTS["svd_v1"], SPECS["svd_v1"].fusion
    x, c = features(6), control(3)
    out = fuse(x, [term(c, x, fusion, (0.65, 0.95))])
    each = reference.added(c.double().repeat(2, 1, 1, 1), x.double(), variant.order, variant.eps)
    gains = torch.tensor([0.65] * 3 + [0.95] * 3, dtype=torch.float64).view(-1, 1, 1, 1)
    assert close(out, x.double() + gains * each)


def test_one_hint_serves_all_latents() -> None:
    x, c = features(6), control(1)
    fusion = SPECS["sdxl"].fusion
    one = fuse(x, [term(c, x, fusion, (1.0, 0.5))])
    assert torch.equal(one, fuse(x, [term(c.repeat(3, 1, 1, 1), x, fusion, (1.0, 0.5))]))


def test_rows_do_not_see_each_other() -> None:
    x, c = features(4), control(2)
    fusion = SPECS["sd15"].fusion
    out = fuse(x, [term(c, x, fusion, (1.0, 1.0))])
    other = x.clone()
    other[3] *= 5
    assert torch.equal(fuse(other, [term(c, x, fusion, (1.0, 1.0))])[:3], out[:3])


@pytest.mark.parametrize("shape", [(1, 1, 9, 7), (1, 1, 72, 56), (2, 1, 3, 3), (1, 1, 1, 1)])
def test_ones_mask_is_unmasked_and_zero_mask_is_no_control(shape: tuple[int, ...]) -> None:
    x, c = features(4), control(2)
    for name in ("sd15", "sdxl", "svd_v1"):
        fusion = SPECS[name].fusion
        plain = fuse(x, [term(c, x, fusion, (0.3, 1.7))])
        assert torch.equal(fuse(x, [term(c, x, fusion, (0.3, 1.7), torch.ones(shape))]), plain)
        assert torch.equal(fuse(x, [term(c, x, fusion, (0.3, 1.7), torch.zeros(shape))]), x)


def test_a_mask_multiplies_what_is_added_and_leaves_the_statistics_alone() -> None:
    x, c = features(4), control(2)
    mask = torch.rand(2, 1, 9, 7, generator=torch.Generator().manual_seed(3))
    fusion, variant = SPECS["sdxl"].fusion, reference.VARIANTS["sdxl"]
    each = reference.added(c.double().repeat(2, 1, 1, 1), x.double(), variant.order, variant.eps)
    expected = x.double() + mask.double().repeat(2, 1, 1, 1) * each
    assert close(fuse(x, [term(c, x, fusion, (1.0, 1.0), mask)]), expected)


def test_a_mask_of_another_size_is_resized_by_area() -> None:
    x, c = features(1, (4, 4)), control(1, (4, 4))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :3] = 1  # the second column of 2x2 areas is half covered
    fusion = SPECS["sdxl"].fusion
    full = fuse(x, [term(c, x, fusion)]) - x
    weights = torch.tensor([1.0, 0.5, 0.0, 0.0])
    assert close(fuse(x, [term(c, x, fusion, mask=mask)]) - x, full * weights, 1e-5)


class OnMps:
    """Stand-in for a tensor on an Apple GPU, where torch only pools to sizes that divide the tensor's."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.shape, self.device = value, value.shape, torch.device("mps")

    def cpu(self) -> Tensor:
        return self.value


@pytest.mark.parametrize("size", [(9, 7), (3, 5)])
def test_on_an_apple_gpu_the_pool_is_taken_on_the_cpu(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    value = torch.rand(2, 3, 9, 7)
    moved: list[torch.device] = []
    monkeypatch.setattr(Tensor, "to", lambda self, device: moved.append(device) or self)
    found = pool_to(OnMps(value), size)  # type: ignore[arg-type]
    if size == (9, 7):
        assert isinstance(found, OnMps) and not moved
    else:
        assert torch.equal(found, torch.nn.functional.adaptive_avg_pool2d(value, size))
        assert moved == [torch.device("mps")]


def test_several_controls_are_measured_against_the_same_clean_features() -> None:
    x = features(2, (8, 8))
    expected, terms = x.double(), []
    for seed, (name, gain) in enumerate((("sd15", 0.35), ("svd_v2", 0.2), ("sdxl", 1.0))):
        variant, c = reference.VARIANTS[name], control(2, (16, 16), seed=seed)
        terms.append(term(c, x, SPECS[name].fusion, (gain,)))
        expected = expected + gain * reference.added(c.double(), x.double(), variant.order, variant.eps)
    out = fuse(x, terms)
    assert close(out, expected)
    assert torch.equal(out, fuse(x, list(terms)))  # the same order gives the same bits
    assert not close(fuse(fuse(fuse(x, terms[:1]), terms[1:2]), terms[2:]), expected, 1e-3)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1000.0])
def test_a_constant_control_is_finite_in_fp16(name: str, value: float) -> None:
    x = features(2, (8, 8)).half()
    for size in ((8, 8), (16, 16), (15, 15)):
        c = torch.full((1, 8, *size), value, dtype=torch.float16)
        assert bool(fuse(x, [term(c, x, SPECS[name].fusion)]).isfinite().all())


def test_a_constant_control_adds_the_mean_alone() -> None:
    x, c = features(2), torch.full((1, 8, 9, 7), 0.1)
    out = fuse(x, [term(c, x, SPECS["sdxl"].fusion, (2.0,))])
    assert close(out, x.double() + 2 * x.double().mean((1, 2, 3), keepdim=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
def test_half_precision_takes_its_statistics_in_fp32(dtype: torch.dtype, tolerance: float) -> None:
    x, c = (features(2, (32, 32), 64) + 8).to(dtype), control(2, (32, 32), 64).to(dtype)
    variant = reference.VARIANTS["sdxl"]
    added = fuse(x, [term(c, x, SPECS["sdxl"].fusion)])
    assert added.dtype == dtype
    expected = x.double() + reference.added(c.double(), x.double(), variant.order, variant.eps)
    assert close(added, expected, tolerance)


@pytest.mark.parametrize(
    ("gain", "scale", "expected"),
    [
        (Gain(), None, 1.0),
        (Gain(factor=0.35), None, 0.35),
        (Gain(factor=0.2), 0.9, 0.2),
        (Gain(formula=GainFormula.LEARNED), 0.8766, 0.8766),
        (Gain(formula=GainFormula.LEARNED, factor=0.5), -2.0, -1.0),
        (Gain(formula=GainFormula.SIGMOID, factor=1.3), 1.0, 1.3 * math.e / (1 + math.e)),
        (Gain(formula=GainFormula.SIGMOID, factor=1.3), 0.8766, 0.9180),
        (Gain(formula=GainFormula.SIGMOID, factor=1.3), 0.0, 0.65),
    ],
)
def test_gain_laws(gain: Gain, scale: float | None, expected: float) -> None:
    assert gain_of(gain, scale) == pytest.approx(expected, abs=1e-12 if expected != 0.9180 else 5e-5)


def test_nothing_is_changed_in_place() -> None:
    x, c, mask = features(4), control(2, (18, 14)), torch.rand(1, 1, 18, 14)
    kept = [t.clone() for t in (x, c, mask)]
    for name in ("sd15", "sdxl", "svd_v1"):
        made = term(c, x, SPECS[name].fusion, (1.0, 0.0), mask)
        prepared = made.control.clone()
        out = fuse(x, [made, made])
        out.mul_(0)  # what comes back is the caller's own
        assert torch.equal(made.control, prepared)
    assert all(torch.equal(now, then) for now, then in zip((x, c, mask), kept, strict=True))
    same = control(2)
    assert pool_to(same, (9, 7)) is same


@pytest.mark.parametrize("name", ["sd15", "sdxl", "svd_v1"])
def test_gradients_flow_through_control_and_features(name: str) -> None:
    variant, fusion = reference.VARIANTS[name], SPECS[name].fusion
    x, c = features(2, (8, 8)).requires_grad_(), control(2, (15, 15)).requires_grad_()
    weight = randn(2, 8, 8, 8, seed=5)
    (fuse(x, [term(c, x, fusion, (0.35,))]) * weight).sum().backward()
    x64, c64 = x.detach().double().requires_grad_(), c.detach().double().requires_grad_()
    expected = x64 + 0.35 * reference.added(c64, x64, variant.order, variant.eps)
    (expected * weight).sum().backward()
    assert x.grad is not None and c.grad is not None and x64.grad is not None and c64.grad is not None
    assert close(x.grad, x64.grad) and close(c.grad, c64.grad, 1e-4)
