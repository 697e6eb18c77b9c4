"""The shape of a published (diffusers) UNet, read from its names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .checkpoint import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


def unet_config_of(shapes: Shapes, source: str) -> dict[str, Any]:
    """The host's `unet_config` of a whole UNet with published names, as far as names depend on it.

    Raises CheckpointError for a file that holds a part of a UNet only, or none.
    """
    if "conv_in.weight" not in shapes or "conv_out.weight" not in shapes:
        raise CheckpointError(
            f"{source}: does not hold a whole UNet ({len(shapes)} tensors, no conv_in or conv_out). Weights that go on "
            "a loaded model are chosen as weights_name in Load ControlNeXt."
        )
    levels = _count(shapes, r"down_blocks\.(\d+)\.")
    resnets = [_count(shapes, rf"down_blocks\.{i}\.resnets\.(\d+)\.") for i in range(levels)]
    down = [_depth(shapes, f"down_blocks.{i}.attentions.{r}") for i in range(levels) for r in range(resnets[i])]
    up = [
        _depth(shapes, f"up_blocks.{i}.attentions.{r}")
        for i in range(_count(shapes, r"up_blocks\.(\d+)\."))
        for r in range(_count(shapes, rf"up_blocks\.{i}\.resnets\.(\d+)\."))
    ]
    temporal = any("temporal_res_block" in name for name in shapes)
    labels = shapes.get("add_embedding.linear_1.weight")
    return {
        "channel_mult": [_width(shapes, i, source) // shapes["conv_in.weight"][0] for i in range(levels)],
        "num_res_blocks": resnets,
        "transformer_depth": down,
        "transformer_depth_output": up[::-1],
        "transformer_depth_middle": _middle_depth(shapes),
        "adm_in_channels": labels[1] if labels else None,
        "use_temporal_resblock": temporal,
        "use_temporal_attention": temporal,
        "disable_temporal_crossattention": not any("temporal_transformer_blocks.0.attn2" in name for name in shapes),
    }


def _count(names: Iterable[str], pattern: str) -> int:
    """How many numbers the pattern's group takes, at the start of a name."""
    matches = (re.match(pattern, name) for name in names)
    return len({match.group(1) for match in matches if match})


def _depth(shapes: Shapes, attention: str) -> int:
    return _count(shapes, rf"{re.escape(attention)}\.transformer_blocks\.(\d+)\.")


def _middle_depth(shapes: Shapes) -> int:
    resnets = _count(shapes, r"mid_block\.resnets\.(\d+)\.")
    return _depth(shapes, "mid_block.attentions.0") if resnets > 1 else resnets - 2


def _width(shapes: Shapes, level: int, source: str) -> int:
    """Output channels of a level's first resnet."""
    for inner in ("", "spatial_res_block."):
        found = shapes.get(f"down_blocks.{level}.resnets.0.{inner}conv1.weight")
        if found:
            return found[0]
    raise CheckpointError(
        f"{source}: down_blocks.{level}.resnets.0.conv1.weight is missing: the UNet is not whole. Get it again."
    )
