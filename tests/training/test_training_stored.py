"""Frozen weights in half the bits: the same gradients in every bit, and no copy stored for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfyui_controlnext.benchmarks.bench_video_memory import Allocations
from comfyui_controlnext.controlnext_training.trainables import AddBase, train_differences
from comfyui_controlnext.tests.fixtures.lazy_layers import EITHER_WAY
from comfyui_controlnext.tests.fixtures.training_fixtures import CPU
from torch import Tensor, nn

pytestmark = [pytest.mark.comfy, EITHER_WAY]

LAYERS = {
    "linear": ("Linear", (24, 40), (3, 7, 24)),
    "a linear layer whose input is as large as its weight": ("Linear", (24, 24), (24, 24)),
    "conv": ("Conv2d", (8, 16, 3, 2, 1), (2, 8, 6, 6)),
    "a convolution whose input is as large as its weight": ("Conv2d", (4, 4, 3), (1, 4, 6, 6)),
    "a convolution over frames": ("Conv3d", (8, 8, (3, 1, 1)), (1, 8, 5, 4, 4)),
}


def layer_of(kind: str, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """Frozen layer with these values, and an input that requires a gradient."""
    from comfyui_controlnext.controlnext_training.base_model.frozen_layers import operations

    name, sizes, shape = LAYERS[kind]
    generator = torch.Generator().manual_seed(0)
    layer = getattr(operations, name)(*sizes)
    for parameter in layer.parameters():
        numbers = torch.randn(parameter.shape, generator=generator).half()
        parameter.data, parameter.requires_grad = numbers.to(dtype), False
    x = torch.randn(shape, generator=generator).requires_grad_(True)
    return layer, x * 1  # not a leaf: as features are


def gradient(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    out = layer(x)
    return out, torch.autograd.grad(out.square().sum(), x)[0]


@pytest.mark.parametrize("kind", LAYERS)
def test_a_weight_in_half_the_bits_gives_the_same_output_and_gradient(kind: str) -> None:
    narrow, wide = (gradient(*layer_of(kind, dtype)) for dtype in (torch.float16, torch.float32))
    assert torch.equal(narrow[0], wide[0]) and torch.equal(narrow[1], wide[1])


@pytest.mark.parametrize("kind", LAYERS)
def test_its_copy_is_not_kept_for_the_backward_pass(kind: str) -> None:
    layer, x = layer_of(kind, torch.float16)
    with Allocations([x, *layer.parameters()]) as made:
        out = layer(x)
    alive = sum(size for reference, size in made.live.values() if not reference.expired())
    assert alive == out.nbytes


def test_a_difference_is_added_to_its_base_once_in_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's layers look at their weight several times."""
    layer, x = layer_of("linear", torch.float16)
    net = nn.Sequential(layer)
    differences = train_differences(net, ["0.weight"], CPU)
    sums, add = [], AddBase.forward

    def counted(self: AddBase, difference: Tensor) -> Tensor:
        sums.append(difference.shape)
        return add(self, difference)

    monkeypatch.setattr(AddBase, "forward", counted)
    net(x).sum().backward()
    assert len(sums) == 1
    found = differences.parameters["0.weight"].grad
    assert found is not None and torch.allclose(found, x.detach().sum(dim=(0, 1)).expand(40, 24), atol=1e-4)
