"""Diffusion transformers of published width, on torch's `meta` device or on a CPU, and their forwards with a control.

On `meta` no values are computed, so that a model of 20 billion parameters takes seconds. The classes are the host's,
the configurations those that it detects in the published files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..controlnext_core import checkpoint
from ..controlnext_core.detection import read_control_file
from ..controlnext_core.families import FAMILIES
from ..controlnext_core.specs import SPECS, config_of
from ..models.controlnext import ControlNeXt

META = torch.device("meta")
PATCH, LATENT_CHANNELS = 2, 16


@dataclass(frozen=True)
class Published:
    """Published transformer and the inputs of its forward."""

    variant: str
    """Row of SPECS for it."""
    supported: str
    """Class in the host's `supported_models`."""
    config: dict[str, Any]
    width: int
    text: tuple[int, int]
    """Size of a typical prompt: (tokens, width)."""
    pooled: int | None = None
    frames: bool = False
    channels: int = LATENT_CHANNELS
    later: dict[str, Any] = field(default_factory=dict)
    """Further keys of the configuration on hosts after the pinned one."""


def sd3(depth: int, second_attention: int = 0) -> Published:
    width = 64 * depth
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": width}}
    config = {
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": PATCH,
        "depth": depth,
        "input_size": None,
        "adm_in_channels": 2048,
        "context_embedder_config": embedder,
        "num_patches": 384**2,
        "pos_embed_max_size": 384,
        "pos_embed_scaling_factor": None,
        "qk_norm": "rms",
        "x_block_self_attn_layers": list(range(second_attention)),
    }
    return Published("sd3", "SD3", config, width, (154, 4096), 2048)


_FLUX: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": PATCH,
    "qkv_bias": True,
    "guidance_embed": True,
}
_CHROMA = {name: value for name, value in _FLUX.items() if name not in ("vec_in_dim", "guidance_embed")} | {
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 3072,
    "hidden_dim": 5120,
    "n_layers": 5,
}
_LUMINA: dict[str, Any] = {
    "image_model": "lumina2",
    "patch_size": PATCH,
    "in_channels": 16,
    "dim": 2304,
    "cap_feat_dim": 2304,
    "n_layers": 26,
    "qk_norm": True,
    "n_heads": 24,
    "n_kv_heads": 8,
    "axes_dims": [32, 32, 32],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 4.0,
}
_Z_IMAGE = _LUMINA | {
    "dim": 3840,
    "cap_feat_dim": 2560,
    "n_layers": 30,
    "n_heads": 30,
    "n_kv_heads": 30,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8 / 3,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
_QWEN = {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}
_LATER: dict[str, Any] = {"txt_ids_dims": []}


def wan(variant: str, dim: int, ffn_dim: int, layers: int, channels: int = LATENT_CHANNELS) -> Published:
    config = {
        "image_model": "wan2.1",
        "model_type": "t2v",
        "patch_size": (1, PATCH, PATCH),
        "dim": dim,
        "ffn_dim": ffn_dim,
        "freq_dim": 256,
        "num_heads": dim // 128,
        "num_layers": layers,
        "in_dim": channels,
        "out_dim": channels,
    }
    supported = "WAN21_T2V" if channels == LATENT_CHANNELS else "WAN22_T2V"
    return Published(variant, supported, config, dim, (512, 4096), frames=True, channels=channels)


PUBLISHED: dict[str, Published] = {
    "SD3-medium": sd3(24),
    "SD3.5-medium": sd3(24, second_attention=13),
    "SD3.5-large": sd3(38),
    "Flux.1": Published("flux", "Flux", _FLUX, 3072, (512, 4096), 768, later=_LATER),
    "Chroma": Published("chroma", "Chroma", _CHROMA, 3072, (512, 4096), later=_LATER | {"vec_in_dim": None}),
    "Qwen-Image": Published("qwen_image", "QwenImage", _QWEN, 3072, (128, 3584), frames=True),
    "Lumina2": Published("lumina2", "Lumina2", _LUMINA, 2304, (128, 2304)),
    "Z-Image": Published("z_image", "ZImage", _Z_IMAGE, 3840, (128, 2560)),
    "Wan 2.1 1.3B": wan("wan", 1536, 8960, 30),
    "Wan 2.1 14B": wan("wan", 5120, 13824, 40),
    "Wan 2.2 5B": wan("wan_5b", 3072, 14336, 30, channels=48),
}


def is_pinned() -> bool:
    """True: the host has the version that `run.py` downloads. False: another version."""
    import comfyui_version

    from ..tools.host import VERSION

    return comfyui_version.__version__ == VERSION


def make_transformer(row: Published, dtype: torch.dtype, device: torch.device = META) -> Any:
    """BaseModel of the host at that size: on `meta` without values, on a CPU with one shared tensor for each shape."""
    import comfy.supported_models

    from .real_size import share_weights

    config = row.config | ({} if is_pinned() else row.later)
    settings = getattr(comfy.supported_models, row.supported)(dict(config))
    settings.set_inference_dtype(dtype, None)
    model = settings.get_model({}, "", device=META)
    if device != META:
        share_weights(model.diffusion_model, dtype, device)
    return model


def make_control(row: Published, folder: Path, dtype: torch.dtype, device: torch.device = META) -> Any:
    """ControlNeXt of that size, made through a file of a narrow one and the loader."""
    from ..controlnext_core.comfy_adapter.files.loading import load_control

    spec = SPECS[row.variant]
    narrow = ControlNeXt(config_of(spec, 32))
    path = folder / f"{row.variant}.safetensors"
    checkpoint.save(
        path, {name: t.detach() for name, t in narrow.state_dict().items()}, {"controlnext.spec": spec.name}
    )
    control = load_control(read_control_file(checkpoint.peek(path)), spec.family)
    patcher = control.net.patcher
    patcher.model = ControlNeXt(config_of(spec, row.width), dtype=dtype, device=device).eval().requires_grad_(False)
    control.net = replace(control.net, uid=f"{row.variant} {row.width}")
    return control


class TransformerScene:
    """Transformer with batch 1 at CFG 1, and its forwards: of a picture, or of a clip for a base of clips."""

    def __init__(
        self,
        row: Published,
        side: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device = META,
        clip: tuple[int, int, int] | None = None,
    ) -> None:
        """side: of the picture, in pixels; clip: (frames, height, width) instead."""
        self.row, self.side, self.dtype, self.device = row, side, dtype, device
        self.frames, height, width = clip or (1, side, side)
        self.size = (height, width)
        self.model = make_transformer(row, dtype, device)

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(1, *shape, dtype=self.dtype, device=self.device)

    @property
    def latent(self) -> Tensor:
        facts = FAMILIES[SPECS[self.row.variant].family]
        length = 1 if facts.frames is None else 1 + (self.frames - 1) // facts.frames
        height, width = (side // facts.pixels for side in self.size)
        return self.tensor(self.row.channels, *((length,) if self.row.frames else ()), height, width)

    def conditions(self) -> dict[str, Any]:
        """Inputs of the network beside latent, time and text."""
        given: dict[str, Any] = {}
        if self.row.pooled:
            given["y"] = self.tensor(self.row.pooled)
        if self.row.variant in ("flux", "chroma"):
            given["guidance"] = torch.zeros(1, device=self.device)
        if self.row.supported in ("Lumina2", "ZImage"):
            given["num_tokens"] = self.row.text[0]
        return given

    def forward(self, control: Any = None, options: dict[str, Any] | None = None) -> Callable[[], Any]:
        """Function that runs one forward, with a control of this pack or with other options."""

        def run() -> Any:
            given: dict[str, Any] = {"cond_or_uncond": [0], **(options or {})}
            x = self.latent
            if control is not None:
                control.add_to(given, x, 0.5)
            time = torch.full((1,), 0.5, device=self.device)
            return self.model.diffusion_model(
                x, time, context=self.tensor(*self.row.text), transformer_options=given, **self.conditions()
            )

        return run

    def start(self, control: Any) -> None:
        """Set the control's hint and begin a first run."""
        from ..controlnext_core.comfy_adapter.sampling.features import CACHE
        from .sampling import hint

        CACHE.clear()
        picture = hint(0, *self.size, 1).movedim(-1, 1)
        control.set_cond_hint(picture if self.frames == 1 else picture[..., ::8, ::8].repeat(self.frames, 1, 1, 1))
        self.begin_run(control)

    def begin_run(self, control: Any) -> None:
        """Begin a sampling run; cached features of the hint stay."""
        control.pre_run(self.model, self.model.model_sampling.percent_to_sigma)
