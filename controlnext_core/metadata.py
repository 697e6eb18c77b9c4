"""Metadata of this pack's files: modelspec keys for all programs, `controlnext.*` keys for this pack."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .checkpoint import CheckpointError, Header
from .encodable import cut
from .families import FAMILIES
from .injection import NORMALIZATIONS
from .low_rank import Slice
from .specs import SPECS, Spec

PREFIX = "controlnext."
RECIPE_KEY = f"{PREFIX}recipe"
"""Settings of the run that trained a file, as JSON."""
WEIGHTS_KINDS = ("difference", "full", "low_rank")


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlMetadata:
    """Values of a file's `controlnext.*` keys; None: the file lacks the key."""

    spec: str | None = None
    gain: float | None = None
    """Trained gain; replaces the row's constant factor."""
    normalization: str | None = None
    weights_kind: str | None = None
    weights_file: str | None = None
    """Name of the UNet weights beside the file."""
    sources: str | None = None
    slices: Mapping[str, Slice] = field(default_factory=dict)
    """Host name of a weight -> the slice of it to which the file's difference applies."""


def read_metadata(header: Header) -> ControlMetadata:
    """Read and check the `controlnext.*` keys. Raises CheckpointError naming the key and the value."""
    found = {k.removeprefix(PREFIX): v for k, v in header.metadata.items() if k.startswith(PREFIX)}
    known = {k: found[k] for k in ControlMetadata.__dataclass_fields__ if k in found and k not in ("gain", "slices")}

    def refuse(key: str, allowed: str) -> CheckpointError:
        return CheckpointError(
            f"{header.path}: its metadata says {PREFIX}{key}={cut(repr(found[key]))}; {allowed} is understood. "
            "Update this node pack, or save the file again."
        )

    for key, table in (
        ("spec", SPECS),
        ("normalization", NORMALIZATIONS),
        ("weights_kind", dict.fromkeys(WEIGHTS_KINDS)),
    ):
        if key in found and found[key] not in table:
            raise refuse(key, ", ".join(table))
    if "site" in found and "spec" in found and found["site"] != (site := SPECS[found["spec"]].fusion.site.value):
        raise refuse("site", f"{site!r} for {found['spec']}")
    slices: dict[str, Slice] = {}
    if "slices" in found:
        try:
            slices = _read_slices(found["slices"])
        except (TypeError, ValueError):
            raise refuse("slices", "a JSON object of name: [dim, start, length]") from None
    gain = None
    if "gain" in found:
        try:
            gain = float(found["gain"])
        except ValueError:
            raise refuse("gain", "a number") from None
        if not math.isfinite(gain):
            raise refuse("gain", "a finite number")
    return ControlMetadata(gain=gain, slices=slices, **known)


def _read_slices(text: str) -> dict[str, Slice]:
    """Raises TypeError or ValueError for anything else than what `write_metadata` writes."""
    found = json.loads(text)
    if not isinstance(found, dict) or not all(isinstance(part, list) and len(part) == 3 for part in found.values()):
        raise ValueError(text)
    return {name: (int(dim), int(start), int(length)) for name, (dim, start, length) in found.items()}


def write_metadata(
    spec: Spec,
    title: str,
    *,
    gain: float | None = None,
    weights_kind: str | None = None,
    weights_file: str | None = None,
    rank: int | None = None,
    slices: Mapping[str, Slice] | None = None,
) -> dict[str, str]:
    """Metadata of a file that holds `spec`, in the form of safetensors: strings only.

    rank: the highest of the file's low-rank differences; slices: see `ControlMetadata`.
    """
    values = {
        "spec": spec.name,
        "normalization": spec.fusion.normalization,
        "gain": None if gain is None else repr(gain),
        "weights_kind": weights_kind,
        "weights_file": weights_file,
        "family": spec.family.value if spec.on_transformer else None,
        "site": spec.fusion.site.value if spec.on_transformer else None,
        "rank": None if rank is None else str(rank),
        "slices": json.dumps(slices) if slices else None,
    }
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{FAMILIES[spec.family].architecture}/controlnext",
        "modelspec.implementation": "https://github.com/dvlab-research/ControlNeXt",
        "modelspec.title": title,
        **{PREFIX + key: value for key, value in values.items() if value is not None},
    }
