"""What our files say of themselves: modelspec keys for everyone, `controlnext.*` keys for us."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .checkpoint import CheckpointError, Header
from .encodable import cut
from .families import FAMILIES
from .injection import NORMALIZATIONS
from .specs import SPECS, Spec

PREFIX = "controlnext."
WEIGHTS_KINDS = ("difference", "full")


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlMetadata:
    """The `controlnext.*` keys of a file; None where a file does not say."""

    spec: str | None = None
    gain: float | None = None
    """The trained gain; takes the place of the row's constant factor."""
    normalization: str | None = None
    weights_kind: str | None = None
    weights_file: str | None = None
    """Name of the UNet weights beside the file."""
    sources: str | None = None


def read_metadata(header: Header) -> ControlMetadata:
    """Read and check the `controlnext.*` keys. Raises CheckpointError naming the key and the value."""
    found = {k.removeprefix(PREFIX): v for k, v in header.metadata.items() if k.startswith(PREFIX)}
    known = {k: found[k] for k in ControlMetadata.__dataclass_fields__ if k in found and k != "gain"}

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
    gain = None
    if "gain" in found:
        try:
            gain = float(found["gain"])
        except ValueError:
            raise refuse("gain", "a number") from None
        if not math.isfinite(gain):
            raise refuse("gain", "a finite number")
    return ControlMetadata(gain=gain, **known)


def write_metadata(
    spec: Spec,
    title: str,
    *,
    gain: float | None = None,
    weights_kind: str | None = None,
    weights_file: str | None = None,
) -> dict[str, str]:
    """The metadata of a file that holds `spec`, as safetensors wants it: strings only."""
    values = {
        "spec": spec.name,
        "normalization": spec.fusion.normalization,
        "gain": None if gain is None else repr(gain),
        "weights_kind": weights_kind,
        "weights_file": weights_file,
    }
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{FAMILIES[spec.family].architecture}/controlnext",
        "modelspec.implementation": "https://github.com/dvlab-research/ControlNeXt",
        "modelspec.title": title,
        **{PREFIX + key: value for key, value in values.items() if value is not None},
    }
