"""Small files of real transformers that the host's own loaders take: full shapes as overlapping windows, few blocks.

The host's detection fixes what they may not shrink (`Small.config` has what it would find); depth is all that is less,
and the text, which is as wide as that of CLIP-L where a family lets it be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from comfyui_controlnext.tools.tiny_models.storage import Pools, save
from comfyui_controlnext.tools.tiny_models.text_and_vae import clip_l, taesd
from torch import Tensor

CLIP_L = 768
"""Width of its text and of its pooled vector."""
LATENT_CHANNELS = 16

_FLUX: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "context_in_dim": CLIP_L,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 1,
    "depth_single_blocks": 0,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
}
_LUMINA: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "cap_feat_dim": CLIP_L,
    "n_layers": 1,
    "qk_norm": True,
}


@dataclass(frozen=True)
class Small:
    """Contents of one small file, and the text that its model takes."""

    network: str
    """Module and class of the host."""
    config: dict[str, Any]
    width: int
    """Width of the picture's tokens."""
    text_encoder: str | None = "stable_diffusion"
    """The type under which the host's loader makes CLIP-L fit; None: it cannot."""
    later: dict[str, Any] = field(default_factory=dict)
    """Keys that hosts after the pinned one want as well."""
    gigabytes: float = 0.1
    """Memory on a CPU, where the host widens the numbers to fp32."""


SMALL: dict[str, Small] = {
    "sd3": Small(
        "comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",
        {
            "in_channels": 16,
            "patch_size": 2,
            "out_channels": 16,
            "depth": 2,
            "input_size": None,
            "adm_in_channels": 2048,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 4096, "out_features": 128},
            },
            "num_patches": 1024,
            "pos_embed_max_size": 32,
            "qk_norm": "rms",
            "pos_embed_scaling_factor": None,
            "x_block_self_attn_layers": [0],
        },
        width=128,
        text_encoder="sd3",
    ),
    "flux": Small(
        "comfy.ldm.flux.model.Flux",
        _FLUX | {"vec_in_dim": 768, "guidance_embed": True},
        width=3072,
        later={"txt_ids_dims": []},
        gigabytes=1.6,
    ),
    "chroma": Small(
        "comfy.ldm.chroma.model.Chroma",
        _FLUX
        | {"in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5},
        width=3072,
        later={"txt_ids_dims": [], "vec_in_dim": None},
        gigabytes=2.1,
    ),
    "qwen_image": Small(
        "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",
        {"num_layers": 1},
        width=3072,
        text_encoder=None,
        gigabytes=1.6,
    ),
    "lumina2": Small(
        "comfy.ldm.lumina.model.NextDiT",
        _LUMINA | {"dim": 2304, "n_heads": 24, "n_kv_heads": 8, "axes_dims": [32, 32, 32], "ffn_dim_multiplier": 4.0},
        width=2304,
        gigabytes=1.7,
    ),
    "z_image": Small(
        "comfy.ldm.lumina.model.NextDiT",
        _LUMINA
        | {
            "dim": 3840,
            "n_heads": 30,
            "n_kv_heads": 30,
            "axes_dims": [32, 48, 48],
            "ffn_dim_multiplier": 8 / 3,
            "z_image_modulation": True,
            "pad_tokens_multiple": 32,
        },
        width=3840,
        gigabytes=3.6,
    ),
    "wan": Small(
        "comfy.ldm.wan.model.WanModel",
        {"model_type": "t2v", "dim": 128, "num_heads": 1, "ffn_dim": 128, "num_layers": 2, "in_dim": 16, "out_dim": 16},
        width=128,
        text_encoder=None,
    ),
    "wan_5b": Small(
        "comfy.ldm.wan.model.WanModel",
        {"model_type": "t2v", "dim": 128, "num_heads": 1, "ffn_dim": 128, "num_layers": 2, "in_dim": 48, "out_dim": 48},
        width=128,
        text_encoder=None,
    ),
}


def shapes_of(network: str, config: dict[str, Any]) -> dict[str, torch.Size]:
    """Names and shapes of a network of the host, which is never given any memory."""
    import importlib

    import comfy.ops

    module, _, name = network.rpartition(".")
    build = getattr(importlib.import_module(module), name)
    made = build(**config, device="meta", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    return {key: tensor.shape for key, tensor in made.state_dict().items()}


def make_small(path: Path, family: str, pinned: bool, seed: int = 0) -> Path:
    """The file of a family for the stock Load Diffusion Model node; `.pt` alone keeps windows as windows."""
    row, pools = SMALL[family], Pools(seed)
    shapes = shapes_of(row.network, row.config if pinned else row.config | row.later)
    return save(path, {name: _filled(pools, name, tuple(shape)) for name, shape in shapes.items()})


def _filled(pools: Pools, name: str, shape: tuple[int, ...]) -> Tensor:
    if len(shape) > 2 and shape[0] == 1:  # positions
        return pools.normal(name, shape[1:], 1.0)[None]
    if len(shape) > 1:
        return pools.normal(name, shape, math.prod(shape[1:]) ** -0.5)
    return pools.constant(0.0 if name.endswith("bias") else 1.0, shape)


def make_text_encoder(path: Path, seed: int = 0) -> Path:
    """CLIP-L for the stock Load CLIP node, half a gigabyte on a CPU."""
    return save(path, clip_l(Pools(seed), "text_model."))


def make_vae(path: Path, family: str) -> Path:
    """An autoencoder of 16 channels for the stock Load VAE node, of the kind that decodes the family's latents."""
    return save(path, _wan_vae() if family in ("qwen_image", "wan") else _taesd())


def _taesd() -> dict[str, Tensor]:
    """The tiny models' TAESD with more channels, which stay zero."""
    tensors = {name: tensor.contiguous() for name, tensor in taesd(Pools(0), "", 1.0).items()}
    for name, dim in (
        ("taesd_encoder.14.weight", 0),
        ("taesd_encoder.14.bias", 0),
        ("taesd_decoder.1.weight", 1),
    ):
        shape = list(tensors[name].shape)
        shape[dim] = LATENT_CHANNELS - shape[dim]
        tensors[name] = torch.cat([tensors[name], tensors[name].new_zeros(shape)], dim)
    return tensors


def _wan_vae(width: int = 8) -> dict[str, Tensor]:
    """The host's autoencoder of Wan and Qwen-Image, twelve times narrower, with random weights."""
    from comfy.ldm.wan.vae import WanVAE

    sizes = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": []}
    with torch.device("meta"):
        made = WanVAE(dim=width, z_dim=LATENT_CHANNELS, temperal_downsample=[False, True, True], dropout=0.0, **sizes)
    pools = Pools(0)
    return {n: _filled(pools, n, tuple(t.shape)).clone() for n, t in made.state_dict().items()}
