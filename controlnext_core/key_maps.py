"""Names of UNet weights: published (diffusers) names <-> the host's, generated from the shape of the UNet.

A published name stands in a weight file (`down_blocks.1.attentions.0...`), a host name in the base model for
the same tensor (`input_blocks.4.1...`), both without an outer prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .checkpoint import CheckpointError, listed

PUBLISHED_PREFIXES = (
    "controlnext.",
    "module.",
    "controlnet.",
    "unet.",
    "model.diffusion_model.",
    "diffusion_model.",
)
"""Outer names that a trainer, a bundle or a checkpoint puts before every name of a part."""

HOST_ROOTS = ("input_blocks.", "middle_block.", "output_blocks.", "joint_blocks.")
"""Where any of these occurs, the whole file uses the host's names."""

Pairs = Iterator[tuple[str, str]]
"""(published name, host name), one after the other."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a published tensor lies in the host's model."""

    name: str
    slice: tuple[int, int, int] | None = None
    """(dim, start, length) inside the host's tensor, where the host fuses several; None = all of it."""
    swap_halves: bool = False
    """The host holds the two halves along dim 0 the other way round."""


KeyMap = Mapping[str, "str | Target"]
"""Published name -> host name, or a Target where a name is not enough."""


def as_target(target: str | Target) -> Target:
    """A plain host name as a Target."""
    return Target(target) if isinstance(target, str) else target


# UNets: modules with a weight and a bias, published name below the block -> host name below the block

_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_LABELS = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}
SHORTCUT = {"conv_shortcut": "skip_connection"}
_TIME_POSITION = {
    "time_pos_embed.linear_1": "time_pos_embed.0",
    "time_pos_embed.linear_2": "time_pos_embed.2",
}
_MIX = "time_mixer.mix_factor"


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_AROUND_BLOCKS = _same("norm", "proj_in", "proj_out")
_SELF_ATTENTION = _same("norm1", "attn1.to_out.0")
_CROSS_ATTENTION = _same("norm2", "attn2.to_out.0")
_FEED_FORWARD = _same("norm3", "ff.net.0.proj", "ff.net.2")
_FEED_IN = _same("norm_in", "ff_in.net.0.proj", "ff_in.net.2")
_QKV = ("to_q", "to_k", "to_v")


_DEPTHS = ("transformer_depth", "transformer_depth_output", "transformer_depth_middle")
_NEEDED = ("channel_mult", "num_res_blocks", *_DEPTHS)


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the names of a UNet depend on, out of the host's configuration."""

    widths: tuple[int, ...]
    """Channels of each level in units of the model's channels."""
    resnets: tuple[int, ...]
    down_depths: tuple[int, ...]
    up_depths: tuple[int, ...]
    """In the host's order, from the highest resolution down."""
    middle_depth: int
    """-2: no middle block; -1: one resnet; else two resnets around so many transformer blocks."""
    labelled: bool
    temporal_resnets: bool
    temporal_attention: bool
    temporal_cross_attention: bool


def unet_key_map(config: Mapping[str, Any]) -> dict[str, str]:
    """Published name -> host name of every tensor of an SD1.5, SDXL or SVD UNet of any depth.

    config: the host's `unet_config`; where it has `adm_in_channels`, that is the published `add_embedding`.
    Raises ValueError where the configuration is no UNet's, or contradicts itself.
    """
    layout = _read_layout(config)
    names = dict(_layers("", "", _ENDS | (_LABELS if layout.labelled else {})))
    names.update(_down(layout))
    names.update(_middle(layout))
    names.update(_up(layout))
    return names


def _read_layout(config: Mapping[str, Any]) -> _Layout:
    absent = [key for key in _NEEDED if config.get(key) is None]
    if absent:
        raise ValueError(
            f"the model's configuration lacks {', '.join(absent)}: it is no UNet of these families. "
            "Connect an SD1.5, SDXL or SVD model."
        )
    layout = _Layout(
        widths=tuple(config["channel_mult"]),
        resnets=tuple(config["num_res_blocks"]),
        down_depths=tuple(config["transformer_depth"]),
        up_depths=tuple(config["transformer_depth_output"]),
        middle_depth=config["transformer_depth_middle"],
        labelled=config.get("adm_in_channels") is not None,
        temporal_resnets=bool(config.get("use_temporal_resblock")),
        temporal_attention=bool(config.get("use_temporal_attention")),
        temporal_cross_attention=not config.get("disable_temporal_crossattention"),
    )
    found = (len(layout.resnets), len(layout.down_depths), len(layout.up_depths))
    expected = (len(layout.widths), sum(layout.resnets), sum(layout.resnets) + len(layout.widths))
    if found != expected:
        raise ValueError(
            "num_res_blocks, transformer_depth and transformer_depth_output have "
            f"{found} entries, expected {expected} for channel_mult {list(layout.widths)}: "
            "give one depth per resnet of the encoder and of the decoder, 0 where there is no transformer."
        )
    return layout


def _layers(published: str, host: str, modules: Mapping[str, str], kinds: Sequence[str] = ("weight", "bias")) -> Pairs:
    for ours, theirs in modules.items():
        for kind in kinds:
            yield f"{published}{ours}.{kind}", f"{host}{theirs}.{kind}"


def _down(layout: _Layout) -> Pairs:
    block, width, depths = 1, 1, iter(layout.down_depths)
    for level, level_width in enumerate(layout.widths):
        published = f"down_blocks.{level}."
        for i in range(layout.resnets[level]):
            shortcut, depth = width != level_width, next(depths)
            yield from _resnet(f"{published}resnets.{i}.", f"input_blocks.{block}.0.", shortcut, layout)
            if depth > 0:
                yield from _transformer(f"{published}attentions.{i}.", f"input_blocks.{block}.1.", depth, layout)
            width = level_width
            block += 1
        if level + 1 < len(layout.widths):
            yield from _layers(f"{published}downsamplers.0.", f"input_blocks.{block}.0.", {"conv": "op"})
            block += 1


def _middle(layout: _Layout) -> Pairs:
    if layout.middle_depth >= -1:
        yield from _resnet("mid_block.resnets.0.", "middle_block.0.", False, layout)
    if layout.middle_depth >= 0:
        yield from _transformer("mid_block.attentions.0.", "middle_block.1.", layout.middle_depth, layout)
        yield from _resnet("mid_block.resnets.1.", "middle_block.2.", False, layout)


def _up(layout: _Layout) -> Pairs:
    block, depths = 0, list(layout.up_depths)
    for level in reversed(range(len(layout.widths))):
        published = f"up_blocks.{len(layout.widths) - 1 - level}."
        for i in range(layout.resnets[level] + 1):
            host, depth = f"output_blocks.{block}.", depths.pop()
            # h and a skip come in, together always wider than what goes out
            yield from _resnet(f"{published}resnets.{i}.", f"{host}0.", True, layout)
            if depth > 0:
                yield from _transformer(f"{published}attentions.{i}.", f"{host}1.", depth, layout)
            if level and i == layout.resnets[level]:
                place = 2 if depth > 0 else 1  # the upsampler follows whatever stands in its block
                yield from _layers(f"{published}upsamplers.0.", f"{host}{place}.", _same("conv"))
            block += 1


def _resnet(published: str, host: str, shortcut: bool, layout: _Layout) -> Pairs:
    modules = RESNET | (SHORTCUT if shortcut else {})
    if not layout.temporal_resnets:
        yield from _layers(published, host, modules)
        return
    yield from _layers(f"{published}spatial_res_block.", host, modules)
    yield from _layers(f"{published}temporal_res_block.", f"{host}time_stack.", RESNET)
    yield f"{published}{_MIX}", f"{host}{_MIX}"


def _transformer(published: str, host: str, depth: int, layout: _Layout) -> Pairs:
    yield from _layers(published, host, _AROUND_BLOCKS)
    for i in range(depth):
        block = f"transformer_blocks.{i}."
        yield from _attention_block(f"{published}{block}", f"{host}{block}")
    if not layout.temporal_attention:
        return
    yield from _layers(published, host, _TIME_POSITION)
    yield f"{published}{_MIX}", f"{host}{_MIX}"
    for i in range(depth):
        ours, theirs = f"{published}temporal_transformer_blocks.{i}.", f"{host}time_stack.{i}."
        yield from _layers(ours, theirs, _FEED_IN)
        yield from _attention_block(ours, theirs, cross=layout.temporal_cross_attention)


def _attention_block(published: str, host: str, cross: bool = True) -> Pairs:
    attentions = ("attn1", "attn2") if cross else ("attn1",)
    modules = _SELF_ATTENTION | (_CROSS_ATTENTION if cross else {}) | _FEED_FORWARD
    yield from _layers(published, host, modules)
    yield from _layers(published, host, _same(*(f"{a}.{p}" for a in attentions for p in _QKV)), ("weight",))


# SD3: a transformer of joint blocks; the host fuses query, key and value

_MMDIT_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}
_IMAGE_STREAM = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
}
_SECOND_ATTENTION = {"attn2.to_out.0": "x_block.attn2.proj"}
_CONTEXT_STREAM = {
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_CONTEXT_MODULATION = {"norm1_context.linear": "context_block.adaLN_modulation.1"}
_FINAL_MODULATION = {"norm_out.linear": "final_layer.adaLN_modulation.1"}
_FUSED = {
    "x_block.attn": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}
_QK_NORMS = {
    "x_block.attn": ("attn.norm_q", "attn.norm_k"),
    "context_block.attn": ("attn.norm_added_q", "attn.norm_added_k"),
    "x_block.attn2": ("attn2.norm_q", "attn2.norm_k"),
}
_HEAD_WIDTH = 64


def mmdit_key_map(
    depth: int, *, num_blocks: int | None = None, qk_norm: bool = False, dual_attention: Iterable[int] = ()
) -> dict[str, Target]:
    """Published name -> target of every tensor of an SD3 transformer.

    depth: heads of 64 channels, which sets the width; num_blocks: joint blocks where not `depth` many;
    qk_norm: queries and keys are normalised (SD3.5); dual_attention: blocks with a second attention (SD3.5
    medium). In the last block the context gives keys and values only: it has no output, and its modulation is
    (shift, scale) in the host but (scale, shift) in published files, as is the final modulation.
    """
    blocks, dual = depth if num_blocks is None else num_blocks, frozenset(dual_attention)
    targets = {"pos_embed.pos_embed": Target("pos_embed")}
    targets.update(_targets(_layers("", "", _MMDIT_ENDS)))
    targets.update(_targets(_layers("", "", _FINAL_MODULATION), swap_halves=True))
    for i in range(blocks):
        last = i == blocks - 1
        ours, theirs = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
        streams = _IMAGE_STREAM | ({} if last else _CONTEXT_STREAM) | (_SECOND_ATTENTION if i in dual else {})
        targets.update(_targets(_layers(ours, theirs, streams)))
        targets.update(_targets(_layers(ours, theirs, _CONTEXT_MODULATION), swap_halves=last))
        for attention in _FUSED if i in dual else ("x_block.attn", "context_block.attn"):
            targets.update(_fused(ours, f"{theirs}{attention}", _FUSED[attention], depth * _HEAD_WIDTH))
            if qk_norm:
                norms = dict(zip(_QK_NORMS[attention], ("ln_q", "ln_k"), strict=True))
                targets.update(_targets(_layers(ours, f"{theirs}{attention}.", norms, ("weight",))))
    return targets


def _targets(pairs: Pairs, swap_halves: bool = False) -> dict[str, Target]:
    return {published: Target(host, swap_halves=swap_halves) for published, host in pairs}


def _fused(published: str, attention: str, parts: Sequence[str], width: int) -> dict[str, Target]:
    return {
        f"{published}{part}.{kind}": Target(f"{attention}.qkv.{kind}", (0, i * width, width))
        for i, part in enumerate(parts)
        for kind in ("weight", "bias")
    }


# Names of a file


def strip_prefix(
    names: Iterable[str], prefixes: Sequence[str] = PUBLISHED_PREFIXES, source: str = "the file"
) -> dict[str, str]:
    """Every name -> the same without its outer prefixes, which may be nested (`module.unet.`).

    Raises CheckpointError where only some of the names have a prefix: the file holds more than one part.
    """
    bare = {name: name for name in names}
    while prefix := next((p for p in prefixes if any(b.startswith(p) for b in bare.values())), None):
        without = [name for name, b in bare.items() if not b.startswith(prefix)]
        if without:
            raise CheckpointError(
                f"{source}: some names begin with '{prefix}', {listed('do not', without)}. "
                "It holds several parts: save each part to a file of its own."
            )
        bare = {name: b.removeprefix(prefix) for name, b in bare.items()}
    return bare
