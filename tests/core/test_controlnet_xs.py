"""Network of ControlNet-XS without a host, against a second implementation of its parts."""

from __future__ import annotations

import pytest
import torch
from comfyui_controlnext.controlnext_core import xs_specs
from comfyui_controlnext.controlnext_core.xs_key_maps import OFFICIAL, from_ours
from comfyui_controlnext.models.controlnet_xs import ControlNetXS, Walk
from comfyui_controlnext.tests.fixtures.xs_fixtures import SD_LIKE, SDXL_LIKE, hint_for, randomise, shape_of
from comfyui_controlnext.tests.references import reference_xs as reference
from torch import Tensor

PARITY = 1e-5
HEADS = 2
WIDTHS = {"12": (22, 24, 48, 96), "9": (40, 48, 96)}


def network(kind: str, own_time: bool = False, rule: str = "official") -> tuple[ControlNetXS, xs_specs.XSShape]:
    shape = shape_of({"12": SD_LIKE, "9": SDXL_LIKE}[kind], WIDTHS[kind], own_time)
    heads = xs_specs.heads_of(shape, (HEADS,), "test")
    return ControlNetXS(xs_specs.build_config(shape, heads, xs_specs.NORM_RULES[rule])), shape


def base_features(net: ControlNetXS, side: int = 16) -> list[Tensor]:
    """Features such as those of a base after each of its encoder blocks."""
    features = []
    for i, part in enumerate(net.config.encoder):
        side = side // 2 if part.kind == "down" else side
        features.append(torch.randn(2, part.base_ch, side, side, generator=torch.Generator().manual_seed(i)))
    return features


def walk(net: ControlNetXS) -> list[Tensor]:
    """All corrections of the base, in order, with random features."""
    g = torch.Generator().manual_seed(9)
    x, emb = torch.randn(2, 9, 16, 16, generator=g), torch.randn(2, net.config.time_dim, generator=g)
    context = torch.randn(2, 5, net.config.context_dim, generator=g)
    steps = Walk(net, x, net.encode_hint(hint_for(x)))
    given = []
    for i, h in enumerate(base_features(net)):
        given.append(steps.encode(i, emb, context))
        steps.take_base(i, h)
    given.append(steps.middle(emb, context))
    return [*given, *(steps.decode(j) for j in range(len(net.config.decoder)))]


def reference_walk(net: ControlNetXS, shape: xs_specs.XSShape) -> list[Tensor]:
    names = from_ours(net.state_dict(), shape.layout, OFFICIAL)
    control = reference.Network({names[n]: t for n, t in net.state_dict().items()}, heads=lambda inner: HEADS)
    g = torch.Generator().manual_seed(9)
    x, emb = torch.randn(2, 9, 16, 16, generator=g), torch.randn(2, net.config.time_dim, generator=g)
    context = torch.randn(2, 5, net.config.context_dim, generator=g)
    c, given, kept = x[:, :4], [], []
    for i, h in enumerate(base_features(net)):
        c = control.block(f"control_model.input_blocks.{i}", c, emb, context)
        c = c + control.hint(hint_for(x)) if i == 0 else c
        given.append(control.conv(f"enc_zero_convs_out.{i}.0", c))
        kept.append(c)
        c = torch.cat([c, control.conv(f"enc_zero_convs_in.{i}.0", h)], dim=1)
    given.append(control.conv("middle_block_out.0", control.block("control_model.middle_block", c, emb, context)))
    return [*given, *(control.conv(f"dec_zero_convs_out.{j}.0", kept.pop()) for j in range(len(kept)))]


@pytest.mark.parametrize("kind", WIDTHS)
@torch.no_grad()
def test_the_walk_gives_the_base_what_the_plain_blocks_give(kind: str) -> None:
    net, shape = network(kind)
    randomise(net)
    for found, expected in zip(walk(net), reference_walk(net, shape), strict=True):
        assert float((found - expected).abs().max()) < PARITY * max(1.0, float(expected.abs().max()))


@torch.no_grad()
def test_zero_init_starts_as_the_base_model() -> None:
    """Corrections are exact zeros with zero-initialised convolutions, for any picture."""
    net, _ = network("9", own_time=True)
    assert all(not tensor.any() for tensor in walk(net))
    assert not net.encode_hint(torch.rand(1, 3, 64, 64)).any()
    assert not any(part.res.conv2.weight.any() for part in net.encoder if part.kind == "res")


@torch.no_grad()
def test_own_time_is_an_mlp_on_cosines_and_sines() -> None:
    net, shape = network("9", own_time=True)
    randomise(net)
    names = from_ours(net.state_dict(), shape.layout, OFFICIAL)
    control = reference.Network({names[n]: t for n, t in net.state_dict().items()}, heads=lambda inner: 1)
    t = torch.tensor([3.0, 999.0])
    expected = control.mlp("control_model.time_embed", reference.sinusoid(t, shape.time_in))
    assert float((net.embed_time(t, torch.float32) - expected).abs().max()) < PARITY


def test_any_attention_may_be_handed_in() -> None:
    calls = []

    def zero(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        calls.append(heads)
        return torch.zeros_like(q)

    shape = shape_of(SDXL_LIKE, WIDTHS["9"])
    heads = xs_specs.heads_of(shape, (1, 2, 4), "test")
    net = ControlNetXS(xs_specs.build_config(shape, heads, xs_specs.NORM_RULES["official"]), attention=zero)
    with torch.no_grad():
        walk(net)
    depths = [1, 1, 2, 2, 2]  # two blocks of level 1, two of level 2, the middle
    assert calls == [h for h, depth in zip((2, 2, 4, 4, 4), depths, strict=True) for _ in range(2 * depth)]


@pytest.mark.parametrize("size", [(18, 22), (9, 7)])
@torch.no_grad()
def test_hints_become_latents_of_any_size(size: tuple[int, int]) -> None:
    net, _ = network("9")
    hint = net.encode_hint(torch.rand(1, 3, 8 * size[0], 8 * size[1]))
    assert hint.shape == (1, WIDTHS["9"][0], *size)


def test_diffusers_norm_rule_differs_where_it_should() -> None:
    """Norms of the 20m size for SDXL after a first one with 28 groups have at most 28 groups."""
    shape = xs_specs.design(
        {**SDXL_LIKE, "model_channels": 320, "channel_mult": (1, 2, 4), "context_dim": 2048}, widths=(16, 32, 64)
    )
    heads = xs_specs.heads_of(shape, (), "test")
    groups = {
        name: [part.groups for part in xs_specs.build_config(shape, heads, rule).encoder if part.kind == "res"]
        for name, rule in xs_specs.NORM_RULES.items()
    }
    assert groups["official"] == [(28, 16), (28, 16), (28, 32), (32, 32), (32, 32), (32, 32)]
    assert groups["diffusers"] == [(28, 16), (28, 16), (28, 16), (28, 16), (32, 32), (32, 32)]
    eps = [xs_specs.build_config(shape, heads, rule).middle[0].eps for rule in xs_specs.NORM_RULES.values()]
    assert eps == [1e-5, 1e-6]
