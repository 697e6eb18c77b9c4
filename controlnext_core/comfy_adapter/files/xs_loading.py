"""Loader of ControlNet-XS files: from a file to a control managed by the host."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import comfy.ldm.modules.attention as host_attention
from torch import Tensor

from ....models.controlnet_xs import ControlNetXS
from ... import checkpoint
from ...xs_detection import XSFile, read_xs_file
from ...xs_key_maps import DIFFUSERS
from ...xs_specs import build_config, released_as
from ..sampling.host_layers import Fp32Norms, WholeLayers
from ..sampling.networks import into_host
from ..sampling.xs_control import ControlNetXSControl, LoadedXS

ALIGNED = 8
"""Divisor of head widths that all attention kernels of the host support; the SD2.1 release has width 4."""


@dataclass(frozen=True)
class LoadedControl:
    """Outputs of the loader node, and the text shown on it."""

    control: ControlNetXSControl
    report: str


def load_controlnet_xs(path: Path, norm_rule: str = "auto", num_heads: str = "") -> LoadedControl:
    """Load a ControlNet-XS of any known format.

    norm_rule: `auto` or a key of NORM_RULES; num_heads: per level; empty: from the file or the tables. Raises
    CheckpointError, DetectionError naming the file and what to do.
    """
    file = read_xs_file(checkpoint.peek(path))
    rule, heads = file.norm_rule(norm_rule), file.heads(num_heads, configured_heads(file))
    operations = Fp32Norms if file.shape.fp32_norms else WholeLayers
    net = ControlNetXS(build_config(file.shape, heads, rule), device="meta", operations=operations, attention=attend)
    found = checkpoint.load(path, file.names.values())
    tensors = {ours: found[stored] for ours, stored in file.names.items()}
    patcher, uid = into_host(net, tensors, f"xs:{rule.name}:{heads}", str(path))
    control = ControlNetXSControl(LoadedXS(patcher, file, rule.name, heads, uid))
    return LoadedControl(control, describe(file, rule.name, heads))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Host's attention without the patches of the base. q: (B, N, E); k, v: (B, M, E). Returns (B, N, E)."""
    aligned = (q.shape[-1] // heads) % ALIGNED == 0
    on_cpu = q.device.type == "cpu"  # where torch's is 2 to 5 times as fast as the host's choice, for narrow heads
    return (host_attention.optimized_attention if aligned and not on_cpu else host_attention.attention_pytorch)(
        q, k, v, heads
    )


def configured_heads(file: XSFile) -> str:
    """Heads in the config.json that diffusers saves beside an adapter; empty without one."""
    beside = file.header.path.with_name("config.json")
    if file.format != DIFFUSERS or not beside.is_file():
        return ""
    try:
        config = json.loads(beside.read_text("utf-8"))
        if "ControlNetXS" not in config.get("_class_name", ""):
            return ""
        heads = config.get("ctrl_num_attention_heads", config.get("num_attention_heads", ""))
    except (OSError, ValueError, AttributeError):
        return ""
    return ",".join(str(number) for number in heads) if isinstance(heads, list) else str(heads)


def describe(file: XSFile, norm_rule: str, heads: tuple[int, ...]) -> str:
    """Description of the file for the loader and for Inspect."""
    shape, release = file.shape, released_as(file.shape)
    parameters = sum(math.prod(file.header.shapes[stored]) for stored in file.names.values())
    used = [
        f"level {level} {number}x{inner // number}"
        for (_, level, _), number, inner in zip(shape.layout.kinds, heads, shape.inner, strict=False)
        if number
    ]
    used.append(f"middle {heads[-1]}x{shape.inner[-1] // heads[-1]}")
    lines = [
        f"{file.header.path.name}: ControlNet-XS for {shape.family.value}, "
        + (f"released size {release.name}" if release else "a size of its own"),
        f"{parameters:,} parameters, type {'B' if shape.layout.adds_in_encoder else 'A'}, {file.format} names, "
        f"channels {_listed(shape.level_widths)} beside the base's {_listed(dict.fromkeys(shape.base_widths))}",
        f"own time embedding: {'yes' if shape.layout.own_time else 'no'}",
        f"attention heads x width: {', '.join(dict.fromkeys(used))}",
        f"norm rule: {norm_rule}",
    ]
    return "\n".join(lines)


def _listed(numbers: Iterable[int]) -> str:
    return "-".join(map(str, numbers))
