"""Layouts of the tiny UNets: their tensors, and diffusers' names of their attention layers.

All have 320 channels at the first level, which the host's detection requires; everything else is as small as it
accepts. Names follow the published LDM checkpoints (`input_blocks.1.0.in_layers.2.weight`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

Shapes = dict[str, tuple[int, ...]]
WIDTH = 320  # channels of the first level
TIME_WIDTH = 4 * WIDTH


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetLayout:
    """Shape of one UNet. Every level has `num_res_blocks` residual blocks."""

    channel_mult: tuple[int, ...]
    depth: tuple[int, ...]  # transformer depth per residual block on the way down
    depth_middle: int  # -1: the middle is one residual block
    depth_out: tuple[int, ...]  # transformer depth per output block, in the order they run
    num_res_blocks: int = 1
    in_channels: int = 4
    context_dim: int = 768
    adm_channels: int | None = None  # width of the pooled vector of SDXL and SVD
    linear_proj: bool = False  # proj_in / proj_out are linear layers (SDXL, SVD), not 1x1 convolutions
    temporal: bool = False  # every block has a time stack (SVD)


SD15 = UNetLayout(channel_mult=(1, 1), depth=(0, 1), depth_middle=1, depth_out=(1, 1, 0, 0))
SDXL = UNetLayout(
    channel_mult=(1, 1, 1),
    num_res_blocks=2,
    depth=(0, 0, 1, 1, 2, 2),
    depth_middle=1,
    depth_out=(1, 0, 0, 0, 0, 1, 0, 0, 0),
    context_dim=2048,
    adm_channels=2816,
    linear_proj=True,
)
SVD = UNetLayout(
    channel_mult=(1, 1, 1, 1),
    num_res_blocks=2,
    depth=(1, 1, 1, 1, 1, 1, 0, 0),
    depth_middle=1,
    depth_out=(0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0),
    in_channels=8,
    context_dim=1024,
    adm_channels=768,
    linear_proj=True,
    temporal=True,
)
LAYOUTS: dict[str, UNetLayout] = {
    "sd15": SD15,
    "sd15_inpaint": replace(SD15, in_channels=9),
    "sd15_deep": UNetLayout(channel_mult=(1, 1, 4), depth=(0, 1, 0), depth_middle=-1, depth_out=(0, 0, 1, 0, 0, 0)),
    "sd15_full": UNetLayout(
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        depth=(1, 1, 1, 1, 1, 1, 0, 0),
        depth_middle=1,
        depth_out=(0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    ),
    "sdxl": SDXL,
    "sdxl_deep": replace(
        SDXL,
        channel_mult=(1, 1, 4),
        num_res_blocks=1,
        depth=(0, 2, 5),
        depth_middle=-1,
        depth_out=(0, 0, 1, 0, 0, 0),
    ),
    "svd": SVD,
    "svd_deep": replace(SVD, channel_mult=(1, 1, 1, 4), depth_middle=-1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Block of a UNet: one entry of input_blocks, middle_block or output_blocks. Channels include those of the skip."""

    ldm: str
    kind: str  # "conv", "res", "down" or "middle"
    channels_in: int
    channels_out: int
    depth: int = 0
    diffusers: str = ""  # name of its attention layer in diffusers
    upsample: bool = False


def blocks(layout: UNetLayout) -> Iterator[Block]:
    """Blocks of the UNet in running order."""
    per_level = layout.num_res_blocks
    yield Block(ldm="input_blocks.0", kind="conv", channels_in=layout.in_channels, channels_out=WIDTH)
    skips, channels, index = [WIDTH], WIDTH, 1
    for level, mult in enumerate(layout.channel_mult):
        for r in range(per_level):
            yield Block(
                ldm=f"input_blocks.{index}",
                kind="res",
                channels_in=channels,
                channels_out=mult * WIDTH,
                depth=layout.depth[level * per_level + r],
                diffusers=f"down_blocks.{level}.attentions.{r}",
            )
            channels, index = mult * WIDTH, index + 1
            skips.append(channels)
        if level + 1 < len(layout.channel_mult):
            yield Block(ldm=f"input_blocks.{index}", kind="down", channels_in=channels, channels_out=channels)
            skips.append(channels)
            index += 1
    yield Block(
        ldm="middle_block",
        kind="middle",
        channels_in=channels,
        channels_out=channels,
        depth=layout.depth_middle,
        diffusers="mid_block.attentions.0",
    )
    for index in range((per_level + 1) * len(layout.channel_mult)):
        level, r = divmod(index, per_level + 1)
        mult = layout.channel_mult[-1 - level]
        yield Block(
            ldm=f"output_blocks.{index}",
            kind="res",
            channels_in=channels + skips.pop(),
            channels_out=mult * WIDTH,
            depth=layout.depth_out[index],
            diffusers=f"up_blocks.{level}.attentions.{r}",
            upsample=r == per_level and level + 1 < len(layout.channel_mult),
        )
        channels = mult * WIDTH


def attention_layers(layout: UNetLayout) -> list[tuple[str, str, int]]:
    """Transformer blocks as (LDM name, diffusers name, channels), e.g. `middle_block.1.transformer_blocks.0`."""
    found = []
    for block in blocks(layout):
        for k in range(max(block.depth, 0)):
            tail = f"transformer_blocks.{k}"
            found.append((f"{block.ldm}.1.{tail}", f"{block.diffusers}.{tail}", block.channels_out))
    return found


def unet_shapes(layout: UNetLayout) -> Shapes:
    """Names and shapes of the whole UNet, without the prefix `model.diffusion_model.`."""
    shapes = embedding_shapes(layout)
    for block in blocks(layout):
        shapes |= block_shapes(block, layout)
    return shapes | norm("out.0", WIDTH) | conv("out.2", WIDTH, 4)


def embedding_shapes(layout: UNetLayout) -> Shapes:
    """Shapes of the time embedding, and of that of the pooled vector where there is one."""
    shapes = linear("time_embed.0", WIDTH, TIME_WIDTH) | linear("time_embed.2", TIME_WIDTH, TIME_WIDTH)
    if layout.adm_channels is not None:
        shapes |= linear("label_emb.0.0", layout.adm_channels, TIME_WIDTH)
        shapes |= linear("label_emb.0.2", TIME_WIDTH, TIME_WIDTH)
    return shapes


def block_shapes(block: Block, layout: UNetLayout) -> Shapes:
    """Names and shapes of one block."""
    if block.kind == "conv":
        return conv(f"{block.ldm}.0", block.channels_in, block.channels_out)
    if block.kind == "down":
        return conv(f"{block.ldm}.0.op", block.channels_in, block.channels_out)
    shapes = _residual(f"{block.ldm}.0", block.channels_in, block.channels_out, layout.temporal)
    if block.depth > 0:
        shapes |= _transformer(f"{block.ldm}.1", block.channels_out, block.depth, layout)
    if block.kind == "middle" and block.depth >= 0:
        shapes |= _residual(f"{block.ldm}.2", block.channels_out, block.channels_out, layout.temporal)
    if block.upsample:
        place = 2 if block.depth > 0 else 1
        shapes |= conv(f"{block.ldm}.{place}.conv", block.channels_out, block.channels_out)
    return shapes


def conv(name: str, channels_in: int, channels_out: int, *kernel: int, bias: bool = True) -> Shapes:
    """Shapes of a convolution's weights, 3x3 by default."""
    shapes = {f"{name}.weight": (channels_out, channels_in, *(kernel or (3, 3)))}
    return shapes | ({f"{name}.bias": (channels_out,)} if bias else {})


def linear(name: str, channels_in: int, channels_out: int, bias: bool = True) -> Shapes:
    """Shapes of a linear layer."""
    shapes: Shapes = {f"{name}.weight": (channels_out, channels_in)}
    return shapes | ({f"{name}.bias": (channels_out,)} if bias else {})


def norm(name: str, channels: int) -> Shapes:
    """Shapes of an affine normalisation."""
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def _residual(name: str, channels_in: int, channels_out: int, temporal: bool = False) -> Shapes:
    kernel = (3, 3)
    shapes = _residual_core(name, channels_in, channels_out, kernel)
    if temporal:
        shapes |= _residual_core(f"{name}.time_stack", channels_out, channels_out, (3, 1, 1))
        shapes[f"{name}.time_mixer.mix_factor"] = (1,)
    return shapes


def _residual_core(name: str, channels_in: int, channels_out: int, kernel: tuple[int, ...]) -> Shapes:
    shapes = norm(f"{name}.in_layers.0", channels_in)
    shapes |= conv(f"{name}.in_layers.2", channels_in, channels_out, *kernel)
    shapes |= linear(f"{name}.emb_layers.1", TIME_WIDTH, channels_out)
    shapes |= norm(f"{name}.out_layers.0", channels_out)
    shapes |= conv(f"{name}.out_layers.3", channels_out, channels_out, *kernel)
    if channels_in != channels_out:
        shapes |= conv(f"{name}.skip_connection", channels_in, channels_out, 1, 1)
    return shapes


def _transformer(name: str, channels: int, depth: int, layout: UNetLayout) -> Shapes:
    kernel = () if layout.linear_proj else (1, 1)
    shapes = norm(f"{name}.norm", channels)
    for end in ("proj_in", "proj_out"):
        shapes[f"{name}.{end}.weight"] = (channels, channels, *kernel)
        shapes[f"{name}.{end}.bias"] = (channels,)
    for k in range(depth):
        shapes |= _transformer_block(f"{name}.transformer_blocks.{k}", channels, layout.context_dim)
        if layout.temporal:
            stack = f"{name}.time_stack.{k}"
            shapes |= _transformer_block(stack, channels, layout.context_dim)
            shapes |= norm(f"{stack}.norm_in", channels) | _feed_forward(f"{stack}.ff_in", channels)
    if layout.temporal:
        shapes |= linear(f"{name}.time_pos_embed.0", channels, 4 * channels)
        shapes |= linear(f"{name}.time_pos_embed.2", 4 * channels, channels)
        shapes[f"{name}.time_mixer.mix_factor"] = (1,)
    return shapes


def _transformer_block(name: str, channels: int, context_dim: int) -> Shapes:
    shapes = _feed_forward(f"{name}.ff", channels)
    for attention, width in (("attn1", channels), ("attn2", context_dim)):
        shapes |= linear(f"{name}.{attention}.to_q", channels, channels, bias=False)
        shapes |= linear(f"{name}.{attention}.to_k", width, channels, bias=False)
        shapes |= linear(f"{name}.{attention}.to_v", width, channels, bias=False)
        shapes |= linear(f"{name}.{attention}.to_out.0", channels, channels)
    for number in (1, 2, 3):
        shapes |= norm(f"{name}.norm{number}", channels)
    return shapes


def _feed_forward(name: str, channels: int) -> Shapes:
    shapes = linear(f"{name}.net.0.proj", channels, 8 * channels)
    return shapes | linear(f"{name}.net.2", 4 * channels, channels)
