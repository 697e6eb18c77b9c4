"""A tiny UNet with the names of its authors (diffusers'), as SVD v2 is published."""

from __future__ import annotations

from pathlib import Path

from comfyui_controlnext.controlnext_core.key_maps import unet_key_map
from comfyui_controlnext.tools.tiny_models import LAYOUTS, unet_tensors
from comfyui_controlnext.tools.tiny_models.storage import save


def make_published_unet(path: Path, layout: str = "svd", seed: int = 0) -> Path:
    """The UNet of that layout with the names that the authors use (diffusers'), as SVD v2 is published (`.bin`)."""
    unet, tensors = LAYOUTS[layout], unet_tensors(layout, seed)
    config = {
        "channel_mult": unet.channel_mult,
        "num_res_blocks": [unet.num_res_blocks] * len(unet.channel_mult),
        "transformer_depth": unet.depth,
        "transformer_depth_middle": unet.depth_middle,
        "transformer_depth_output": unet.depth_out[::-1],  # the host gives the last block first
        "adm_in_channels": unet.adm_channels,
        "use_temporal_resblock": unet.temporal,
        "use_temporal_attention": unet.temporal,
    }
    return save(path, {name: tensors[ldm] for name, ldm in unet_key_map(config).items()})
