"""Text encoders, the SVD image encoder and a small autoencoder, with the names of published checkpoints.

The encoders have their full shape (the host's detection leaves no choice) and share storage. The autoencoder is a TAESD
with computed weights: it averages 8x8 pixels into a linear mix of their colours and decodes them again, so that latents
show the picture and pictures show the latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layouts import Shapes, conv, linear, norm
from .storage import Pools

BIAS_STD = 0.05
VAE_WIDTH = 64
ENCODER_GAIN = 0.5  # holds the residual stream of 32 layers near the initial embeddings
COLOR_GAIN = 3.5  # a colour, whose std is about 0.3 in [0, 1], becomes a latent with std about 1


def fill(pools: Pools, shapes: Shapes, gain: float = 1.0) -> dict[str, Tensor]:
    """Random weights scaled by fan-in, small random biases, norms with scale 1."""
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("bias"):
            tensors[name] = pools.normal(name, shape, BIAS_STD)
        elif len(shape) < 2:
            tensors[name] = pools.constant(1.0 if name.endswith("weight") else 0.0, shape)
        else:
            fan_in = float(torch.Size(shape[1:]).numel())
            tensors[name] = pools.normal(name, shape, gain * fan_in**-0.5)
    return tensors


def clip_l(pools: Pools, prefix: str) -> dict[str, Tensor]:
    """Tensors of CLIP-L in the names of transformers: 12 layers, 768 wide, 123M parameters."""
    width, shapes = 768, Shapes()
    for layer in range(12):
        name = f"{prefix}encoder.layers.{layer}"
        shapes |= norm(f"{name}.layer_norm1", width) | norm(f"{name}.layer_norm2", width)
        for end in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{name}.self_attn.{end}", width, width)
        shapes |= linear(f"{name}.mlp.fc1", width, 4 * width) | linear(f"{name}.mlp.fc2", 4 * width, width)
    tensors = fill(pools, shapes | norm(f"{prefix}final_layer_norm", width), ENCODER_GAIN)
    for part, rows in (("token", 49408), ("position", 77)):
        name = f"{prefix}embeddings.{part}_embedding.weight"
        tensors[name] = pools.normal(name, (rows, width), 1.0 if part == "token" else 0.25)
    return tensors


def clip_g(pools: Pools, prefix: str) -> dict[str, Tensor]:
    """Text half of CLIP-G in the names of open_clip: 32 layers, 1280 wide, 695M parameters."""
    width = 1280
    tensors = fill(pools, _open_clip_layers(prefix, width, 32) | norm(f"{prefix}ln_final", width), ENCODER_GAIN)
    for name, shape, std in (
        (f"{prefix}token_embedding.weight", (49408, width), 1.0),
        (f"{prefix}positional_embedding", (77, width), 0.25),
        (f"{prefix}text_projection", (width, width), width**-0.5),
    ):
        tensors[name] = pools.normal(name, shape, std)
    return tensors


def clip_vision_h(pools: Pools, prefix: str) -> dict[str, Tensor]:
    """Image half of CLIP-H in the names of open_clip: 32 layers, 1280 wide, 632M parameters."""
    width = 1280
    shapes = _open_clip_layers(prefix, width, 32) | conv(f"{prefix}conv1", 3, width, 14, 14, bias=False)
    tensors = fill(pools, shapes | norm(f"{prefix}ln_pre", width) | norm(f"{prefix}ln_post", width), ENCODER_GAIN)
    tensors[f"{prefix}class_embedding"] = pools.constant(0.5, (width,))
    for name, shape, std in (
        (f"{prefix}positional_embedding", (257, width), 0.25),
        (f"{prefix}proj", (width, 1024), width**-0.5),
    ):
        tensors[name] = pools.normal(name, shape, std)
    return tensors


def _open_clip_layers(prefix: str, width: int, layers: int) -> Shapes:
    shapes = Shapes()
    for layer in range(layers):
        name = f"{prefix}transformer.resblocks.{layer}"
        shapes |= norm(f"{name}.ln_1", width) | norm(f"{name}.ln_2", width)
        shapes[f"{name}.attn.in_proj_weight"] = (3 * width, width)
        shapes[f"{name}.attn.in_proj_bias"] = (3 * width,)
        shapes |= linear(f"{name}.attn.out_proj", width, width)
        shapes |= linear(f"{name}.mlp.c_fc", width, 4 * width)
        shapes |= linear(f"{name}.mlp.c_proj", 4 * width, width)
    return shapes


def taesd(pools: Pools, prefix: str, vae_scale: float, vae_shift: float = 0.0, channels: int = 4) -> dict[str, Tensor]:
    """Tensors of the 2.4M-parameter TAESD as a colour averager; vae_scale and vae_shift bring raw latents to a std of
    about 1.

    A latent of mean colour rgb (3, in 0..1) is COLOR_GAIN * mix @ (rgb - 0.5); decoding uses the pseudo-inverse and
    smooths. Values above and below grey are in channels 0-2 and 3-5, because every layer ends in a ReLU.
    """
    mix = torch.cat([*[torch.eye(3)] * (channels // 3), torch.full((1, 3), 1 / 3)]) * COLOR_GAIN  # (channels, 3)
    parts = torch.cat([torch.eye(3), -torch.eye(3)])  # (6, 3)
    encoder, decoder = f"{prefix}taesd_encoder", f"{prefix}taesd_decoder"
    tensors = {f"{prefix}vae_scale": torch.tensor(vae_scale), f"{prefix}vae_shift": torch.tensor(vae_shift)}
    for index in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13):
        tensors |= _passing_block(pools, f"{encoder}.{index}")
    for index in (3, 4, 5, 8, 9, 10, 13, 14, 15, 18):
        tensors |= _passing_block(pools, f"{decoder}.{index}")
    mean = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.25, 0.25], [0.0, 0.25, 0.25]])  # of 2x2 pixels, stride 2
    smooth = torch.outer(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.25, 0.5, 0.25]))
    for index in (2, 6, 10):
        tensors |= _mixing_conv(f"{encoder}.{index}", torch.eye(6), mean, (VAE_WIDTH, VAE_WIDTH))
    for index in (7, 12, 17):
        tensors |= _mixing_conv(f"{decoder}.{index}", torch.eye(6), smooth, (VAE_WIDTH, VAE_WIDTH))
    centre = torch.zeros(3, 3)
    centre[1, 1] = 1
    tensors |= _mixing_conv(f"{encoder}.0", parts, centre, (VAE_WIDTH, 3), bias=parts @ torch.full((3,), -0.5))
    tensors |= _mixing_conv(f"{encoder}.14", mix @ parts.T, centre, (channels, VAE_WIDTH), bias=torch.zeros(channels))
    unmix = parts @ torch.linalg.pinv(mix)
    tensors |= _mixing_conv(f"{decoder}.1", unmix, centre, (VAE_WIDTH, channels), bias=torch.zeros(6))
    tensors |= _mixing_conv(f"{decoder}.19", parts.T, centre, (3, VAE_WIDTH), bias=torch.full((3,), 0.5))
    return tensors


def _passing_block(pools: Pools, name: str) -> dict[str, Tensor]:
    """Residual block that adds nothing."""
    shapes = Shapes()
    for index in (0, 2, 4):
        shapes |= conv(f"{name}.conv.{index}", VAE_WIDTH, VAE_WIDTH)
    return {key: pools.constant(0.0, shape) for key, shape in shapes.items()}


def _mixing_conv(
    name: str, mix: Tensor, kernel: Tensor, shape: tuple[int, int], bias: Tensor | None = None
) -> dict[str, Tensor]:
    """Convolution 3x3 of `shape` (out, in) that mixes its first channels by `mix` and smooths by `kernel`."""
    weight = torch.zeros(*shape, 3, 3)
    weight[: mix.shape[0], : mix.shape[1]] = mix[:, :, None, None] * kernel
    tensors = {f"{name}.weight": weight.half()}
    if bias is not None:
        tensors[f"{name}.bias"] = torch.zeros(shape[0]).half()
        tensors[f"{name}.bias"][: len(bias)] = bias
    return tensors
