"""Outputs of diffusers' fused ControlNet-XS, stored so that the comparison outlives its support there.

Made with diffusers 0.42.1 and torch 2.13.0 on the CPU: `python -P tests/golden/make_xs_diffusers.py`.
The sizes are chosen so that diffusers' norm groups and epsilons differ from the released rule in every way they can.
Weights are not stored: each is drawn from a seed that is the checksum of its name.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import torch
from torch import Tensor

PATH = Path(__file__).with_name("xs_diffusers.safetensors")

BASE_WIDTHS, WIDTHS, HEADS, TEXT = (32, 64, 64), (16, 32, 40), 2, 16
TEXT_EMBEDS, TIME_EMBED = 8, 4
LABELS = TEXT_EMBEDS + 6 * TIME_EMBED
SCALE, TIME_MIX, TIMESTEP = 0.8, 0.7, 601
TO_BASE = 0.3

HOST_CONFIG = {
    "model_channels": 32,
    "channel_mult": (1, 2, 2),
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 1, 1, 1, 1],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": True,
    "context_dim": TEXT,
    "adm_in_channels": LABELS,
}


def weight(part: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """Weight of that name in "unet" or "adapter": matrices scaled by fan-in, norms around 1, biases around 0."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{part} {name}".encode())))
    if len(shape) > 1:
        return numbers * torch.Size(shape[1:]).numel() ** -0.5 * (TO_BASE if "to_base" in name else 1.0)
    return 0.1 * numbers + (1.0 if "norm" in name and name.endswith("weight") else 0.0)


def inputs() -> dict[str, Tensor]:
    """Inputs x, hint, context, and the parts of y."""
    g = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(2, 4, 16, 16, generator=g),
        "hint": torch.randint(0, 256, (1, 3, 128, 128), generator=g, dtype=torch.uint8),
        "context": torch.randn(2, 5, TEXT, generator=g),
        "text_embeds": torch.randn(2, TEXT_EMBEDS, generator=g),
        "time_ids": torch.randint(0, 1024, (2, 6), generator=g).float(),
    }


def run_diffusers(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output of the fused model with and without control, and y as its code forms it."""
    from diffusers import ControlNetXSAdapter, UNet2DConditionModel, UNetControlNetXSModel

    unet = UNet2DConditionModel(
        block_out_channels=BASE_WIDTHS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT,
        attention_head_dim=HEADS,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_EMBED,
        projection_class_embeddings_input_dim=LABELS,
    )
    adapter = ControlNetXSAdapter.from_unet(
        unet,
        block_out_channels=list(WIDTHS),
        num_attention_heads=[HEADS] * 3,
        learn_time_embedding=True,
        time_embedding_mix=TIME_MIX,
    )
    for part, module in (("unet", unet), ("adapter", adapter)):
        module.load_state_dict({name: weight(part, name, tuple(t.shape)) for name, t in module.state_dict().items()})
    fused = UNetControlNetXSModel.from_unet(unet, adapter).eval()
    added = {"text_embeds": given["text_embeds"], "time_ids": given["time_ids"]}
    call = {"encoder_hidden_states": given["context"], "added_cond_kwargs": added, "return_dict": False}
    hint = given["hint"].float().expand(2, -1, -1, -1) / 255
    with torch.no_grad():
        controlled = fused(given["x"], TIMESTEP, controlnet_cond=hint, conditioning_scale=SCALE, **call)[0]
        plain = fused(given["x"], TIMESTEP, controlnet_cond=hint, apply_control=False, **call)[0]
        time_ids = fused.base_add_time_proj(given["time_ids"].flatten()).reshape(2, -1)
    return {"controlled": controlled, "plain": plain, "y": torch.cat([given["text_embeds"], time_ids], dim=1)}


if __name__ == "__main__":
    import runpy

    from safetensors.torch import save_file

    runpy.run_path(str(Path(__file__).resolve().parents[2] / "_alias.py"))
    from comfyui_controlnext.tools.launcher import declare_missing_torchvision_ops

    declare_missing_torchvision_ops()  # diffusers imports torchvision, whose operators a CPU torch may lack
    found = inputs()
    save_file({**found, **run_diffusers(found)}, PATH)
    sys.stdout.write(f"{PATH}: {PATH.stat().st_size} bytes\n")
