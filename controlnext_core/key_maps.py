"""Names of UNet weights: published (diffusers) names <-> host names, generated from the shape of the UNet.

A published name is used in a weight file (`down_blocks.1.attentions.0...`), a host name in the base model for the same
tensor (`input_blocks.4.1...`), both without an outer prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .checkpoint import CheckpointError, listed
from .families import CONTEXT_FAMILIES

PUBLISHED_PREFIXES = ("controlnext.", "module.", "controlnet.", "unet.", "model.diffusion_model.", "diffusion_model.")
"""Prefixes that a trainer, a bundle or a checkpoint puts before every name of a part."""

MAX_NESTED = 8
"""Largest number of nested prefixes that are removed."""

HOST_ROOTS = ("input_blocks.", "middle_block.", "output_blocks.", "joint_blocks.")
"""Prefixes of host names only: a file with any of these uses host names throughout."""

Pairs = Iterator[tuple[str, str]]
"""Pairs (published name, host name), in sequence."""


@dataclass(frozen=True, slots=True)
class Target:
    """Tensor of the host's model, or part of one, that holds a published tensor."""

    name: str
    slice: tuple[int, int, int] | None = None
    """Slice (dim, start, length) of the host's tensor, where the host fuses several; None: the whole tensor."""
    swap_halves: bool = False
    """True: the host stores the two halves along dim 0 in reverse order. False: in the same order."""


KeyMap = Mapping[str, "str | Target"]
"""Published name -> host name, or a Target where a name does not suffice."""


def as_target(target: str | Target) -> Target:
    """Target of a plain host name; a Target is returned unchanged."""
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
"""Shortcut of a resnet whose width changes: published name -> LDM name."""
_TIME_POSITION = {"time_pos_embed.linear_1": "time_pos_embed.0", "time_pos_embed.linear_2": "time_pos_embed.2"}
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

Config = Mapping[str, Any]
"""Host's `unet_config`. Depths are those of the transformers after each resnet, 0 = none, from the highest resolution
down. Middle depth -2: no middle block; -1: one resnet; n: two resnets around n."""


def unet_key_map(config: Config) -> dict[str, str]:
    """Published name -> host name of every tensor of an SD1.5, SDXL or SVD UNet of any depth.

    The vector condition (`adm_in_channels`) is the published `add_embedding`, as in SDXL and SVD. Raises ValueError
    where the configuration is not a UNet's, or contradicts itself.
    """
    _check(config)
    labelled = config.get("adm_in_channels") is not None
    names = dict(_layers("", "", _ENDS | (_LABELS if labelled else {})))
    names.update(_down(config))
    names.update(_middle(config))
    names.update(_up(config))
    return names


def _check(config: Config) -> None:
    absent = [key for key in ("channel_mult", "num_res_blocks", *_DEPTHS) if config.get(key) is None]
    if absent:
        raise ValueError(
            f"the model's configuration lacks {', '.join(absent)}: it is no UNet of these families. "
            "Connect an SD1.5, SDXL or SVD model."
        )
    resnets, levels = config["num_res_blocks"], len(config["channel_mult"])
    found = (len(resnets), *(len(config[key]) for key in _DEPTHS[:2]))
    expected = (levels, sum(resnets), sum(resnets) + levels)
    if found != expected:
        raise ValueError(
            f"num_res_blocks, {_DEPTHS[0]} and {_DEPTHS[1]} have {found} entries, expected {expected} for "
            f"channel_mult {config['channel_mult']}: give one depth per resnet of the encoder and of the decoder."
        )


def _layers(published: str, host: str, modules: Mapping[str, str], kinds: Sequence[str] = ("weight", "bias")) -> Pairs:
    for ours, theirs in modules.items():
        for kind in kinds:
            yield f"{published}{ours}.{kind}", f"{host}{theirs}.{kind}"


def _down(config: Config) -> Pairs:
    block, width, depths, widths = 1, 1, iter(config["transformer_depth"]), config["channel_mult"]
    for level, level_width in enumerate(widths):
        published = f"down_blocks.{level}."
        for i in range(config["num_res_blocks"][level]):
            host, depth = f"input_blocks.{block}.", next(depths)
            yield from _resnet(f"{published}resnets.{i}.", f"{host}0.", config, shortcut=width != level_width)
            if depth > 0:
                yield from _transformer(f"{published}attentions.{i}.", f"{host}1.", config, depth)
            width = level_width
            block += 1
        if level + 1 < len(widths):
            yield from _layers(f"{published}downsamplers.0.", f"input_blocks.{block}.0.", {"conv": "op"})
            block += 1


def _middle(config: Config) -> Pairs:
    depth = config["transformer_depth_middle"]
    if depth >= -1:
        yield from _resnet("mid_block.resnets.0.", "middle_block.0.", config, shortcut=False)
    if depth >= 0:
        yield from _transformer("mid_block.attentions.0.", "middle_block.1.", config, depth)
        yield from _resnet("mid_block.resnets.1.", "middle_block.2.", config, shortcut=False)


def _up(config: Config) -> Pairs:
    block, depths, resnets = 0, reversed(config["transformer_depth_output"]), config["num_res_blocks"]
    for level in reversed(range(len(resnets))):
        published = f"up_blocks.{len(resnets) - 1 - level}."
        for i in range(resnets[level] + 1):
            host, depth = f"output_blocks.{block}.", next(depths)
            # the input is h and a skip, together always wider than the output
            yield from _resnet(f"{published}resnets.{i}.", f"{host}0.", config, shortcut=True)
            if depth > 0:
                yield from _transformer(f"{published}attentions.{i}.", f"{host}1.", config, depth)
            if level and i == resnets[level]:
                place = 2 if depth > 0 else 1  # the upsampler follows whatever stands in its block
                yield from _layers(f"{published}upsamplers.0.", f"{host}{place}.", _same("conv"))
            block += 1


def _resnet(published: str, host: str, config: Config, shortcut: bool) -> Pairs:
    modules = RESNET | (SHORTCUT if shortcut else {})
    if not config.get("use_temporal_resblock"):
        yield from _layers(published, host, modules)
        return
    yield from _layers(f"{published}spatial_res_block.", host, modules)
    yield from _layers(f"{published}temporal_res_block.", f"{host}time_stack.", RESNET)
    yield f"{published}{_MIX}", f"{host}{_MIX}"


def _transformer(published: str, host: str, config: Config, depth: int) -> Pairs:
    yield from _layers(published, host, _AROUND_BLOCKS)
    for i in range(depth):
        block = f"transformer_blocks.{i}."
        yield from _attention_block(f"{published}{block}", f"{host}{block}")
    if not config.get("use_temporal_attention"):
        return
    yield from _layers(published, host, _TIME_POSITION)
    yield f"{published}{_MIX}", f"{host}{_MIX}"
    for i in range(depth):
        ours, theirs = f"{published}temporal_transformer_blocks.{i}.", f"{host}time_stack.{i}."
        yield from _layers(ours, theirs, _FEED_IN)
        yield from _attention_block(ours, theirs, cross=not config.get("disable_temporal_crossattention"))


def _attention_block(published: str, host: str, cross: bool = True) -> Pairs:
    attentions = ("attn1", "attn2") if cross else ("attn1",)
    yield from _layers(published, host, _SELF_ATTENTION | (_CROSS_ATTENTION if cross else {}) | _FEED_FORWARD)
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
_ATTENTIONS = {
    "x_block.attn": (("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.norm_q", "attn.norm_k")),
    "context_block.attn": (
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        ("attn.norm_added_q", "attn.norm_added_k"),
    ),
    "x_block.attn2": (("attn2.to_q", "attn2.to_k", "attn2.to_v"), ("attn2.norm_q", "attn2.norm_k")),
}
"""Host's attention -> published projections, fused there, and norms of query and key."""
_HEAD_WIDTH = 64


def mmdit_key_map(
    depth: int, *, num_blocks: int | None = None, qk_norm: bool = False, dual_attention: Iterable[int] = ()
) -> dict[str, Target]:
    """Published name -> target of every tensor of an SD3 transformer.

    depth: number of heads of 64 channels, which sets the width; num_blocks: number of joint blocks, None for `depth`;
    qk_norm: True means that queries and keys are normalised (SD3.5); dual_attention: blocks with a second attention
    (SD3.5 medium). In the last block the context gives keys and values only: it has no output, and its modulation is
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
        for attention, (projections, norms) in _ATTENTIONS.items():
            if attention == "x_block.attn2" and i not in dual:
                continue
            targets.update(_fused(ours, f"{theirs}{attention}", projections, depth * _HEAD_WIDTH))
            if qk_norm:
                modules = dict(zip(norms, ("ln_q", "ln_k"), strict=True))
                targets.update(_targets(_layers(ours, f"{theirs}{attention}.", modules, ("weight",))))
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
    """Name -> name without its outer prefixes, which may be nested (`module.unet.`).

    Raises CheckpointError where only some of the names have a prefix: the file holds more than one part.
    """
    bare = {name: name for name in names}
    for _ in range(MAX_NESTED):
        prefix = next((p for p in prefixes if any(b.startswith(p) for b in bare.values())), None)
        if prefix is None:
            break
        without = [name for name, b in bare.items() if not b.startswith(prefix)]
        if without:
            raise CheckpointError(
                f"{source}: some names begin with '{prefix}', {listed('do not', without)}. "
                "It holds several parts: save each part to a file of its own."
            )
        bare = {name: b.removeprefix(prefix) for name, b in bare.items()}
    return bare


def resolve_names(names: Iterable[str], key_map: KeyMap, source: str = "the weights file") -> dict[str, Target]:
    """Name in a file -> its target in the host's model; host names map to themselves.

    Raises CheckpointError for names that the model lacks, with the first few and the family they seem to belong to.
    """
    bare = strip_prefix(names, source=source)
    targets = {name: as_target(target) for name, target in key_map.items()}
    if any(name.startswith(HOST_ROOTS) for name in bare.values()):
        targets = {target.name: Target(target.name) for target in targets.values()}
    unknown = [name for name, b in bare.items() if b not in targets]
    if unknown:
        raise CheckpointError(
            f"{source}: {listed('names that the connected model does not have', unknown)}. "
            f"{family_hint({b: () for b in bare.values()})}Nothing was loaded."
        )
    return {name: targets[b] for name, b in bare.items()}


_FAMILY_MARKS = {
    "SD3": r"^(transformer_blocks|joint_blocks)\.",
    "SVD": r"temporal_|\.time_stack\.",
    "SDXL": r"\.transformer_blocks\.[1-9]|^add_embedding\.|^label_emb\.",
    "SD1.5 or SD2.1": r"^(down_blocks\.0\.attentions|up_blocks\.3|input_blocks\.1\.1|output_blocks\.11)\.",
}
"""Family -> regular expression that matches only its names, after those above it."""


def family_hint(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Sentence about the family of these bare names and shapes; empty where they do not decide.

    shapes: `()` where unknown. The width of the context distinguishes SD1.5 from SD2.1, whose names are the same.
    """
    family = next((f for f, mark in _FAMILY_MARKS.items() if any(re.search(mark, name) for name in shapes)), "")
    widths = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight") and len(shape) == 2}
    if len(widths) == 1 and family not in ("SD3", "SVD"):
        known = CONTEXT_FAMILIES.get(widths.pop())
        family = known.value if known else family
    return f"The file looks made for {family}: connect such a model. " if family else ""
