"""Whole-UNet parity: the host's UNet with our control against a diffusers UNet with the control hooked in.

The reference shares nothing with the code under test: diffusers' UNet with the same weights (under the host's own
name map), forward hooks that add the control as the released code does, and the encoders of the reference. Ours is
the path of a sampling run: a file, detection, the loader, pre_run, get_control, the model's apply_model.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.references import reference_controlnext as reference
from torch import Tensor, nn

log = logging.getLogger(__name__)
pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore:::diffusers")]

VARIANTS = ("sd15", "sd15_legacy", "sdxl", "sdxl_july", "sdxl_june")
STRENGTHS = (0.0, 0.35, 1.0, 2.0)
# latents of hints with 512x512, 512x768 and 520x520 pixels, and a quarter of them (an odd side stays odd)
PUBLISHED_SIZES = {"512x512": (64, 64), "512x768": (64, 96), "520x520": (65, 65)}
SIZES = {"quarter of 512x512": (16, 16), "quarter of 512x768": (16, 24), "quarter of 520x520": (17, 17)}
TOLERANCE = 1e-4  # fp32; measured: at most 5e-6
HALVES = {1: [1, 0], 3: [0]}  # one latent, both halves of the guidance at once; three latents, one half at a time
WIDTH = 32  # channels of the first level, a tenth of the published
TIMESTEP, LEARNED_SCALE = 421, 0.8
MIDDLE_WIDTH = 4 * WIDTH


@dataclass(frozen=True)
class BothUNets:
    """Base model as two UNets with the same weights."""

    host: Any
    """BaseModel of the host."""
    diffusers: nn.Module
    context_dim: int
    pooled: bool


@dataclass(frozen=True)
class Inputs:
    """Inputs of both UNets; all latents of the first half of the guidance, then of the second."""

    x: Tensor
    sigma: Tensor
    context: Tensor
    text_embeds: Tensor
    time_ids: Tensor
    hint: Tensor


HOST_SD15 = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
}
HOST_SDXL = {
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 1, 2],
    "transformer_depth_output": [0, 0, 1, 1, 2, 2],
    "transformer_depth_middle": 2,
    "context_dim": 2048,
    "use_linear_in_transformer": True,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
}
HOST_COMMON = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": WIDTH,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "dtype": torch.float32,
}
DIFFUSERS_SD15 = {
    "block_out_channels": (WIDTH, 2 * WIDTH, MIDDLE_WIDTH, MIDDLE_WIDTH),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,  # which diffusers takes as the number of heads
}
DIFFUSERS_SDXL = {
    "block_out_channels": (WIDTH, 2 * WIDTH, MIDDLE_WIDTH),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (1, 1, 2),  # heads of 64 channels, as in the host
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@functools.cache
def base(family: str) -> BothUNets:
    """Both UNets of a family: diffusers' random weights, every bias and norm changed, copied into the host's."""
    import comfy.model_base
    import comfy.supported_models
    import comfy.utils
    from diffusers import UNet2DConditionModel

    xl = family == "SDXL"
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**(DIFFUSERS_SDXL if xl else DIFFUSERS_SD15)).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.add_(0.03 * torch.randn_like(parameter))
    config = (comfy.supported_models.SDXL if xl else comfy.supported_models.SD15)(
        HOST_COMMON | (HOST_SDXL if xl else HOST_SD15)
    )
    host = (comfy.model_base.SDXL if xl else comfy.model_base.BaseModel)(config)
    weights = theirs.state_dict()
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    mapped = {names[name]: tensor for name, tensor in weights.items()}
    host.diffusion_model.load_state_dict(mapped, strict=True)
    return BothUNets(host.eval().requires_grad_(False), theirs, config.unet_config["context_dim"], xl)


@functools.cache
def inputs(family: str, size: tuple[int, int], batch: int) -> Inputs:
    generator = torch.Generator().manual_seed(7)
    rows = len(HALVES[batch]) * batch
    sigma = base(family).host.model_sampling.sigmas[TIMESTEP].float().repeat(rows)
    x = torch.randn(rows, 4, *size, generator=generator) * sigma.view(-1, 1, 1, 1)
    return Inputs(
        x,
        sigma,
        torch.randn(rows, 11, base(family).context_dim, generator=generator),
        torch.randn(rows, 1280, generator=generator),
        torch.tensor([[1024.0, 768.0, 0.0, 8.0, 1024.0, 768.0]]).repeat(rows, 1),
        torch.rand(batch, 3, 8 * size[0], 8 * size[1], generator=generator),
    )


def out_channels(name: str) -> int:
    return MIDDLE_WIDTH if reference.VARIANTS[name].site == "after middle" else WIDTH


@functools.cache
def encoder_weights(name: str) -> dict[str, Tensor]:
    """Weights of a published encoder at full size except for the last convolution, which has the tiny UNet's width."""
    return reference.random_weights(
        reference.VARIANTS[name].build, seed=11, out=out_channels(name), scale=LEARNED_SCALE
    )


@functools.cache
def encoded(name: str, size: tuple[int, int], batch: int) -> Tensor:
    variant = reference.VARIANTS[name]
    hint = inputs(variant.family, size, batch).hint
    return reference.encode(variant.build, encoder_weights(name), hint, torch.tensor([float(TIMESTEP)]))


def add_hook(unet: nn.Module, name: str, size: tuple[int, int], batch: int, strength: float) -> Any:
    """Add the control at the released code's site and by its formula; returns the handle of the hook."""
    variant = reference.VARIANTS[name]
    gain = strength * reference.gain(variant, LEARNED_SCALE)
    c = encoded(name, size, batch).repeat(len(HALVES[batch]), 1, 1, 1)  # the same hints for both halves

    def controlled(h: Tensor) -> Tensor:
        return h + gain * reference.added(c, h, variant.order, variant.eps)

    if variant.site == "after middle":
        return unet.mid_block.register_forward_hook(lambda block, args, out: controlled(out))
    first = unet.down_blocks[0]
    if variant.site == "after down 0":  # the skips, out[1], stay as they are
        return first.register_forward_hook(lambda block, args, out: (controlled(out[0]), out[1]))
    assert variant.site == "after conv_in"  # the first skip is conv_in's own output
    return first.register_forward_pre_hook(
        lambda block, args, kwargs: (args, kwargs | {"hidden_states": controlled(kwargs["hidden_states"])}),
        with_kwargs=True,
    )


def theirs(family: str, size: tuple[int, int], batch: int, hook: Callable[[nn.Module], Any] | None = None) -> Tensor:
    """Noise predicted by diffusers' UNet."""
    both, given = base(family), inputs(family, size, batch)
    more = {"added_cond_kwargs": {"text_embeds": given.text_embeds, "time_ids": given.time_ids}} if both.pooled else {}
    scaled = given.x / (given.sigma.view(-1, 1, 1, 1) ** 2 + 1).sqrt()
    handle = hook(both.diffusers) if hook else None
    try:
        return both.diffusers(scaled, TIMESTEP, given.context, **more).sample
    finally:
        if handle is not None:
            handle.remove()


def ours(family: str, size: tuple[int, int], batch: int, control: Any = None) -> Tensor:
    """Noise predicted by the host's model, with a control as in a sampling run."""
    both, given = base(family), inputs(family, size, batch)
    more = {}
    if both.pooled:
        ids = both.diffusers.add_time_proj(given.time_ids.flatten()).reshape(len(given.x), -1)
        more = {"y": torch.cat([given.text_embeds, ids], dim=1)}
    options: dict[str, Any] = {"cond_or_uncond": HALVES[batch], "sigmas": given.sigma}
    stock = None
    if control is not None:
        control.pre_run(both.host, both.host.model_sampling.percent_to_sigma)
        stock = control.get_control(given.x, given.sigma, {}, len(HALVES[batch]), options)
    denoised = both.host.apply_model(
        given.x, given.sigma, c_crossattn=given.context, control=stock, transformer_options=options, **more
    )
    if control is not None:
        control.cleanup()
    return (given.x - denoised) / given.sigma.view(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Control of a variant, from a file."""
    from comfyui_controlnext.controlnext_core import checkpoint
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_control
    from comfyui_controlnext.controlnext_core.detection import read_control_file
    from comfyui_controlnext.controlnext_core.specs import Family

    folder = tmp_path_factory.mktemp("controls")

    @functools.cache
    def load(name: str) -> Any:
        path = checkpoint.save(folder / f"{name}.safetensors", encoder_weights(name), {})
        control = load_control(read_control_file(checkpoint.peek(path)), Family(reference.VARIANTS[name].family))
        assert control.net.spec.name == name
        return control

    return load


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@functools.cache
def bare_both(family: str, size: tuple[int, int], batch: int) -> tuple[Tensor, Tensor]:
    return ours(family, size, batch), theirs(family, size, batch)


def compare(name: str, size: tuple[int, int], batch: int, strength: float, control: Any) -> float:
    """Assert parity; returns the relative difference of the whole output."""
    family = reference.VARIANTS[name].family
    hint = inputs(family, size, batch).hint
    with_hint = control.copy().set_cond_hint(hint, strength, (0.0, 1.0))
    found = ours(family, size, batch, with_hint)
    bare, bare_theirs = bare_both(family, size, batch)
    if strength == 0:
        assert torch.equal(found, bare)
        return relative(found, bare_theirs)
    expected = theirs(family, size, batch, lambda unet: add_hook(unet, name, size, batch, strength))
    effect = (expected - bare_theirs).double()
    assert float(effect.norm() / expected.double().norm()) > 0.01, "the control does too little to be measured"
    assert float((found - bare - effect).norm() / effect.norm()) < 10 * TOLERANCE
    return relative(found, expected)


@pytest.mark.parametrize("family", ["SD1.5", "SDXL"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_bare_unets_agree(family: str, batch: int, size: tuple[int, int]) -> None:
    assert relative(*bare_both(family, size, batch)) < TOLERANCE / 10


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_whole_unet_agrees_with_the_released_method(
    name: str, batch: int, size: tuple[int, int], loaded: Callable[[str], Any]
) -> None:
    worst = max(compare(name, size, batch, strength, loaded(name)) for strength in STRENGTHS)
    log.info("%s: relative difference %.1e", name, worst)
    assert worst < TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize("size", PUBLISHED_SIZES.values(), ids=PUBLISHED_SIZES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_whole_unet_agrees_at_published_sizes(
    name: str, batch: int, size: tuple[int, int], loaded: Callable[[str], Any]
) -> None:
    worst = max(compare(name, size, batch, strength, loaded(name)) for strength in STRENGTHS)
    log.info("%s: relative difference %.1e", name, worst)
    assert worst < TOLERANCE
