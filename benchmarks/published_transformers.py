"""Transformers of published size as MODELs managed by the host, with random weights, for runs with its sampler."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .real_transformers import PUBLISHED, Published, make_transformer, sd3

SMALL_WIDTH = 128
_SMALL_FLUX = {"hidden_size": SMALL_WIDTH, "num_heads": 1, "depth": 2, "depth_single_blocks": 2}
_SMALL_LUMINA = {"n_layers": 2, "axes_dims": [32, 16, 16]}


@dataclass(frozen=True)
class Timed:
    """Published transformer with the settings of its runs."""

    published: Published
    small: dict[str, Any]
    """Changes of its configuration that make it narrow and shallow."""
    small_width: int = SMALL_WIDTH
    cfg: float = 4.0


TRANSFORMERS: dict[str, Timed] = {
    "sd3": Timed(PUBLISHED["SD3.5-medium"], sd3(SMALL_WIDTH // 64, second_attention=1).config),
    "flux": Timed(PUBLISHED["Flux.1"], _SMALL_FLUX, cfg=1.0),
    "chroma": Timed(PUBLISHED["Chroma"], _SMALL_FLUX | {"out_dim": SMALL_WIDTH, "hidden_dim": 64, "n_layers": 1}),
    "qwen_image": Timed(PUBLISHED["Qwen-Image"], {"num_layers": 2, "num_attention_heads": 1}),
    "lumina2": Timed(PUBLISHED["Lumina2"], _SMALL_LUMINA | {"dim": SMALL_WIDTH, "n_heads": 2, "n_kv_heads": 1}),
    "z_image": Timed(PUBLISHED["Z-Image"], _SMALL_LUMINA | {"dim": 256, "n_heads": 4, "n_kv_heads": 4}, 256),
}


def make_model(name: str, dtype: torch.dtype, small: bool = False) -> Any:
    """MODEL of that transformer (a key of TRANSFORMERS), in the form of the host's loaders."""
    import comfy.model_management
    import comfy.model_patcher

    timed = TRANSFORMERS[name]
    row = timed.published
    if small:
        row = replace(row, config=row.config | timed.small)
    model = make_transformer(row, dtype, torch.device("cpu"))
    model.device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def width_of(name: str, small: bool) -> int:
    """Number of channels at the control's site."""
    timed = TRANSFORMERS[name]
    return timed.small_width if small else timed.published.width
