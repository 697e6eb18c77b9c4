"""Tables of ControlNet-XS: released sizes, norm rules, head rules; and the configuration of a network from its shape.

Source of every row: the released code and configurations of ControlNet-XS, and diffusers 0.42.1 where stated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..models.attention import TransformerConfig
from ..models.controlnet_xs import CONV, DOWN, RES, BlockConfig, ControlNetXSConfig
from .encodable import cut
from .families import CONTEXT_FAMILIES
from .specs import Family

MAX_GROUPS = 32
FEW_CHANNELS = 32
"""Smallest number of channels at which norms run in the features' dtype. Below it they run in fp32, as in the released
code: with fp32 weights under fp16 the SD2.1 release is then 1.2e-3 and not 1.3e-3 off. Kernels that compute their
statistics in half precision would do worse."""
HINT_WIDTHS = (3, 16, 16, 32, 32, 96, 96, 256)
"""Channels of the hint encoder as released; the control's first width follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class XSLayout:
    """Blocks of a ControlNet-XS; every level but the last ends with a downsampler."""

    levels: tuple[tuple[int, ...], ...]
    """Transformer depths of the residual blocks of each level; 0 = no transformer."""
    middle_depth: int
    own_time: bool = False
    adds_in_encoder: bool = True

    @property
    def kinds(self) -> tuple[tuple[str, int, int], ...]:
        """(kind, level, transformer depth) of every encoder block, in running order."""
        blocks = [(CONV, 0, 0)]
        for level, depths in enumerate(self.levels):
            blocks += [(RES, level, depth) for depth in depths]
            blocks += [(DOWN, level, 0)] if level + 1 < len(self.levels) else []
        return tuple(blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class XSShape:
    """Shape of a network, from a file's tensors; heads and group counts are not part of it."""

    layout: XSLayout
    widths: tuple[int, ...]
    """Control channels after each encoder block."""
    base_widths: tuple[int, ...]
    """Base channels after each of its encoder blocks."""
    decoder_widths: tuple[int, ...]
    """Base channels at the input of each of its decoder blocks."""
    inner: tuple[int, ...]
    """Inner width of each encoder block's transformer (0 = none), the middle's at the end."""
    context_dim: int
    time_dim: int
    time_in: int
    """Width of the sinusoidal embedding, equal to the base's first width."""
    linear: bool
    hint: tuple[int, ...]
    in_channels: int = 4

    @property
    def family(self) -> Family:
        return CONTEXT_FAMILIES.get(self.context_dim, Family.OTHER)

    @property
    def fp32_norms(self) -> bool:
        """True: norms run in fp32 for features of every dtype. False: in the features' dtype."""
        return min(self.widths) < FEW_CHANNELS

    @property
    def level_widths(self) -> tuple[int, ...]:
        """Control channels of each level."""
        last = {level: width for (_, level, _), width in zip(self.layout.kinds, self.widths, strict=True)}
        return tuple(last.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class XSRelease:
    """Released size of ControlNet-XS."""

    name: str
    family: Family
    widths: tuple[int, ...]
    own_time: bool
    parameters: int
    """Number of parameters without buffers and without the unused label embedding in some files."""


RELEASES = (
    XSRelease(name="sd15_53m", family=Family.SD15, widths=(64, 128, 256, 256), own_time=False, parameters=52_661_392),
    XSRelease(name="sd21_14m", family=Family.SD21, widths=(4, 8, 16, 16), own_time=True, parameters=14_186_356),
    XSRelease(name="sdxl_20m", family=Family.SDXL, widths=(16, 32, 64), own_time=False, parameters=20_177_984),
    XSRelease(name="sdxl_48m", family=Family.SDXL, widths=(32, 64, 128), own_time=True, parameters=42_424_368),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NormRule:
    """Rule for the groups of the norms, and the epsilon of the middle's residual blocks (1e-5 in the encoder)."""

    name: str
    capped_by_level: bool
    """True: the groups of a level's first norm limit those of its other norms. False: the limit is 32."""
    middle_common: bool
    """True: the middle has one number of groups, which divides its input and output channels. False: one for each."""
    middle_eps: float


NORM_RULES = {
    rule.name: rule
    for rule in (
        NormRule(name="official", capped_by_level=False, middle_common=False, middle_eps=1e-5),
        # diffusers' fused model: from_modules passes the first norm's groups on; UNetMidBlock2DCrossAttn has 1e-6
        NormRule(name="diffusers", capped_by_level=True, middle_common=True, middle_eps=1e-6),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRule:
    """Rule for the attention heads of one family's released networks: a fixed number, or heads of a fixed width."""

    heads: int | None = None
    head_width: int | None = None

    def of(self, width: int) -> int:
        return self.heads or max(1, width // min(self.head_width or width, width))


HEAD_RULES = {
    Family.SD15: HeadRule(heads=8),
    Family.SD21: HeadRule(head_width=8),
    Family.SDXL: HeadRule(head_width=64),
}
DIFFUSERS_HEADS = (5, 10, 20, 20)
"""Heads per level that diffusers copies from SD2.1 and SDXL bases where none are given: inner widths are cut to
them."""


def released_as(shape: XSShape) -> XSRelease | None:
    """Released size with this shape; None for another."""
    for release in RELEASES:
        if (release.family, release.widths, release.own_time) == (
            shape.family,
            shape.level_widths,
            shape.layout.own_time,
        ):
            return release
    return None


def divisor(channels: int, most: int = MAX_GROUPS) -> int:
    """Largest divisor of `channels` that is not above `most`."""
    return next(groups for groups in range(min(channels, most), 0, -1) if channels % groups == 0)


def parse_heads(text: str) -> tuple[int, ...]:
    """Attention heads per level from a text such as `8` or `1,1,2`; () for an empty text.

    The last number applies to all further levels. Raises ValueError for other texts.
    """
    try:
        heads = tuple(int(part) for part in text.replace(" ", "").split(",")) if text.strip() else ()
    except ValueError:
        heads = (0,)
    if any(number < 1 for number in heads):
        raise ValueError(
            f"num_heads: '{cut(text)}' is not a list of whole numbers. Write one number for all levels (8), or one per "
            "level (1,1,2), or leave it empty."
        )
    return heads


def heads_of(shape: XSShape, given: tuple[int, ...], source: str) -> tuple[int, ...]:
    """Attention heads of each encoder block's transformer (0 = none), the middle's at the end.

    given: per level, or () for the rules of the table. Raises ValueError, naming `source`, where heads do not divide
    the width.
    """
    levels = [level for _, level, _ in shape.layout.kinds] + [len(shape.layout.levels) - 1]
    widths = [*shape.widths, shape.widths[-1]]
    heads = []
    for level, width, inner in zip(levels, widths, shape.inner, strict=True):
        if inner == 0:
            heads.append(0)
            continue
        number = given[min(level, len(given) - 1)] if given else _rule(shape, level, width, inner)
        if number < 1 or inner % number:
            raise ValueError(
                f"{source}: {number or 'no known number of'} attention heads on level {level}, whose attention is "
                f"{inner} wide. Heads are not in the file: set num_heads to what it was trained with, one number per "
                "level, each dividing that level's width (1,1,2)."
            )
        heads.append(number)
    return tuple(heads)


def _rule(shape: XSShape, level: int, width: int, inner: int) -> int:
    """Heads where none are given: those of the releases where the attention is as wide as the
    block, else diffusers'.
    """
    if inner == width:
        rule = HEAD_RULES.get(shape.family)
        return rule.of(width) if rule else 0
    candidates = (DIFFUSERS_HEADS[min(level, len(DIFFUSERS_HEADS) - 1)], *DIFFUSERS_HEADS)
    return next((heads for heads in candidates if width // heads * heads == inner), 0)


def build_config(shape: XSShape, heads: tuple[int, ...], rule: NormRule) -> ControlNetXSConfig:
    """Configuration of the network of a shape, with heads from `heads_of`."""
    blocks: list[BlockConfig] = []
    own, base, caps = shape.in_channels, 0, dict[int, int]()
    for i, (kind, level, depth) in enumerate(shape.layout.kinds):
        in_ch, out_ch = own + base, shape.widths[i]
        groups, transformer = (1, 1), None
        if kind == RES:
            cap = caps.setdefault(level, divisor(in_ch)) if rule.capped_by_level else MAX_GROUPS
            groups = (divisor(in_ch, cap), divisor(out_ch, cap))
            transformer = _transformer(shape, depth, heads[i], i, groups[1])
        own, base = out_ch, shape.base_widths[i]
        blocks.append(
            BlockConfig(kind=kind, in_ch=in_ch, out_ch=out_ch, base_ch=base, groups=groups, transformer=transformer)
        )
    return ControlNetXSConfig(
        encoder=tuple(blocks),
        middle=_middle(shape, own, base, heads[-1], rule),
        decoder=shape.decoder_widths,
        hint=shape.hint,
        context_dim=shape.context_dim,
        time_dim=shape.time_dim,
        own_time=shape.time_in if shape.layout.own_time else None,
        adds_in_encoder=shape.layout.adds_in_encoder,
    )


def _transformer(shape: XSShape, depth: int, heads: int, block: int, groups: int) -> TransformerConfig | None:
    if depth == 0:
        return None
    return TransformerConfig(depth=depth, heads=heads, inner=shape.inner[block], groups=groups, linear=shape.linear)


def _middle(shape: XSShape, own: int, base: int, heads: int, rule: NormRule) -> tuple[BlockConfig, ...]:
    before, after = divisor(own + base), divisor(own)
    if rule.middle_common:
        before = after = divisor(math.gcd(own, own + base))
    transformer = _transformer(shape, shape.layout.middle_depth, heads, len(shape.widths), after)

    def half(in_ch: int, groups: int, transformer: TransformerConfig | None) -> BlockConfig:
        return BlockConfig(
            kind=RES,
            in_ch=in_ch,
            out_ch=own,
            base_ch=base,
            groups=(groups, after),
            eps=rule.middle_eps,
            transformer=transformer,
        )

    return half(own + base, before, transformer), half(own, after, None)


def base_widths_of(unet_config: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels after each encoder block and entering each decoder block of a base, from the host's `unet_config`."""
    first, mults, resnets = unet_config["model_channels"], unet_config["channel_mult"], unet_config["num_res_blocks"]
    encoder: list[int] = [first]
    leaving: list[int] = []
    for level, (mult, number) in enumerate(zip(mults, resnets, strict=True)):
        encoder += [first * mult] * (number + (level + 1 < len(mults)))
        leaving = [first * mult] * (number + 1) + leaving
    return tuple(encoder), (encoder[-1], *leaving[:-1])


def design(
    unet_config: Mapping[str, Any], ratio: float = 0.1, own_time: bool = False, widths: tuple[int, ...] | None = None
) -> XSShape:
    """Shape of a ControlNet-XS for a base: its blocks and depths, `ratio` of its widths (or
    `widths`, one per level).
    """
    depths, levels = iter(unet_config["transformer_depth"]), []
    for number in unet_config["num_res_blocks"]:
        levels.append(tuple(next(depths) for _ in range(number)))
    layout = XSLayout(
        levels=tuple(levels),
        middle_depth=max(1, unet_config["transformer_depth_middle"]),
        own_time=own_time,
    )
    first = unet_config["model_channels"]
    wanted = widths or tuple(max(1, round(first * mult * ratio)) for mult in unet_config["channel_mult"])
    own = (wanted[0], *(wanted[level] for _, level, _ in layout.kinds[1:]))
    encoder, decoder = base_widths_of(unet_config)
    return XSShape(
        layout=layout,
        widths=own,
        base_widths=encoder,
        decoder_widths=decoder,
        inner=(*(w if depth else 0 for w, (_, _, depth) in zip(own, layout.kinds, strict=True)), own[-1]),
        context_dim=unet_config["context_dim"],
        time_dim=4 * first,
        time_in=first,
        linear=bool(unet_config.get("use_linear_in_transformer")),
        hint=(*HINT_WIDTHS, own[0]),
    )
