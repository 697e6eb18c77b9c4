"""Names of ControlNet-XS weights in three formats: this pack's, the released and diffusers' adapter, one row per layer.

The three name the same tensors; a map between any two is a bijection. A model that diffusers saved together with its
base is reduced to an adapter by renaming.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..models.controlnet_xs import CONV, DOWN, HINT_CONVS
from .key_maps import RESNET, SHORTCUT
from .xs_specs import XSLayout

OFFICIAL, DIFFUSERS = "official", "diffusers"
FORMATS = (OFFICIAL, DIFFUSERS)

OFFICIAL_LEAVES = {**RESNET, **SHORTCUT}
"""Layers of a residual block: this pack's names, which are diffusers' -> released names."""
OUR_LEAVES = {released: ours for ours, released in OFFICIAL_LEAVES.items()}

FUSED_PARTS = {
    "ctrl_conv_in": "conv_in",
    "ctrl_time_embedding": "time_embedding",
    "ctrl_resnets": "resnets",
    "ctrl_attentions": "attentions",
    "ctrl_downsamplers": "downsamplers",
    "ctrl_midblock": "midblock",
}
"""Control's parts of a fused model -> their names in an adapter."""
FUSED_SHARED = ("controlnet_cond_embedding", "control_to_base_for_conv_in", "base_to_ctrl", "ctrl_to_base")
"""Parts with the same name in a fused model and an adapter."""


@dataclass(frozen=True, slots=True)
class LayerNames:
    """Names of one layer, or of one block whose inner names agree except for the leaves of residual blocks."""

    ours: str
    official: str
    diffusers: str
    residual: bool = False

    def name(self, format: str) -> str:
        return self.official if format == OFFICIAL else self.diffusers


def rows(layout: XSLayout) -> Iterator[LayerNames]:
    """Rows of a network with these blocks."""
    yield from _ends(layout)
    starts = _level_starts(layout)
    for i, (kind, level, depth) in enumerate(layout.kinds):
        ours, official, place = f"encoder.{i}", f"control_model.input_blocks.{i}", i - starts[level]
        down = f"down_blocks.{level}"
        if kind == CONV:
            yield LayerNames(f"{ours}.conv", f"{official}.0", "conv_in")
            continue
        if kind == DOWN:
            yield LayerNames(f"{ours}.down.conv", f"{official}.0.op", f"{down}.downsamplers.conv")
        else:
            yield LayerNames(f"{ours}.res", f"{official}.0", f"{down}.resnets.{place}", residual=True)
        if depth:
            yield LayerNames(f"{ours}.transformer", f"{official}.1", f"{down}.attentions.{place}")
        # diffusers numbers an exchange by the block that receives it, the release by the block that sends it
        yield LayerNames(f"base_to_control.{i - 1}", f"enc_zero_convs_in.{i - 1}.0", f"{down}.base_to_ctrl.{place}")
        if layout.adds_in_encoder:
            yield LayerNames(f"control_to_base.{i}", f"enc_zero_convs_out.{i}.0", f"{down}.ctrl_to_base.{place}")
    decoder = 0
    for up, depths in enumerate(reversed(layout.levels)):
        for place in range(len(depths) + 1):
            released = f"dec_zero_convs_out.{decoder}.0"
            yield LayerNames(f"decoder_to_base.{decoder}", released, f"up_connections.{up}.ctrl_to_base.{place}")
            decoder += 1


def _ends(layout: XSLayout) -> Iterator[LayerNames]:
    if layout.own_time:
        yield LayerNames("time_embedding.linear_1", "control_model.time_embed.0", "time_embedding.linear_1")
        yield LayerNames("time_embedding.linear_2", "control_model.time_embed.2", "time_embedding.linear_2")
    for k in range(HINT_CONVS):
        place = {0: "conv_in", HINT_CONVS - 1: "conv_out"}.get(k, f"blocks.{k - 1}")
        yield LayerNames(f"hint_encoder.{k}", f"input_hint_block.{2 * k}", f"controlnet_cond_embedding.{place}")
    if layout.adds_in_encoder:
        yield LayerNames("control_to_base.0", "enc_zero_convs_out.0.0", "control_to_base_for_conv_in")
    last = len(layout.kinds) - 1
    yield LayerNames(f"base_to_control.{last}", f"enc_zero_convs_in.{last}.0", "mid_block.base_to_ctrl")
    middle = "control_model.middle_block"
    yield LayerNames("middle.0.res", f"{middle}.0", "mid_block.midblock.resnets.0", residual=True)
    yield LayerNames("middle.0.transformer", f"{middle}.1", "mid_block.midblock.attentions.0")
    yield LayerNames("middle.1.res", f"{middle}.2", "mid_block.midblock.resnets.1", residual=True)
    yield LayerNames("middle_to_base", "middle_block_out.0", "mid_block.ctrl_to_base")


def _level_starts(layout: XSLayout) -> list[int]:
    """Index of the first encoder block of each level."""
    starts: dict[int, int] = {}
    for i, (kind, level, _) in enumerate(layout.kinds):
        if kind != CONV:
            starts.setdefault(level, i)
    return [starts.get(level, 0) for level in range(len(layout.levels))]


def to_ours(names: Iterable[str], layout: XSLayout, format: str) -> dict[str, str]:
    """This pack's name -> given name, for every given name of this format; other names are left out."""
    by_name = {row.name(format): row for row in rows(layout)}
    return {ours: name for name in names if (ours := _ours(name, by_name, format)) is not None}


def _ours(name: str, by_name: Mapping[str, LayerNames], format: str) -> str | None:
    found = _split(name, by_name)
    if found is None:
        return None
    row, leaf = found
    if row.residual and format == OFFICIAL:
        layer, _, kind = leaf.rpartition(".")
        if layer not in OUR_LEAVES:
            return None
        leaf = f"{OUR_LEAVES[layer]}.{kind}"
    return f"{row.ours}.{leaf}"


def from_ours(names: Iterable[str], layout: XSLayout, format: str) -> dict[str, str]:
    """This pack's name -> name in this format, for every given name of this pack.

    Raises KeyError for an unknown name.
    """
    by_name = {row.ours: row for row in rows(layout)}
    result = {}
    for name in names:
        found = _split(name, by_name)
        if found is None:
            raise KeyError(name)
        row, leaf = found
        if row.residual and format == OFFICIAL:
            layer, _, kind = leaf.rpartition(".")
            leaf = f"{OFFICIAL_LEAVES[layer]}.{kind}"
        result[name] = f"{row.name(format)}.{leaf}"
    return result


def _split(name: str, by_name: Mapping[str, LayerNames]) -> tuple[LayerNames, str] | None:
    """Row with the longest name that `name` begins with, and the rest of `name`."""
    head = name
    while "." in head:
        head = head.rpartition(".")[0]
        if head in by_name:
            return by_name[head], name[len(head) + 1 :]
    return None


def reduce_fused(names: Iterable[str]) -> dict[str, str]:
    """Adapter name -> name in a fused model, for the control's part of it."""
    reduced = {}
    for name in names:
        parts = name.split(".")
        if any(part in FUSED_PARTS or part in FUSED_SHARED for part in parts):
            parts = [FUSED_PARTS.get(part, part) for part in parts]
            parts[0] = "up_connections" if parts[0] == "up_blocks" else parts[0]
            reduced[".".join(parts)] = name
    return reduced
