"""ControlNet-XS files for the tiny UNets, and the shapes of the released ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .layouts import LAYOUTS, Shapes, UNetLayout, _residual, _transformer, blocks, conv, embedding_shapes
from .storage import random_tensor, save

HINT_WIDTHS = (3, 16, 16, 32, 32, 96, 96, 256)
GAIN = {"enc_zero_convs_in": 1.0, "enc_zero_convs_out": 0.2, "dec_zero_convs_out": 0.2, "middle_block_out": 0.2}
"""Gain of the connections: visible in the picture, but small enough for it to stay in range."""

_SD15_FULL = LAYOUTS["sd15_full"]
_SDXL_FULL = UNetLayout(
    channel_mult=(1, 2, 4),
    num_res_blocks=2,
    depth=(0, 0, 2, 2, 10, 10),
    depth_middle=10,
    depth_out=(10, 10, 10, 2, 2, 2, 0, 0, 0),
    context_dim=2048,
    adm_channels=2816,
    linear_proj=True,
)


@dataclass(frozen=True, slots=True)
class XSSize:
    """Control stream beside a UNet. widths: control channels of each level."""

    unet: UNetLayout
    widths: tuple[int, ...]
    own_time: bool


RELEASED_XS: dict[str, XSSize] = {
    "sd15_53m": XSSize(_SD15_FULL, (64, 128, 256, 256), False),
    "sd21_14m": XSSize(replace(_SD15_FULL, context_dim=1024, linear_proj=True), (4, 8, 16, 16), True),
    "sdxl_20m": XSSize(_SDXL_FULL, (16, 32, 64), False),
    "sdxl_48m": XSSize(_SDXL_FULL, (32, 64, 128), True),
}


def xs_shapes(size: XSSize) -> Shapes:
    """Names and shapes of one ControlNet-XS, as released."""
    unet, shapes, own, base, number = size.unet, Shapes(), 0, 0, 0
    if size.own_time:
        plain = replace(unet, adm_channels=None)
        shapes |= {f"control_model.{name}": shape for name, shape in embedding_shapes(plain).items()}
    kept: list[int] = []
    decoder, level = 0, 0
    for block in blocks(unet):
        if block.ldm.startswith("output_blocks"):
            shapes |= conv(f"dec_zero_convs_out.{decoder}.0", kept.pop(), base, 1, 1)
            base, decoder = block.channels_out, decoder + 1
            continue
        name, width = f"control_model.{block.ldm}", size.widths[level]
        if block.kind == "conv":
            shapes |= conv(f"{name}.0", 4, width)
        elif block.kind == "down":
            shapes |= conv(f"{name}.0.op", own + base, own)
            width, level = own, level + 1
        else:
            width = own if block.kind == "middle" else width
            shapes |= _residual(f"{name}.0", own + base, width)
            if block.depth > 0 or block.kind == "middle":
                shapes |= _transformer(f"{name}.1", width, max(1, block.depth), unet)
        if block.kind == "middle":
            shapes |= _residual(f"{name}.2", own, own) | conv("middle_block_out.0", own, block.channels_out, 1, 1)
            continue
        own, base = width, block.channels_out
        kept.append(own)
        shapes |= conv(f"enc_zero_convs_in.{number}.0", base, base, 1, 1)
        shapes |= conv(f"enc_zero_convs_out.{number}.0", own, base, 1, 1)
        number += 1
    widths = (*HINT_WIDTHS, size.widths[0])
    for place, (channels_in, channels_out) in enumerate(zip(widths, widths[1:], strict=False)):
        shapes |= conv(f"input_hint_block.{2 * place}", channels_in, channels_out)
    return shapes


def make_controlnet_xs(
    path: Path,
    layout: str = "sd15",
    own_time: bool = False,
    format: str = "official",
    width: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Make a ControlNet-XS for the UNet of that name (a key of LAYOUTS), as if trained: its connections are not zero.

    width: control channels of the first level. format: "official" (released names) or "diffusers" (its adapter's).
    """
    unet = LAYOUTS[layout]
    widths = tuple(width * mult for mult in unet.channel_mult)
    shapes = xs_shapes(XSSize(unet, widths, own_time))
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) < 2:
            is_norm = name.endswith("weight")
            tensors[name] = (torch.ones(shape) if is_norm else torch.zeros(shape)).to(dtype)
        else:
            gain = GAIN.get(name.partition(".")[0], 1.4 if "input_hint" in name else 1.0)
            std = gain * torch.Size(shape[1:]).numel() ** -0.5
            tensors[name] = random_tensor(name, shape, std, seed).to(dtype)
    if format == "diffusers":
        names = _adapter_names(shapes)
        tensors = {names[name]: value for name, value in tensors.items()}
    return save(path, tensors)


def _adapter_names(shapes: Shapes) -> dict[str, str]:
    """Released name -> name in diffusers' adapter."""
    from ...controlnext_core.checkpoint import Header
    from ...controlnext_core.xs_detection import read_xs_file
    from ...controlnext_core.xs_key_maps import from_ours

    file = read_xs_file(Header(Path("tiny"), shapes, {}))
    adapter = from_ours(file.names, file.shape.layout, "diffusers")
    return {released: adapter[ours] for ours, released in file.names.items()}
