"""The diffusion transformers of published size in the host's hands, with random weights that share memory.

Sizes are those that the host finds in SD3.5-medium, Flux.1-dev, Chroma, Qwen-Image, Lumina2 and Z-Image.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..tools.host import VERSION
from .real_size import share_weights

TOKENS = 256
"""Of a prompt."""
_FLUX: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
}
_CHROMA = {"in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5}
_LUMINA: dict[str, Any] = {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "qk_norm": True}
_SMALL_FLUX = {"hidden_size": 128, "num_heads": 1, "depth": 2, "depth_single_blocks": 2}


@dataclass(frozen=True)
class Transformer:
    """One published model."""

    supported: str
    """Class in the host's `supported_models`."""
    config: dict[str, Any]
    width: int
    """Channels at the place where a control is added."""
    text: int
    pooled: int | None = None
    cfg: float = 4.0
    later: dict[str, Any] = field(default_factory=dict)
    """Further keys of the configuration on hosts after the pinned one."""
    small: dict[str, Any] = field(default_factory=dict)
    """Changes that make it narrow and shallow; `width` is then SMALL_WIDTH."""


SMALL_WIDTH = 128


def _sd3(depth: int, second_attention: int) -> dict[str, Any]:
    parameters = {"in_features": 4096, "out_features": 64 * depth}
    return {
        "depth": depth,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": parameters},
        "x_block_self_attn_layers": list(range(second_attention)),
    }


TRANSFORMERS: dict[str, Transformer] = {
    "sd3": Transformer(
        "SD3",
        {
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "input_size": None,
            "adm_in_channels": 2048,
            "num_patches": 384 * 384,
            "pos_embed_max_size": 384,
            "qk_norm": "rms",
            "pos_embed_scaling_factor": None,
            **_sd3(24, 13),
        },
        width=1536,
        text=4096,
        pooled=2048,
        small=_sd3(2, 1),
    ),
    "flux": Transformer(
        "Flux",
        _FLUX | {"image_model": "flux", "guidance_embed": True, "vec_in_dim": 768},
        width=3072,
        text=4096,
        pooled=768,
        cfg=1.0,
        later={"txt_ids_dims": []},
        small=_SMALL_FLUX,
    ),
    "chroma": Transformer(
        "Chroma",
        _FLUX | _CHROMA | {"image_model": "chroma"},
        width=3072,
        text=4096,
        later={"txt_ids_dims": [], "vec_in_dim": None},
        small=_SMALL_FLUX | {"out_dim": 128, "hidden_dim": 64, "n_layers": 1},
    ),
    "qwen_image": Transformer(
        "QwenImage",
        {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60, "joint_attention_dim": 3584},
        width=3072,
        text=3584,
        small={"num_layers": 2, "num_attention_heads": 1},
    ),
    "lumina2": Transformer(
        "Lumina2",
        _LUMINA
        | {
            "dim": 2304,
            "cap_feat_dim": 2304,
            "n_layers": 26,
            "n_heads": 24,
            "n_kv_heads": 8,
            "axes_dims": [32, 32, 32],
            "axes_lens": [300, 512, 512],
            "ffn_dim_multiplier": 4.0,
        },
        width=2304,
        text=2304,
        small={"dim": 128, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "axes_dims": [32, 16, 16]},
    ),
    "z_image": Transformer(
        "ZImage",
        _LUMINA
        | {
            "dim": 3840,
            "cap_feat_dim": 2560,
            "n_layers": 30,
            "n_heads": 30,
            "n_kv_heads": 30,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "ffn_dim_multiplier": 8 / 3,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
        width=3840,
        text=2560,
        small={"dim": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [32, 16, 16]},
    ),
}


def make_transformer(name: str, dtype: torch.dtype, small: bool = False) -> Any:
    """A MODEL of that real transformer (a key of TRANSFORMERS), as the host's loaders give it."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import comfyui_version

    row = TRANSFORMERS[name]
    config = dict(row.config) | (row.small if small else {})
    config |= row.later if comfyui_version.__version__ != VERSION else {}
    settings = getattr(comfy.supported_models, row.supported)(config)
    settings.set_inference_dtype(dtype, None)
    model = settings.get_model({}, "", device="meta")
    share_weights(model.diffusion_model, dtype)
    model.device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def width_of(name: str, small: bool) -> int:
    """Channels where a control is added."""
    return int(TRANSFORMERS[name].small.get("dim", SMALL_WIDTH)) if small else TRANSFORMERS[name].width
