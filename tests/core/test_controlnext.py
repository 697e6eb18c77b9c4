"""Encoders against the published layer tables: names, sizes, and every value of the forward pass."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from comfyui_controlnext.controlnext_core.specs import SPECS, config_of
from comfyui_controlnext.models.controlnext import ControlNeXt
from comfyui_controlnext.models.layers import timestep_embedding
from comfyui_controlnext.tests.references import reference_controlnext as reference
from torch import Tensor, nn

OF_BUILD = {variant.build: name for name, variant in reference.VARIANTS.items()} | {"TOKENS-32": "wan_5b"}
FAST = ("SD15-L", "SDXL-1", "SDXL-2", "SVD-v2")
"""Builds that cover each kind of stem and middle once."""

NETWORKS = tuple(build for build in reference.BUILDS if build not in ("SD15-T", "SVD-v2-T"))  # these two are SDXL-2
HALF_SIZE = {"SD15-L": (16, 16), "SDXL-1": (32, 32), "SDXL-2": (16, 24), "SVD-v2": (24, 24)}
"""Half precision is slow on a CPU: hints just large enough for every layer, with two columns left at the end.

Torch 2.13 computes bf16 convolutions of stride 2 to a single column wrongly on processors with AMX."""


random_weights = functools.cache(reference.random_weights)


def make(build: str, dtype: torch.dtype = torch.float32) -> tuple[ControlNeXt, dict[str, Tensor]]:
    """Network under test and its weights."""
    weights = {name: tensor.to(dtype) for name, tensor in random_weights(build).items()}
    net = ControlNeXt(config_of(SPECS[OF_BUILD[build]]), dtype=dtype, device="meta")
    net.load_state_dict(weights, strict=True, assign=True)
    return net.requires_grad_(False), weights


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def hints(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("build", reference.BUILDS)
def test_names_shapes_and_parameter_count_are_the_published_ones(build: str) -> None:
    net = ControlNeXt(config_of(SPECS[OF_BUILD[build]]), device="meta")
    assert {name: tuple(t.shape) for name, t in net.state_dict().items()} == reference.shapes(build)
    assert sum(p.numel() for p in net.parameters()) == reference.BUILDS[build].parameters
    assert len(net.state_dict()) == reference.BUILDS[build].keys
    assert not list(net.buffers())


@pytest.mark.parametrize(
    ("height", "width", "padded", "pooled", "unpadded"),
    [
        (512, 512, (64, 64), (16, 16), (63, 63)),
        (512, 768, (64, 96), (16, 24), (63, 95)),
        (520, 520, (65, 65), (16, 16), (64, 64)),
        (576, 1024, (72, 128), (18, 32), (71, 127)),
        (1024, 1024, (128, 128), (32, 32), (127, 127)),
        (1032, 1000, (129, 125), (32, 31), (128, 124)),
        (456, 680, (57, 85), (14, 21), (56, 84)),
        (510, 510, (64, 64), (16, 16), (63, 63)),
    ],
)
def test_output_sizes_are_the_published_ones(
    height: int, width: int, padded: tuple[int, int], pooled: tuple[int, int], unpadded: tuple[int, int]
) -> None:
    half = (-(-padded[0] // 2), -(-padded[1] // 2))
    expected = {"SVD-v1": pooled, "SDXL-1": pooled, "SVD-v2": unpadded, "TOKENS-32": half}
    for build, facts in reference.BUILDS.items():
        net = ControlNeXt(config_of(SPECS[OF_BUILD[build]]), device="meta")
        out = net(torch.empty(1, 3, height, width, device="meta"), torch.empty(1, device="meta"))
        assert tuple(out.shape) == (1, facts.out, *expected.get(build, padded)), build


@pytest.mark.parametrize("build", NETWORKS)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 64), (3, 32, 48), (1, 40, 40), (2, 35, 33)])
def test_forward_is_the_layer_table(build: str, batch: int, height: int, width: int) -> None:
    net, weights = make(build)
    hint = hints(batch, 3, height, width)
    for timestep in (torch.tensor([-1.5537]), torch.tensor([941.0, 0.25, 421.0])[:batch]):
        ours, theirs = net(hint, timestep), reference.encode(build, weights, hint, timestep)
        assert ours.shape == theirs.shape
        assert difference(ours, theirs) < 1e-5


def test_forward_is_the_layer_table_at_a_published_odd_size() -> None:
    net, weights = make("SDXL-1")
    hint = hints(1, 3, 520, 520)
    assert (
        difference(net(hint, torch.tensor([7.0])), reference.encode("SDXL-1", weights, hint, torch.tensor([7.0])))
        < 1e-5
    )


@pytest.mark.long
@pytest.mark.parametrize("build", NETWORKS)
@pytest.mark.parametrize(("height", "width"), [(512, 512), (512, 768), (520, 520)])
def test_forward_is_the_layer_table_at_published_sizes(build: str, height: int, width: int) -> None:
    net, weights = make(build)
    hint, timestep = hints(1, 3, height, width), torch.tensor([621.0])
    assert difference(net(hint, timestep), reference.encode(build, weights, hint, timestep)) < 1e-5


@pytest.mark.parametrize("build", NETWORKS)
def test_forward_in_fp64_differs_by_the_fp32_time_embedding_alone(build: str) -> None:
    net, weights = make(build, torch.float64)
    hint = hints(2, 3, 32, 40, dtype=torch.float64)
    exact = torch.tensor([0.0])  # cos 0 and sin 0 are exact in fp32 too
    assert difference(net(hint, exact), reference.encode(build, weights, hint, exact)) < 1e-12


@pytest.mark.parametrize("build", FAST)
def test_one_timestep_for_all_rows_is_the_same_timestep_for_each(build: str) -> None:
    net, _ = make(build)
    hint = hints(3, 3, 32, 32)
    one, each = net(hint, torch.tensor([300.0])), net(hint, torch.tensor([300.0] * 3))
    assert difference(one, each) < 1e-5
    assert difference(one, net(hint, torch.tensor([301.0] * 3))) > 1e-4


@pytest.mark.parametrize("build", FAST)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [None, 0.0, 1.0])
def test_half_precision_is_finite_and_near_fp32(build: str, dtype: torch.dtype, value: float | None) -> None:
    net, weights = make(build, dtype)
    hint = hints(1, 3, *HALF_SIZE[build]) if value is None else torch.full((1, 3, *HALF_SIZE[build]), value)
    out = net(hint.to(dtype), torch.tensor([941.0]))
    assert out.dtype == dtype and bool(out.isfinite().all())
    exact = reference.encode(build, {k: v.float() for k, v in weights.items()}, hint, torch.tensor([941.0]))
    if value is None:
        assert difference(out.float(), exact) < (0.01 if dtype is torch.float16 else 0.06)


def test_time_embedding_is_cosines_first_with_the_published_rates() -> None:
    t = torch.tensor([0.0, 1.0, 999.0, -1.5537])
    ours = timestep_embedding(t, 128)
    assert ours.dtype == torch.float32 and ours.shape == (4, 128)
    for row, value in enumerate(t.tolist()):
        for i in (0, 1, 31, 63):
            angle = value * 10000 ** (-i / 64)
            assert float(ours[row, i]) == pytest.approx(math.cos(angle), abs=2e-4)
            assert float(ours[row, 64 + i]) == pytest.approx(math.sin(angle), abs=2e-4)


def test_layers_come_from_the_operations_that_are_given() -> None:
    made: list[str] = []

    class Operations:
        def __getattr__(self, name: str) -> object:
            made.append(name)
            return getattr(nn, name)

    ControlNeXt(config_of(SPECS["sd15"]), device="meta", operations=Operations())
    weighted = [m for m in ControlNeXt(config_of(SPECS["sd15"]), device="meta").modules() if list(m.parameters(False))]
    assert made.count("weights_of") == 1, "how their weights are read, where the namespace says it"
    assert sorted(set(made)) == sorted({"weights_of"} | {type(module).__name__ for module in weighted})
    assert len(made) == 1 + len(weighted)


def test_scale_stays_out_of_the_forward_pass() -> None:
    net, _ = make("SD15-L")
    hint = hints(1, 3, 32, 32)
    before = net(hint, torch.tensor([5.0]))
    net.scale = nn.Parameter(torch.tensor(17.0))
    assert torch.equal(net(hint, torch.tensor([5.0])), before)
