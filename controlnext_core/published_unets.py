"""Shape of a published (diffusers) UNet, read from its names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .checkpoint import CheckpointError
from .numbers_in_names import Numbered

Shapes = Mapping[str, tuple[int, ...]]


def unet_config_of(shapes: Shapes, source: str) -> dict[str, Any]:
    """Host's `unet_config` of a whole UNet with published names, with the entries on which names depend.

    Raises CheckpointError for a file that holds only a part of a UNet, or none.
    """
    if "conv_in.weight" not in shapes or "conv_out.weight" not in shapes:
        raise CheckpointError(
            f"{source}: does not hold a whole UNet ({len(shapes)} tensors, no conv_in or conv_out). Weights that go on "
            "a loaded model are chosen as weights_name in Load ControlNeXt."
        )
    numbered = Numbered(shapes, source)
    levels = numbered.count("down_blocks")
    resnets = [numbered.count(f"down_blocks.{i}.resnets") for i in range(levels)]
    down = [_depth(numbered, f"down_blocks.{i}.attentions.{r}") for i in range(levels) for r in range(resnets[i])]
    up = [
        _depth(numbered, f"up_blocks.{i}.attentions.{r}")
        for i in range(numbered.count("up_blocks"))
        for r in range(numbered.count(f"up_blocks.{i}.resnets"))
    ]
    numbered.check_layers(sum(1 + depth for depth in (*down, *up)))
    temporal = any("temporal_res_block" in name for name in shapes)
    labels = shapes.get("add_embedding.linear_1.weight")
    return {
        "channel_mult": [_width(shapes, i, source) // shapes["conv_in.weight"][0] for i in range(levels)],
        "num_res_blocks": resnets,
        "transformer_depth": down,
        "transformer_depth_output": up[::-1],
        "transformer_depth_middle": _middle_depth(numbered),
        "adm_in_channels": labels[1] if labels else None,
        "use_temporal_resblock": temporal,
        "use_temporal_attention": temporal,
        "disable_temporal_crossattention": not any("temporal_transformer_blocks.0.attn2" in name for name in shapes),
    }


def _depth(numbered: Numbered, attention: str) -> int:
    return numbered.count(f"{attention}.transformer_blocks")


def _middle_depth(numbered: Numbered) -> int:
    resnets = numbered.count("mid_block.resnets")
    return _depth(numbered, "mid_block.attentions.0") if resnets > 1 else resnets - 2


def _width(shapes: Shapes, level: int, source: str) -> int:
    """Output channels of a level's first resnet."""
    for inner in ("", "spatial_res_block."):
        found = shapes.get(f"down_blocks.{level}.resnets.0.{inner}conv1.weight")
        if found:
            return found[0]
    raise CheckpointError(
        f"{source}: down_blocks.{level}.resnets.0.conv1.weight is missing: the UNet is incomplete. Download it again."
    )
