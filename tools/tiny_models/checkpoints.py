"""Complete checkpoints for the host's loaders, a few megabytes each.

The UNets are random except for one path, made by `_lean_on_input`: the prediction is mostly the input itself, scaled to
a fixed std. A trained network does the same for noise, so that sampling stays bounded and ends with a picture, which
the random part (and any control) influences.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .layouts import LAYOUTS, WIDTH, UNetLayout, blocks, unet_shapes
from .storage import Pools, random_tensor, save
from .text_and_vae import clip_g, clip_l, clip_vision_h, fill, taesd

UNET_PREFIX = "model.diffusion_model."
INPUT_SHARE = 0.98  # share of the input in the prediction; the remaining noise stays as texture
RANDOM_SHARE = 0.15  # std of the random part of the prediction
QUERY_GAIN = 2.0  # sharper cross-attention; a flat one would average the prompt away
PASS_GAIN = 8.0  # ratio of the input to the random features of the last block
PASS_CHANNELS = 10  # one normalisation group of 320 / 32 channels: x0 -x0 x1 -x1 x2 -x2 x3 -x3 x0 -x0
SD15_LATENT_SCALE = 0.18215
SDXL_LATENT_SCALE = 0.13025


def make_sd15(path: Path, seed: int = 0) -> Path:
    """Make SD1.5 with CLIP-L and TAESD for CheckpointLoaderSimple (`.ckpt`)."""
    return _make_sd(path, seed, "sd15")


def make_sd15_inpaint(path: Path, seed: int = 0) -> Path:
    """Make SD1.5 as `make_sd15`, with 9 input channels (latent, mask, masked image)."""
    return _make_sd(path, seed, "sd15_inpaint")


def make_sd15_deep(path: Path, seed: int = 0) -> Path:
    """Make SD1.5 as `make_sd15`, with a third level and a middle block of 1280 channels."""
    return _make_sd(path, seed, "sd15_deep")


def make_sdxl(path: Path, seed: int = 0, clip: bool = True) -> Path:
    """Make SDXL (the host's Segmind-Vega) with CLIP-L, CLIP-G and TAESD for CheckpointLoaderSimple.

    clip: False leaves out the text encoders; CLIP-G has 695M parameters and takes seconds to load. True includes them.
    """
    return _make_sdxl(path, seed, "sdxl", clip)


def make_sdxl_deep(path: Path, seed: int = 0, clip: bool = False) -> Path:
    """Make SDXL as `make_sdxl` (the host's KOALA 700M), with a middle block of 1280 channels."""
    return _make_sdxl(path, seed, "sdxl_deep", clip)


def make_svd(path: Path, seed: int = 0, vision: bool = True) -> Path:
    """Make Stable Video Diffusion with CLIP-H vision and TAESD for ImageOnlyCheckpointLoader.

    vision: False leaves out the image encoder (632M parameters); True includes it.
    """
    return _make_svd(path, seed, "svd", vision)


def make_svd_deep(path: Path, seed: int = 0, vision: bool = False) -> Path:
    """Make SVD as `make_svd`, with a middle block of 1280 channels."""
    return _make_svd(path, seed, "svd_deep", vision)


def make_sd15_full_unet(path: Path, seed: int = 0) -> Path:
    """Make the full SD1.5 UNet (860M parameters) for UNETLoader (`.pt`)."""
    return save(path, unet_tensors("sd15_full", seed))


def unet_tensors(layout: str, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of the UNet of that layout, by LDM names without prefix."""
    return _unet(Pools(seed), LAYOUTS[layout], "", seed)


def _make_sd(path: Path, seed: int, layout: str) -> Path:
    pools = Pools(seed)
    tensors = _unet(pools, LAYOUTS[layout], UNET_PREFIX, seed)
    tensors |= clip_l(pools, "cond_stage_model.transformer.text_model.")
    return save(path, tensors | taesd(pools, "first_stage_model.", SD15_LATENT_SCALE))


def _make_sdxl(path: Path, seed: int, layout: str, clip: bool) -> Path:
    pools = Pools(seed)
    tensors = _unet(pools, LAYOUTS[layout], UNET_PREFIX, seed)
    if clip:
        tensors |= clip_l(pools, "conditioner.embedders.0.transformer.text_model.")
        tensors |= clip_g(pools, "conditioner.embedders.1.model.")
    return save(path, tensors | taesd(pools, "first_stage_model.", SDXL_LATENT_SCALE))


def _make_svd(path: Path, seed: int, layout: str, vision: bool) -> Path:
    pools = Pools(seed)
    tensors = _unet(pools, LAYOUTS[layout], UNET_PREFIX, seed)
    if vision:
        tensors |= clip_vision_h(pools, "conditioner.embedders.0.open_clip.model.visual.")
    return save(path, tensors | taesd(pools, "first_stage_model.", SD15_LATENT_SCALE))


def _unet(pools: Pools, layout: UNetLayout, prefix: str, seed: int) -> dict[str, Tensor]:
    shapes = unet_shapes(layout)
    tensors = fill(pools, shapes)
    for name, shape in shapes.items():
        if name.endswith("attn2.to_q.weight"):
            tensors[name] = pools.normal(name, shape, QUERY_GAIN * shape[1] ** -0.5)
    shares = (0.0, 1.0) if layout.temporal else (INPUT_SHARE, RANDOM_SHARE)  # SVD's own skip keeps it bounded
    tensors |= _lean_on_input(layout, *shares, seed)
    return {prefix + name: value for name, value in tensors.items()}


def _lean_on_input(layout: UNetLayout, share: float, random: float, seed: int) -> dict[str, Tensor]:
    """Weights through which the input reaches the output: prediction = share * x / std(x) + noise of std `random` that
    depends on all inputs.

    conv_in copies x and -x into its last PASS_CHANNELS channels, the skip connection of the last block amplifies them
    above all others, the last norm scales them to std 1, and silu(x) - silu(-x) = x.
    """
    last = list(blocks(layout))[-1]
    signs = torch.tensor([1.0, -1.0]).repeat(PASS_CHANNELS // 2)
    sources = torch.arange(PASS_CHANNELS) // 2 % 4
    first_pass = WIDTH - PASS_CHANNELS
    rows = torch.arange(first_pass, WIDTH)

    shape = (WIDTH, layout.in_channels, 3, 3)
    conv_in = random_tensor("conv_in", shape, (9 * layout.in_channels) ** -0.5, seed)
    conv_in[first_pass:] = 0
    conv_in[rows, sources, 1, 1] = signs

    skip = random_tensor("skip", (WIDTH, last.channels_in, 1, 1), last.channels_in**-0.5, seed)
    skip[first_pass:] = 0
    skip[rows, rows + last.channels_in - WIDTH] = PASS_GAIN

    out = random_tensor("out", (4, WIDTH, 3, 3), random * (0.36 * 9 * first_pass) ** -0.5, seed)
    out[:, first_pass:] = 0
    for channel in range(4):
        out[channel, first_pass + 2 * channel, 1, 1] = share
        out[channel, first_pass + 2 * channel + 1, 1, 1] = -share
    return {
        "input_blocks.0.0.weight": conv_in.half(),
        f"{last.ldm}.0.skip_connection.weight": skip.half(),
        "out.2.weight": out.half(),
    }
