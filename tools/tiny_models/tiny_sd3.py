"""Small SD3 in one file for the host's Load Checkpoint: two joint blocks, only CLIP-L, and a TAESD."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .layouts import Shapes, linear
from .storage import Pools, random_tensor, save
from .text_and_vae import clip_l, taesd

DEPTH = 2
WIDTH = 64 * DEPTH
CONTEXT, POOLED, TIME, CHANNELS = 4096, 2048, 256, 16
POSITIONS = 32
"""Number of tokens along each side of the table of positions."""
LATENT_SCALE, LATENT_SHIFT = 1.5305, 0.0609


def sd3_shapes() -> Shapes:
    """Names and shapes of the network, as published."""
    shapes = Shapes({"pos_embed": (1, POSITIONS**2, WIDTH), "x_embedder.proj.weight": (WIDTH, CHANNELS, 2, 2)})
    shapes["x_embedder.proj.bias"] = (WIDTH,)
    shapes |= linear("context_embedder", CONTEXT, WIDTH)
    for name, width in (("t_embedder", TIME), ("y_embedder", POOLED)):
        shapes |= linear(f"{name}.mlp.0", width, WIDTH) | linear(f"{name}.mlp.2", WIDTH, WIDTH)
    for block in range(DEPTH):
        for stream in ("context_block", "x_block"):
            shapes |= _stream(f"joint_blocks.{block}.{stream}", stream == "x_block" or block < DEPTH - 1)
    shapes |= linear("final_layer.linear", WIDTH, 4 * CHANNELS)
    return shapes | linear("final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH)


def _stream(name: str, whole: bool) -> Shapes:
    """Shapes of one stream of a block; the text of the last block has only keys and values."""
    shapes = linear(f"{name}.attn.qkv", WIDTH, 3 * WIDTH)
    shapes |= {f"{name}.attn.ln_{part}.weight": (64,) for part in "qk"}
    shapes |= linear(f"{name}.adaLN_modulation.1", WIDTH, (6 if whole else 2) * WIDTH)
    if not whole:
        return shapes
    shapes |= linear(f"{name}.attn.proj", WIDTH, WIDTH)
    return shapes | linear(f"{name}.mlp.fc1", WIDTH, 4 * WIDTH) | linear(f"{name}.mlp.fc2", 4 * WIDTH, WIDTH)


def sd3_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Network with random weights, dense and in fp16."""
    return {name: _filled(name, shape, seed).half() for name, shape in sd3_shapes().items()}


def _filled(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    fan_in = shape[-1] if name == "pos_embed" else torch.Size(shape[1:]).numel()
    return random_tensor(name, shape, float(fan_in) ** -0.5, seed)


def make_sd3(path: Path, seed: int = 0) -> Path:
    """Make SD3 for CheckpointLoaderSimple (`.ckpt`)."""
    pools = Pools(seed)
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in sd3_tensors(seed).items()}
    tensors |= clip_l(pools, "text_encoders.clip_l.transformer.text_model.")
    return save(path, tensors | taesd(pools, "first_stage_model.", LATENT_SCALE, LATENT_SHIFT, CHANNELS))
