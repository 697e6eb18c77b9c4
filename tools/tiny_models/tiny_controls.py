"""Controls for the tiny UNets: stock ControlNet, LoRA, ControlNeXt encoders and UNet differences."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .layouts import (
    LAYOUTS,
    Shapes,
    attention_layers,
    block_shapes,
    blocks,
    conv,
    embedding_shapes,
    linear,
    norm,
)
from .storage import Pools, random_tensor, save, uniform_tensor
from .text_and_vae import fill

HINT_WIDTHS = (16, 16, 32, 32, 96, 96, 256)  # of the stock ControlNet's hint encoder, before the last layer
HINT_GAINS = (8.0, *[2**0.5] * 6, 0.25)  # per layer: SiLU halves the power of large values and all of small ones
ZERO_CONV_GAIN = 0.2  # strong enough to see, weak enough for the picture to stay in range
ENCODER_TIME_WIDTH = 256
RULES = {"to_out": ("attn1", "attn2"), "attn2_to_out": ("attn2",)}
LORA_TARGETS = ("attn1.to_q", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0")


def make_stock_controlnet(path: Path, unet: str = "sd15", seed: int = 0) -> Path:
    """Make a classic ControlNet (LDM names) for the UNet of that name, as if trained: its zero convolutions are not
    zero.

    Use `.pth`: a dense file would have tens of megabytes.
    """
    layout = LAYOUTS[unet]
    shapes, index = embedding_shapes(layout), 0
    for block in blocks(layout):
        if block.ldm.startswith("output_blocks"):
            break
        shapes |= block_shapes(block, layout)
        width = block.channels_out
        zero_conv = "middle_block_out.0" if block.kind == "middle" else f"zero_convs.{index}.0"
        shapes |= conv(zero_conv, width, width, 1, 1)
        index += 1
    widths = (3, *HINT_WIDTHS, shapes["input_blocks.0.0.weight"][0])
    for place, (channels_in, channels_out) in enumerate(zip(widths, widths[1:], strict=False)):
        shapes |= conv(f"input_hint_block.{2 * place}", channels_in, channels_out)
    pools = Pools(seed)
    tensors = fill(pools, shapes)
    for name, shape in shapes.items():
        if name.endswith("weight") and ("zero_convs" in name or "middle_block_out" in name):
            tensors[name] = pools.normal(name, shape, ZERO_CONV_GAIN * shape[1] ** -0.5)
        elif name.endswith("weight") and "input_hint_block" in name:
            gain = HINT_GAINS[int(name.split(".")[1]) // 2]
            tensors[name] = pools.normal(name, shape, gain * (9 * shape[1]) ** -0.5)
    return save(path, {f"control_model.{name}": value for name, value in tensors.items()})


def make_lora(path: Path, unet: str = "sd15", seed: int = 0, rank: int = 4, scale: float = 1.0) -> Path:
    """Make a LoRA (kohya names, fp16) on the query and output layers of every attention.

    The change of a weight is about `scale` times as large as the weight.
    """
    tensors = {}
    for ldm, _, channels in attention_layers(LAYOUTS[unet]):
        for target in LORA_TARGETS:
            name = f"lora_unet_{ldm}.{target}".replace(".", "_")
            up = random_tensor(f"{name} up", (channels, rank), scale * rank**-0.5, seed)
            down = random_tensor(f"{name} down", (rank, channels), channels**-0.5, seed)
            tensors[f"{name}.lora_up.weight"] = up.half()
            tensors[f"{name}.lora_down.weight"] = down.half()
            tensors[f"{name}.alpha"] = torch.tensor(float(rank)).half()
    return save(path, tensors, {"ss_network_module": "networks.lora", "ss_network_dim": str(rank)})


def make_unet_difference(
    path: Path,
    unet: str = "sd15",
    rule: str = "to_out",
    kind: str = "difference",
    dtype: torch.dtype = torch.float16,
    scale: float = 0.02,
    base: dict[str, Tensor] | None = None,
    seed: int = 0,
) -> Path:
    """Make the UNet half of a ControlNeXt: output projections of attention layers in diffusers names.

    rule: "to_out" (all) or "attn2_to_out" (cross-attention only). kind: "difference" for normal values of std `scale`,
    by default a third of the std of the weights they are added to (320 ** -0.5); "full" for the same values added to
    `base`, the UNet's tensors in LDM names without prefix. Raises ValueError if kind is unknown or a full file is
    requested without a base.
    """
    if kind not in ("difference", "full") or (kind == "full" and base is None):
        raise ValueError(f"{path}: kind is {kind!r}; use 'difference', or 'full' together with base.")
    tensors = {}
    for ldm, diffusers, channels in attention_layers(LAYOUTS[unet]):
        for attention in RULES[rule]:
            for leaf, shape in (("weight", (channels, channels)), ("bias", (channels,))):
                tail = f"{attention}.to_out.0.{leaf}"
                value = random_tensor(f"{ldm}.{tail}", shape, scale, seed)
                if kind == "full" and base is not None:
                    value = value + base[f"{ldm}.{tail}"].float()
                tensors[f"{diffusers}.{tail}"] = value.to(dtype)
    return save(path, tensors)


# build: (widths of the stages, out channels, has a stem, norms in the middle, learned scale)
CONTROLNEXT_BUILDS: dict[str, tuple[tuple[int, ...], int, bool, bool, bool]] = {
    "sd15_legacy": ((3, 128, 256, 256), 1280, False, False, True),
    "sdxl_june": ((3, 128, 256, 256), 1280, False, True, True),
    "sdxl_july": ((128, 128, 256, 256), 1280, True, True, False),
    "svd_v1": ((128, 128, 256, 256), 1280, True, True, True),
    "gen2": ((128, 128, 256), 320, True, True, False),
}


def make_controlnext(
    path: Path,
    build: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    out_channels: int | None = None,
) -> Path:
    """Make a ControlNeXt encoder with the published names and shapes, initialised by torch's defaults.

    build: a key of CONTROLNEXT_BUILDS; "gen2" has the names of today's SD1.5, SDXL and SVD-v2 files. The suffix is
    `.safetensors`, or `.bin` as the SVD files were published.
    """
    if build not in CONTROLNEXT_BUILDS:
        raise ValueError(f"{build!r} is not a published encoder; use one of {', '.join(CONTROLNEXT_BUILDS)}.")
    shapes = controlnext_shapes(build, out_channels)
    tensors = {}
    for name, shape in shapes.items():
        layer = name.rpartition(".")[0]
        weight = shapes.get(f"{layer}.weight", ())
        if name == "scale":
            value = torch.tensor(1.0)
        elif len(weight) == 1:
            value = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        else:
            value = uniform_tensor(name, shape, torch.Size(weight[1:]).numel() ** -0.5, seed)
        tensors[name] = value.to(dtype)
    return save(path, tensors)


def controlnext_shapes(build: str, out_channels: int | None = None) -> Shapes:
    """Names and shapes of one published encoder build."""
    widths, published_out, has_stem, mid_norms, has_scale = CONTROLNEXT_BUILDS[build]
    time = ENCODER_TIME_WIDTH
    shapes = linear("time_embedding.linear_1", 128, time) | linear("time_embedding.linear_2", time, time)
    if has_stem:
        for place, (channels_in, channels_out) in enumerate(((3, 64), (64, 64), (64, 128))):
            shapes |= conv(f"embedding.{3 * place}", channels_in, channels_out)
            shapes |= norm(f"embedding.{3 * place + 1}", channels_out)
    for stage, (channels_in, channels_out) in enumerate(zip(widths, widths[1:], strict=False)):
        shapes |= _stage(stage, channels_in, channels_out)
    last = widths[-1]
    shapes |= conv("mid_convs.0.0", last, last)
    if mid_norms:
        shapes |= norm("mid_convs.0.2", last) | conv("mid_convs.0.3", last, last) | norm("mid_convs.0.4", last)
    else:
        shapes |= conv("mid_convs.0.2", last, last)
    shapes |= conv("mid_convs.1", last, out_channels or published_out, 1, 1)
    return shapes | ({"scale": ()} if has_scale else {})


def _stage(stage: int, channels_in: int, channels_out: int) -> Shapes:
    name = f"down_res.{stage}"
    shapes = norm(f"{name}.norm1", channels_in) | conv(f"{name}.conv1", channels_in, channels_out)
    shapes |= linear(f"{name}.time_emb_proj", ENCODER_TIME_WIDTH, channels_out)
    shapes |= norm(f"{name}.norm2", channels_out) | conv(f"{name}.conv2", channels_out, channels_out)
    if channels_in != channels_out:
        shapes |= conv(f"{name}.conv_shortcut", channels_in, channels_out, 1, 1)
    return shapes | conv(f"down_sample.{stage}.conv", channels_out, channels_out)
