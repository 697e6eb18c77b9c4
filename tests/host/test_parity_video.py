"""Parity of the video variants: the host's SVD with our control against diffusers' SVD with the control hooked in.

The reference shares nothing with the code under test but the names of the UNet's weights: diffusers' temporal UNet,
hooks that add the control as the released pipelines do, the encoders of the reference, and the timestep and the gains
written out here. Ours is the path of a sampling run: a file, detection, the loader, pre_run, get_control, apply_model.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures import video_fixtures as video
from comfyui_controlnext.tests.references import reference_controlnext as reference
from torch import Tensor, nn

log = logging.getLogger(__name__)
pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore:::diffusers")]

TOLERANCE = 1e-4  # fp32
SIZES = {"64x64": (8, 8), "96x128": (12, 16)}
FRAMES = (4, 9)
HALVES = {4: [1, 0], 9: [0, 1]}  # 0 positive, 1 negative, in the order of the rows
SIGMA = 3.7
TIMESTEP = 0.25 * math.log(SIGMA)
POSITIVE = {"svd_v1": 1.3 / (1 + math.exp(-video.LEARNED_SCALE)), "svd_v2": 0.2, "svd_v2_padded": 0.2}
NEGATIVE = {"svd_v1": 0.65, "svd_v2": 0.0, "svd_v2_padded": 0.0}


@functools.cache
def inputs(size: tuple[int, int], frames: int) -> dict[str, Tensor]:
    """Inputs of both UNets; the frames of one half, then those of the other."""
    generator = torch.Generator().manual_seed(frames)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": noise(2 * frames, 4, *size) * SIGMA,
        # statistics are those of each frame: no two frames have the same
        "image": noise(2 * frames, 4, *size) * torch.linspace(0.2, 3, 2 * frames).view(-1, 1, 1, 1),
        "context": noise(2, 1, video.CONTEXT),
        "ids": torch.tensor([[5.0, 127.0, 0.02], [5.0, 127.0, 0.02]]),
        "hint": torch.rand(frames, 3, 8 * size[0], 8 * size[1], generator=generator),
    }


@functools.cache
def encoded(name: str, size: tuple[int, int], frames: int) -> Tensor:
    """Encodings of every frame's hint by the reference."""
    build, hint = reference.VARIANTS[name].build, inputs(size, frames)["hint"]
    return reference.encode(build, video.encoder_weights(name), hint, torch.tensor([TIMESTEP]))


def hooked(unet: nn.Module, name: str, size: tuple[int, int], frames: int, strength: float) -> Any:
    """Add the control as in the released pipelines; returns the handle of the hook."""
    variant = reference.VARIANTS[name]
    c = encoded(name, size, frames)
    gains = {0: POSITIVE[name], 1: NEGATIVE[name]}
    rows = torch.tensor([gains[half] for half in HALVES[frames] for _ in range(frames)]).view(-1, 1, 1, 1)

    def with_control(h: Tensor) -> Tensor:
        return h + strength * rows * reference.added(c.repeat(2, 1, 1, 1), h, variant.order, variant.eps)

    if variant.site == "before middle":
        return unet.mid_block.register_forward_pre_hook(
            lambda block, args, kwargs: (args, kwargs | {"hidden_states": with_control(kwargs["hidden_states"])}),
            with_kwargs=True,
        )
    assert variant.site == "after down 0"  # the skips, out[1], stay as they are
    return unet.down_blocks[0].register_forward_hook(lambda block, args, out: (with_control(out[0]), out[1]))


def theirs(size: tuple[int, int], frames: int, name: str | None = None, strength: float = 1.0) -> Tensor:
    """Prediction of diffusers' UNet, (2 * frames, 4, h, w)."""
    given, unet = inputs(size, frames), video.base().diffusers
    scaled = torch.cat([given["x"] / math.sqrt(SIGMA**2 + 1), given["image"]], 1).unflatten(0, (2, frames))
    handle = hooked(unet, name, size, frames, strength) if name else None
    try:
        return unet(scaled, torch.tensor(TIMESTEP), given["context"], given["ids"]).sample.flatten(0, 1)
    finally:
        if handle is not None:
            handle.remove()


def ours(size: tuple[int, int], frames: int, control: Any = None) -> Tensor:
    """Prediction of the host's model, with a control as in a sampling run."""
    given, host = inputs(size, frames), video.base().host
    sigma = torch.full((2 * frames,), SIGMA)
    embedded = video.base().diffusers.add_time_proj(given["ids"].flatten()).reshape(2, -1)
    options: dict[str, Any] = {"cond_or_uncond": HALVES[frames], "sigmas": sigma}
    if control is not None:
        control.pre_run(host, host.model_sampling.percent_to_sigma)
        assert control.get_control(given["x"], sigma, {}, 2, options) is None
    denoised = host.apply_model(
        given["x"],
        sigma,
        c_concat=given["image"],
        c_crossattn=given["context"].repeat_interleave(frames, 0),
        y=embedded.repeat_interleave(frames, 0),
        num_video_frames=frames,
        transformer_options=options,
    )
    if control is not None:
        control.cleanup()
    return (given["x"] / (SIGMA**2 + 1) - denoised) * math.sqrt(SIGMA**2 + 1) / SIGMA


@functools.cache
def bare_both(size: tuple[int, int], frames: int) -> tuple[Tensor, Tensor]:
    return ours(size, frames), theirs(size, frames)


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_bare_unets_agree(size: tuple[int, int], frames: int) -> None:
    assert relative(*bare_both(size, frames)) < TOLERANCE / 10


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", video.VARIANTS)
def test_the_whole_unet_agrees_with_the_released_method(name: str, size: tuple[int, int], frames: int) -> None:
    bare, bare_theirs = bare_both(size, frames)
    for strength in (1.0, 0.4):
        control = video.control(name).copy().set_cond_hint(inputs(size, frames)["hint"], strength, (0.0, 1.0))
        found, expected = ours(size, frames, control), theirs(size, frames, name, strength)
        worst = relative(found, expected)
        log.info("%s: relative difference %.1e", name, worst)
        assert worst < TOLERANCE
        effect = (expected - bare_theirs).double()
        assert float(effect.norm() / expected.double().norm()) > 0.01, "the control does too little to be measured"
        assert float((found - bare - effect).norm() / effect.norm()) < 10 * TOLERANCE
        for place, half in enumerate(HALVES[frames]):
            rows = slice(place * frames, (place + 1) * frames)
            if NEGATIVE[name] == 0 and half == 1:
                assert torch.equal(found[rows], bare[rows])
            else:
                assert relative(bare[rows], expected[rows]) > 0.003


def test_padded_and_unpadded_differ_visibly() -> None:
    """Or the three rows of the tests above would be two."""
    size, frames = SIZES["64x64"], 4
    assert relative(theirs(size, frames, "svd_v2"), theirs(size, frames, "svd_v2_padded")) > 1e-3
