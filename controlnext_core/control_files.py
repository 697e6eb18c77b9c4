"""The files of a ControlNeXt as we write them: one that holds everything, or two with the authors' names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint
from .detection import BUNDLE_ENCODER, BUNDLE_WEIGHTS
from .metadata import write_metadata
from .specs import SPECS, Spec
from .unet_weights import WeightsKind

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = ("single", "published")
PUBLISHED_FILES = ("controlnet.safetensors", "unet.safetensors")


def check_layout(layout: str) -> None:
    """Raise ValueError for a layout that a ControlNeXt does not have."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: {layout} is for ControlNet-XS. Choose {' or '.join(LAYOUTS)} for a ControlNeXt.")


def write_control(
    stem: Path,
    encoder: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    spec: Spec,
    layout: str,
    dtype: torch.dtype,
    facts: Mapping[str, str],
) -> Path:
    """Write an encoder with its UNet differences (published names; may be empty); the path of the encoder's file.

    stem: the path without suffix; layout: `single` (one file, bundled) or `published` (a folder); spec: as trained;
    facts: further metadata, whole keys. Raises CheckpointError, ValueError for another layout.
    """
    check_layout(layout)
    encoder = {name: t.detach().to("cpu", dtype) for name, t in encoder.items()}
    weights = {name: t.detach().to("cpu", dtype) for name, t in weights.items()}
    kind = WeightsKind.DIFFERENCE.value
    if layout == "published":
        if weights:
            checkpoint.save(stem / PUBLISHED_FILES[1], weights, {"controlnext.weights_kind": kind, "format": "pt"})
        beside = PUBLISHED_FILES[1] if weights else None
        return checkpoint.save(stem / PUBLISHED_FILES[0], encoder, _metadata(spec, None, beside, facts))
    tensors = {BUNDLE_ENCODER + name: t for name, t in encoder.items()} if weights else dict(encoder)
    tensors |= {BUNDLE_WEIGHTS + name: t for name, t in weights.items()}
    path = stem.with_name(stem.name + ".safetensors")
    return checkpoint.save(path, tensors, _metadata(spec, kind if weights else None, None, facts))


def _metadata(spec: Spec, kind: str | None, weights_file: str | None, facts: Mapping[str, str]) -> dict[str, str]:
    factor = spec.fusion.gain.factor
    trained = factor if factor != SPECS[spec.name].fusion.gain.factor else None
    return {
        **write_metadata(spec, spec.title, gain=trained, weights_kind=kind, weights_file=weights_file),
        **facts,
    }
