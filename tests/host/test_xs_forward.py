"""ControlNet-XS on the host's UNet, one forward at a time, against the plain loop."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.models.controlnet_xs import Walk
from comfyui_controlnext.tests.fixtures.xs_fixtures import SD_LIKE, SDXL_LIKE, Forward, hint_for, make_file, shape_of
from torch import Tensor

pytestmark = pytest.mark.comfy

PARITY = 1e-5
"""Largest difference to the plain loop, in fp32, of outputs with a standard deviation of about 1."""

WIDTHS = {
    "27 and 22 groups": (22, 24, 24),
    "28 and 24 groups": (24, 32, 32),
    "4 groups": (4, 8, 16),
    "groups of 2 and 3": (40, 48, 96),  # the others have groups of one channel, which hide the time embedding
}


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.inference_mode():
        yield


def load(path: Path, hint: Tensor, strength: float = 1.0, **options: Any) -> Any:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

    control = load_controlnet_xs(path).control
    return control.with_options(**options).set_cond_hint(hint, strength, (0.0, 1.0))


def worst(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


@functools.cache
def forward_of(kind: str, **settings: Any) -> Forward:
    """Forward on a UNet that all tests of this file share, one per kind."""
    config, labels = {"12": (SD_LIKE, False), "9": (SDXL_LIKE, True)}[kind]
    return Forward.make(config, labels=labels, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("xs")


def file_of(folder: Path, forward: Forward, widths: tuple[int, ...], own_time: bool, **settings: Any) -> Path:
    path = folder / f"{len(forward.config['channel_mult'])}-{widths}-{own_time}-{settings}.safetensors"
    levels = (*widths, widths[-1])[: len(forward.config["channel_mult"])]
    return path if path.is_file() else make_file(path, shape_of(forward.config, levels, own_time), **settings)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("own_time", [False, True], ids=["base_time", "own_time"])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
@pytest.mark.parametrize("kind", ["12", "9"], ids=["12_blocks", "9_blocks_y"])
def test_a_forward_equals_the_plain_loop(
    kind: str, widths: tuple[int, ...], own_time: bool, scale: float, folder: Path
) -> None:
    forward = forward_of(kind)
    path, hint = file_of(folder, forward, widths, own_time), hint_for(forward.x)
    expected = forward.plain_loop(checkpoint.load(path), hint, scale=scale)
    assert worst(forward.run(load(path, hint, scale)), expected) < PARITY
    if scale:
        assert worst(expected, forward.plain_loop(None, hint)) > 0.1


@pytest.mark.parametrize("setting", [{"size": (18, 22)}, {"size": (9, 16)}, {"in_channels": 9}], ids=str)
def test_any_latent_size_and_inpaint_unets(setting: dict[str, Any], folder: Path) -> None:
    forward = forward_of("9", **setting)
    path, hint = file_of(folder, forward_of("9"), (40, 48, 96), True), hint_for(forward.x)
    expected = forward.plain_loop(checkpoint.load(path), hint)
    assert worst(forward.run(load(path, hint)), expected) < PARITY


def test_encoder_middle_and_decoder_have_strengths_of_their_own(folder: Path) -> None:
    forward, parts = forward_of("9"), (0.7, 0.0, 1.6)
    path, hint = file_of(folder, forward, (40, 48, 96), True), hint_for(forward.x)
    expected = forward.plain_loop(checkpoint.load(path), hint, scale=0.5, parts=parts)
    assert worst(forward.run(load(path, hint, 0.5, parts=parts)), expected) < PARITY
    twice = load(path, hint, 0.5, parts=(0.7, 0.0, 0.8)).with_options(parts=(1.0, 1.0, 2.0))
    assert torch.equal(
        forward.run(twice.set_cond_hint(hint, 0.5, (0.0, 1.0))), forward.run(load(path, hint, 0.5, parts=parts))
    )


def test_the_options_node_of_controlnet_xs_acts_before_and_after_the_other_one(folder: Path) -> None:
    """Strengths of the node act as the hidden widgets of ControlNeXtOptions, which older graphs use."""
    from comfyui_controlnext.nodes.apply import ControlNeXtOptions
    from comfyui_controlnext.nodes.xs_loader import ControlNetXSOptions

    forward, values = forward_of("9"), (0.7, 0.0, 1.6, 0.3)
    path, hint = file_of(folder, forward, (40, 48, 96), True), hint_for(forward.x)
    fresh = load(path, hint)
    made = (
        ControlNetXSOptions.execute(fresh, *values)[0],
        ControlNeXtOptions.execute(fresh, "auto", None, "", *values)[0],
        ControlNeXtOptions.execute(ControlNetXSOptions.execute(fresh, *values)[0], "auto")[0],
        ControlNetXSOptions.execute(ControlNeXtOptions.execute(fresh, "auto")[0], *values)[0],
    )
    expected = forward.run(load(path, hint, parts=values[:3], time_mix=values[3]))
    assert worst(expected, forward.run(fresh)) > 0.01
    for control in made:
        assert torch.equal(forward.run(control.set_cond_hint(hint, 1.0, (0.0, 1.0))), expected)


def test_a_fixed_time_mix_takes_the_place_of_the_strength(folder: Path) -> None:
    forward = forward_of("9")
    path, hint = file_of(folder, forward, (40, 48, 96), True), hint_for(forward.x)
    weights = checkpoint.load(path)
    fixed = forward.run(load(path, hint, 0.5, time_mix=1.0))
    assert worst(fixed, forward.plain_loop(weights, hint, scale=0.5, mix=1.0)) < PARITY
    assert worst(fixed, forward.plain_loop(weights, hint, scale=0.5)) > 100 * PARITY


def test_type_a_adds_nothing_in_the_encoder(folder: Path) -> None:
    forward = forward_of("9")
    path, hint = file_of(folder, forward, (40, 48, 96), True), hint_for(forward.x)
    weights = {n: t for n, t in checkpoint.load(path).items() if not n.startswith("enc_zero_convs_out")}
    kept = checkpoint.save(folder / "type_a.safetensors", weights, checkpoint.peek(path).metadata)
    assert worst(forward.run(load(kept, hint)), forward.plain_loop(weights, hint)) < PARITY


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Largest relative error of storing one number: 4.9e-4 and 3.9e-3."""


@HALVES
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
def test_weights_stored_in_half_precision_stay_close(widths: tuple[int, ...], dtype: torch.dtype, folder: Path) -> None:
    """Computed in fp32, as beside an fp32 base: of what the control adds 4.8e-4 to 6.2e-4 (fp16), 3.9e-3 to 5.2e-3.

    Every weight is off by up to one rounding; so is the sum of what they add, and twice that is allowed.
    """
    forward = forward_of("9")
    path, hint = file_of(folder, forward, widths, True), hint_for(forward.x)
    full, plain = forward.run(load(path, hint)), forward.run()
    stored = load(path, hint)
    stored.loaded.net.to(dtype)
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.features import CACHE

    CACHE.clear()  # of features with the weights as they are in the file
    relative = float((forward.run(stored) - full).norm() / (full - plain).norm())
    CACHE.clear()
    assert 0.1 * ROUNDING[dtype] < relative < 2 * ROUNDING[dtype]


@HALVES
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
def test_half_precision_stays_close(widths: tuple[int, ...], dtype: torch.dtype, folder: Path) -> None:
    """Weights and features in half precision: of what the base gets 1.0e-3 to 1.2e-3 (fp16), 0.9e-2 to 1.0e-2 (bf16).

    Roundings of features add up along the stream: two to three of them are seen, four are allowed.
    """
    forward = forward_of("9")
    path, hint = file_of(folder, forward, widths, True), hint_for(forward.x)
    net, half = load(path, hint).loaded.net, load(path, hint).loaded.net.to(dtype)
    outs = []
    for network, kind in ((half, dtype), (net, torch.float32)):
        walk = Walk(network, forward.x.to(kind), network.encode_hint(hint.to(kind)))
        emb, context = forward.unet.time_embed(torch.ones(2, 32)).to(kind), forward.context.to(kind)
        found = []
        for i, width in enumerate(part.base_ch for part in network.config.encoder):
            found.append(walk.encode(i, emb, context))
            side = walk.c.shape[-2:]
            features = torch.randn(2, width, *side, generator=torch.Generator().manual_seed(i))
            walk.take_base(i, features.to(kind))
        outs.append(torch.cat([tensor.float().flatten() for tensor in [*found, walk.middle(emb, context)]]))
    relative = float((outs[0] - outs[1]).norm() / outs[1].norm())
    assert 0.1 * ROUNDING[dtype] < relative < 4 * ROUNDING[dtype]


def test_narrow_streams_have_their_norms_in_fp32(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, real = forward_of("9"), torch.nn.functional.group_norm
    kinds: list[torch.dtype] = []

    def spy(h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kinds.append(h.dtype)
        return real(h, *args, **kwargs)

    for widths in ((4, 8, 16), (32, 32, 32)):
        net = load(file_of(folder, forward, widths, False), hint_for(forward.x)).loaded.net.half()
        monkeypatch.setattr(torch.nn.functional, "group_norm", spy)
        out = net.encoder[1].res.norm1(torch.randn(1, widths[0] + 32, 4, 4).half())
        monkeypatch.undo()
        assert out.dtype == torch.float16
    assert kinds == [torch.float32, torch.float16]
