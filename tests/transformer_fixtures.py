"""Narrow diffusion transformers of the host, one per family: its own classes in its own BaseModel, 128 wide, 2 blocks.

Detection by the host fixes what a file of a family may not shrink (`tools.tiny_models.tiny_sd3`); built by hand
they are small enough for every test, and of the same kind. Everything runs on the CPU in fp32.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

WIDTH, BLOCKS = 128, 2
TEXT, POOLED = 48, 40
"""Widths of the text and of the pooled vector, where a family lets them be any."""
LATENT_CHANNELS = 16
VACE_CHANNELS = 96
"""Channels of VACE: a latent of what is left alone, one of what changes, and a mask of 64."""

_AXES = [16, 56, 56]
_FLUX: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": POOLED,
    "context_in_dim": TEXT,
    "hidden_size": WIDTH,
    "mlp_ratio": 2.0,
    "num_heads": 1,
    "depth": BLOCKS,
    "depth_single_blocks": BLOCKS,
    "axes_dim": _AXES,
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
}
_CHROMA = _FLUX | {"in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": WIDTH, "hidden_dim": 64}
_LUMINA: dict[str, Any] = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": WIDTH,
    "cap_feat_dim": TEXT,
    "n_layers": BLOCKS,
    "qk_norm": True,
    "n_heads": 2,
    "n_kv_heads": 1,
    "multiple_of": 32,
    "axes_dims": [32, 16, 16],
    "axes_lens": [300, 512, 512],
    "ffn_dim_multiplier": 1.0,
}
_Z_IMAGE: dict[str, Any] = {
    "dim": 2 * WIDTH,
    "n_heads": 4,
    "n_kv_heads": 4,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}


@dataclass(frozen=True)
class Narrow:
    """One family's narrow model: how to build it and what it is conditioned on."""

    supported: str
    """Class in the host's `supported_models`."""
    config: dict[str, Any]
    later: dict[str, Any] = field(default_factory=dict)
    """Settings that hosts after the pinned one want as well."""
    width: int = WIDTH
    text: int = TEXT
    pooled: int | None = None
    frames: bool = False
    """The latent has a dimension of frames."""
    channels: int = LATENT_CHANNELS
    pixels: int = 8
    """Along one side of a latent cell."""
    references: bool = False
    """The pinned host takes latents of reference pictures."""


_WAN: dict[str, Any] = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "in_dim": 16,
    "out_dim": 16,
    "dim": WIDTH,
    "ffn_dim": 128,
    "num_heads": 1,
    "num_layers": BLOCKS,
    "patch_size": (1, 2, 2),
    "freq_dim": 64,
    "text_dim": TEXT,
}

NARROW: dict[str, Narrow] = {
    "sd3": Narrow(
        "SD3",
        {
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "depth": BLOCKS,
            "input_size": None,
            "adm_in_channels": POOLED,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": TEXT, "out_features": WIDTH},
            },
            "num_patches": 1024,
            "pos_embed_max_size": 32,
            "qk_norm": "rms",
            "pos_embed_scaling_factor": None,
            "x_block_self_attn_layers": [0],
        },
        pooled=POOLED,
    ),
    "flux": Narrow(
        "Flux",
        _FLUX | {"image_model": "flux", "guidance_embed": True},
        later={"txt_ids_dims": []},
        pooled=POOLED,
        references=True,
    ),
    "chroma": Narrow(
        "Chroma",
        {k: v for k, v in _CHROMA.items() if k != "vec_in_dim"} | {"image_model": "chroma", "n_layers": 1},
        later={"txt_ids_dims": [], "vec_in_dim": None},
    ),
    "qwen_image": Narrow(
        "QwenImage",
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "num_layers": BLOCKS,
            "num_attention_heads": 1,
            "joint_attention_dim": TEXT,
        },
        frames=True,
        references=True,
    ),
    "lumina2": Narrow("Lumina2", _LUMINA),
    "z_image": Narrow(
        "ZImage",
        _LUMINA | _Z_IMAGE,
        width=2 * WIDTH,  # its modulation is 256 wide whatever the model is
    ),
    "wan": Narrow("WAN21_T2V", _WAN, frames=True),
    "wan_wide": Narrow("WAN21_T2V", _WAN | {"dim": 2 * WIDTH, "num_heads": 2}, width=2 * WIDTH, frames=True),
    # text-to-video with a reference frame, as the Fun control models have it
    "wan_reference": Narrow("WAN21_T2V", _WAN | {"in_dim_ref_conv": 16}, frames=True),
    "wan_i2v": Narrow("WAN21_I2V", _WAN | {"model_type": "i2v", "in_dim": 36}, frames=True),
    "wan_vace": Narrow(
        "WAN21_Vace", _WAN | {"model_type": "vace", "vace_layers": 1, "vace_in_dim": VACE_CHANNELS}, frames=True
    ),
    "wan_5b": Narrow("WAN22_T2V", _WAN | {"in_dim": 48, "out_dim": 48}, frames=True, channels=48, pixels=16),
}


def filled(name: str, shape: torch.Size, seed: int = 0) -> Tensor:
    """Random numbers for a parameter, of its seed and name alone: matrices keep the size of what goes through them."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    numbers = torch.randn(shape, generator=generator)
    if len(shape) < 2:
        return 0.05 * numbers + (0 if name.endswith("bias") else 1)
    return numbers * shape[1:].numel() ** -0.5


@functools.cache
def narrow_model(family: str, dtype: torch.dtype = torch.float32, changes: tuple[tuple[str, Any], ...] = ()) -> Any:
    """The host's BaseModel, weights stored in `dtype`, arithmetic in fp32; changes: of the family's configuration."""
    import comfy.supported_models
    import comfyui_version
    from comfyui_controlnext.tests.conftest import HOST_VERSION

    row = NARROW[family]
    config = row.config | dict(changes)
    if comfyui_version.__version__ != HOST_VERSION:
        config |= row.later
    settings = getattr(comfy.supported_models, row.supported)(config)
    settings.set_inference_dtype(dtype, torch.float32 if dtype != torch.float32 else None)
    model = settings.get_model({}, "", None)
    network = model.diffusion_model.eval().requires_grad_(False)
    for name, parameter in [*network.named_parameters(), *network.named_buffers()]:
        if parameter.is_floating_point() and not parameter.numel() == 0:
            parameter.copy_(filled(name, parameter.shape))
    return model


@dataclass(frozen=True)
class Inputs:
    """Inputs of a forward of one chunk."""

    x: Tensor
    """Noisy latent, rows first."""
    sigma: Tensor
    context: Tensor
    more: dict[str, Any]
    """Other conditions, by the names that `apply_model` knows."""


def inputs(
    family: str,
    size: tuple[int, int],
    rows: int = 1,
    text: int = 7,
    sigma: float = 0.6,
    seed: int = 3,
    references: int = 0,
    length: int = 1,
) -> Inputs:
    """Random inputs. size: latent cells; text: tokens; references: pictures of a size of their own; length: latent
    frames, where the family has some."""
    row = NARROW[family]
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    frames = (1,) if row.frames else ()
    more: dict[str, Any] = {}
    if row.pooled:
        more["y"] = randn(rows, row.pooled)
    if family == "flux":
        more["guidance"] = torch.full((rows,), 3.5)
    if family == "chroma":
        more["guidance"] = torch.zeros(rows)
    if family in ("lumina2", "z_image"):
        more["num_tokens"] = text
    if references:
        more["ref_latents"] = [randn(rows, LATENT_CHANNELS, *frames, 6, 4 + 2 * i) for i in range(references)]
    x = randn(rows, row.channels, *((length,) if row.frames else ()), *size)
    return Inputs(x, torch.full((rows,), sigma), randn(rows, text, row.text), more)
