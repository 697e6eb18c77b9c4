"""Description of a control file, the text of ControlNeXtInspect."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from ... import checkpoint
from ...detection import ControlFile, DetectionError, read_control_file
from ...encodable import cut
from ...low_rank import DOWN, UP
from ...metadata import RECIPE_KEY
from ...specs import Spec
from ...xs_detection import XSFile, is_xs, read_xs_file
from ..bases.table import BASES
from .folders import choose_weights
from .xs_loading import configured_heads, describe

MAX_KEYS = 40
"""Number of keys of a file's metadata that are shown."""
MAX_RECIPE = 16_384
"""Largest length, in characters, of a recipe that is shown with one line per setting."""


def inspect_file(path: Path) -> str:
    """Describe a control file: variant or size, base model, gain, site, its weights of the base.

    Raises CheckpointError or DetectionError for a file that is not a control, with a message that says what it is.
    """
    header = checkpoint.peek(path)
    if is_xs(header.shapes):
        return inspect_xs(read_xs_file(header))
    file = read_control_file(header)
    parameters = sum(math.prod(file.header.shapes[stored]) for stored in file.encoder.values())
    dtypes = sorted({file.header.dtypes[stored] for stored in file.encoder.values()})
    lines = [
        f"file: {path.name} ({path.stat().st_size:,} bytes)",
        f"encoder: {parameters:,} parameters in {len(file.encoder)} tensors, {', '.join(dtypes)}, "
        f"{file.out_channels} channels out",
        "can be: " + "; ".join(_describe(spec) for spec in file.candidates),
        f"{_whose(file)} weights with weights_name=auto: {choose_weights(file, 'auto').why}",
        *_differences(file),
    ]
    if len(file.candidates) > 1:
        lines.append("the connected model decides between these; `variant` overrides")
    if file.metadata.gain is not None:
        lines.append(f"trained gain: {file.metadata.gain:g}")
    lines += metadata_lines(file.header)
    return "\n".join(lines)


def _whose(file: ControlFile) -> str:
    return "base" if all(spec.on_transformer for spec in file.candidates) else "UNet"


def _differences(file: ControlFile) -> list[str]:
    """Base weights in a file with the host's names: subset, rank, parts of fused weights."""
    if not (file.weights and file.host_names):
        return []
    names = dict.fromkeys(name.removesuffix(UP).removesuffix(DOWN) for name in file.weights)
    ranks = sorted({file.header.shapes[stored][0] for name, stored in file.weights.items() if name.endswith(DOWN)})
    row = next(row for row in BASES if row.family is file.candidates[0].family)
    subset = next((kind for kind, where in row.trainable.items() if all(re.search(where, n) for n in names)), "all")
    how = f"rank {', '.join(map(str, ranks))}" if ranks else "whole differences"
    parts = f", parts of {len(file.metadata.slices)} fused ones" if file.metadata.slices else ""
    return [f"changes {len(names)} weights of {row.family.value}: subset {subset}, {how}{parts}"]


def inspect_xs(file: XSFile) -> str:
    """Describe a ControlNet-XS file: size, base, type, own time embedding, heads."""
    dtypes = sorted({file.header.dtypes[stored] for stored in file.names.values()})
    try:
        words = describe(file, file.norm_rule().name, file.heads(beside=configured_heads(file)))
    except DetectionError as error:  # a sound file whose heads only the user can know
        words = str(error)
    return "\n".join(
        [
            f"{words}",
            f"{file.header.path.stat().st_size:,} bytes, {len(file.names)} tensors, {', '.join(dtypes)}",
            *metadata_lines(file.header),
        ]
    )


def metadata_lines(header: checkpoint.Header) -> list[str]:
    """Lines of a file's metadata, one per key; long values are cut, and only the first keys are shown."""
    keys = sorted(header.metadata)
    lines = []
    for key in keys[:MAX_KEYS]:
        recipe = _recipe_lines(header.metadata[key]) if key == RECIPE_KEY else []
        lines += [f"{key}:", *recipe] if recipe else [f"{cut(key)}: {cut(header.metadata[key])}"]
    return lines + ([f"and {len(keys) - MAX_KEYS:,} keys more"] if len(keys) > MAX_KEYS else [])


def _recipe_lines(text: str) -> list[str]:
    """A line for each setting of a recipe in JSON; empty where the text is none."""
    try:
        settings = json.loads(text) if len(text) <= MAX_RECIPE else None
    except (ValueError, RecursionError):
        return []
    if not isinstance(settings, dict):
        return []
    return [f"  {cut(key)} = {cut(json.dumps(value, ensure_ascii=False))}" for key, value in settings.items()]


def _describe(spec: Spec) -> str:
    return f"{spec.name} = {spec.title}, base {spec.family.value}, added {spec.fusion.site.value}"
