"""Merged convolutions against the two in sequence, at every size, with a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comfyui_controlnext.controlnext_core.specs import SPECS, config_of
from comfyui_controlnext.models import halving
from comfyui_controlnext.models.controlnext import ControlNeXt
from comfyui_controlnext.tests.core.test_controlnext import FAST, OF_BUILD, difference, hints, make
from comfyui_controlnext.tests.references import reference_controlnext as reference
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

SIZES = ((8, 8), (9, 8), (8, 13), (7, 7), (3, 3), (4, 3), (2, 9), (1, 1))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def convolutions(size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Weight and bias of the first convolution, 5 -> 4 channels, and of the downsampling, 4 -> 3."""
    return (drawn(4, 5, size, size), drawn(4)), (drawn(3, 4, 3, 3), drawn(3))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_is_both_convolutions(size: int, biased: bool) -> None:
    torch.manual_seed(17)
    first, (weight, bias) = convolutions(size)
    second = (weight, bias if biased else None)
    for cells in SIZES:
        h = drawn(2, 5, *cells)
        expected = F.conv2d(F.conv2d(h, *first, padding=size // 2), *second, stride=2, padding=1)
        found = halving.merge(first, second, h)(h)
        assert found.shape == expected.shape
        assert difference(found, expected) < 1e-6, cells  # the product's weights are formed in fp32


@pytest.mark.parametrize("build", FAST)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 64), (2, 35, 49)])
def test_an_encoder_with_products_is_the_layer_table(
    build: str, batch: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halving, "CELLS_PER_CHANNEL", 0)
    net, weights = make(build)
    hint, time = hints(batch, 3, height, width), torch.tensor([941.0, 0.25])[:batch]
    begun = net.begin(hint)
    assert all(stage is not None for stage in begun.stages)
    assert difference(net.finish(begun, time), reference.encode(build, weights, hint, time)) < 1e-5


def test_gradients_are_those_of_both_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Tensor]] = []
    for least in (0, 10**9):
        monkeypatch.setattr(halving, "CELLS_PER_CHANNEL", least)
        net, _ = make("SDXL-2")
        net.requires_grad_(True)
        net(hints(1, 3, 36, 31), torch.tensor([500.0])).square().sum().backward()
        found.append({name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None})
    with_products, without = found
    assert with_products.keys() == without.keys() == dict(net.named_parameters()).keys()
    largest = max(float(gradient.norm()) for gradient in without.values())
    for name, gradient in without.items():
        assert float((with_products[name] - gradient).norm()) < 1e-5 * largest, name


def multiply_adds(run: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        run()
    return flops.get_total_flops() // 2


def test_products_are_formed_only_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    net, time = ControlNeXt(config_of(SPECS["sd3"]), device="meta"), torch.zeros(1, device="meta")

    def counted(side: int) -> tuple[int, int]:
        """Both parts, once per hint and for each timestep."""
        hint = torch.zeros(1, 3, side, side, device="meta")
        begun = net.begin(hint)
        return multiply_adds(lambda: net.begin(hint)), multiply_adds(lambda: net.narrow(begun, time))

    formed = {
        side: [s is not None for s in net.begin(torch.zeros(1, 3, side, side, device="meta")).stages]
        for side in (128, 256, 512)
    }
    assert formed == {128: [False, False], 256: [True, False], 512: [True, True]}
    with_products = {side: counted(side) for side in (256, 512, 1024)}
    monkeypatch.setattr(halving, "CELLS_PER_CHANNEL", 10**9)
    without = {side: counted(side) for side in with_products}
    assert all(sum(with_products[side]) < sum(without[side]) for side in without)
    (once, each), (once_before, each_before) = ([count / 1e9 for count in c[1024]] for c in (with_products, without))
    assert (once, each) == pytest.approx((79.4, 99.0), abs=0.5)  # docs/performance.md, without the last convolution
    assert (once_before, each_before) == pytest.approx((68.1, 137.4), abs=0.5)


def test_a_build_keeps_its_halves_where_a_stage_has_products() -> None:
    net = ControlNeXt(config_of(SPECS[OF_BUILD["SDXL-2"]]), device="meta")
    begun = net.begin(torch.zeros(1, 3, 1024, 1024, device="meta"))
    assert begun.shortcut.shape == (1, 128, 256, 256)
    assert begun.first_half.shape == (1, 128, 512, 512)


@pytest.mark.comfy
def test_host_layers_give_the_weights_that_their_forward_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.host_layers import WholeLayers

    monkeypatch.setattr(halving, "CELLS_PER_CHANNEL", 0)
    plain, weights = make("SDXL-2")
    half = {name: tensor.half() for name, tensor in weights.items()}
    plain.load_state_dict(half)
    hosted = ControlNeXt(plain.config, dtype=torch.float16, device="meta", operations=WholeLayers)
    hosted.load_state_dict(half, assign=True)
    hint, time = hints(1, 3, 32, 48), torch.tensor([500.0])
    assert torch.equal(hosted.requires_grad_(False)(hint, time), plain(hint, time))
