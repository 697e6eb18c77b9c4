"""Conversion of ControlNet-XS files between the two formats; the metadata holds the facts that shapes do not give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import checkpoint
from .families import FAMILIES
from .specs import Family
from .xs_detection import HEADS_KEY, NORM_KEY, read_xs_file
from .xs_key_maps import DIFFUSERS, OFFICIAL, from_ours
from .xs_specs import MAX_GROUPS, XSShape, heads_of

LAYOUTS = {"xs_official": OFFICIAL, "xs_diffusers": DIFFUSERS}
"""Names of layouts in nodes and commands -> formats."""

CONFIG_FILE = "config.json"
ADAPTER_RESNETS = 2
"""Number of residual blocks per level of diffusers' adapter."""


def convert(source: Path, target: Path, layout: str, num_heads: str = "", norm_rule: str = "auto") -> Path:
    """Write the ControlNet-XS file `source` with the names of `layout` (a key of LAYOUTS). Returns the new path.

    Raises CheckpointError, DetectionError where `source` is not a ControlNet-XS, ValueError for an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: '{layout}' is unknown. Choose one of {', '.join(LAYOUTS)}.")
    file = read_xs_file(checkpoint.peek(source))
    heads, rule = file.heads(num_heads), file.norm_rule(norm_rule)
    found = checkpoint.load(source, file.names.values())
    tensors = {ours: found[stored] for ours, stored in file.names.items()}
    return write(target, tensors, file.shape, heads, rule.name, layout)


def write(
    target: Path,
    tensors: Mapping[str, Tensor],
    shape: XSShape,
    heads: tuple[int, ...],
    norm_rule: str,
    layout: str,
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Save tensors (this pack's names) as a ControlNet-XS file; beside an adapter its config.json, where diffusers has
    one.

    facts: further metadata with complete keys.
    """
    format = LAYOUTS[layout]
    names = from_ours(tensors, shape.layout, format)
    metadata = {**_metadata(shape, heads, norm_rule), **(facts or {})}
    path = checkpoint.save(target, {names[ours]: tensor for ours, tensor in tensors.items()}, metadata)
    config = adapter_config(shape, heads) if format == DIFFUSERS else None
    if config is not None:
        path.with_name(CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return path


def heads_by_level(shape: XSShape, heads: tuple[int, ...]) -> tuple[int, ...]:
    """Attention heads per level, in the form of `parse_heads`; 1 for a level without attention, the last is the
    middle's.
    """
    found = {level: number for (_, level, _), number in zip(shape.layout.kinds, heads, strict=False) if number}
    found[len(shape.layout.levels) - 1] = heads[-1]
    levels = tuple(found.get(level, 1) for level in range(len(shape.layout.levels)))
    assert heads_of(shape, levels, "") == heads, "heads differ inside a level"
    return levels


def _metadata(shape: XSShape, heads: tuple[int, ...], norm_rule: str) -> dict[str, str]:
    base = FAMILIES[shape.family].architecture if shape.family in FAMILIES else "unknown"
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base}/controlnet-xs",
        "modelspec.implementation": "https://github.com/vislearn/ControlNet-XS",
        "modelspec.title": f"ControlNet-XS {shape.family.value}",
        "format": "pt",
        NORM_KEY: norm_rule,
        HEADS_KEY: ",".join(map(str, heads_by_level(shape, heads))),
    }


def adapter_config(shape: XSShape, heads: tuple[int, ...]) -> dict[str, Any] | None:
    """Content of the config.json of diffusers' ControlNetXSAdapter; None for a layout that it does not have."""
    levels = shape.layout.levels
    uniform = all(len(depths) == ADAPTER_RESNETS and len(set(depths)) == 1 for depths in levels)
    same_middle = levels[-1][0] in (0, shape.layout.middle_depth)  # diffusers has one number for both
    if not (uniform and same_middle and shape.layout.adds_in_encoder):
        return None
    depths = [max(1, level[0]) for level in levels[:-1]] + [shape.layout.middle_depth]
    base = [0] * len(levels)
    for (_, level, _), width in zip(shape.layout.kinds, shape.base_widths, strict=True):
        base[level] = width
    return {
        "_class_name": "ControlNetXSAdapter",
        "base_block_out_channels": base,
        "block_out_channels": list(shape.level_widths),
        "conditioning_channel_order": "rgb",
        "conditioning_channels": shape.hint[0],
        "conditioning_embedding_out_channels": [shape.hint[1], *shape.hint[3:-1:2]],
        "cross_attention_dim": shape.context_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if level[0] else "DownBlock2D" for level in levels],
        "learn_time_embedding": shape.layout.own_time,
        "max_norm_num_groups": MAX_GROUPS,
        "num_attention_heads": list(heads_by_level(shape, heads)),
        "sample_size": 128 if shape.family is Family.SDXL else 64,
        "time_embedding_mix": 1.0,
        "transformer_layers_per_block": depths,
        "upcast_attention": False,
        "use_linear_projection": shape.linear,
    }
