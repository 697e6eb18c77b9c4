"""ControlNeXt files as this pack writes them: one bundled file, or two with the authors' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .detection import BUNDLE_BASE, BUNDLE_ENCODER, BUNDLE_WEIGHTS
from .low_rank import LOW_RANK, Differences, LowRank, as_lora, written
from .metadata import write_metadata
from .specs import SPECS, Spec
from .unet_weights import WeightsKind

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = ("single", "published", "lora")
PUBLISHED_FILES = ("controlnet.safetensors", "unet.safetensors")
LORA_FILE = "lora.safetensors"


def check_layout(layout: str, spec: Spec) -> None:
    """Raise ValueError for a layout that a ControlNeXt does not have."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: {layout} is for ControlNet-XS. Choose {' or '.join(LAYOUTS)} for a ControlNeXt.")
    if layout == "published" and spec.on_transformer:
        raise ValueError(
            f"layout: published is what the authors' scripts read, and they have none for {spec.family.value}. Choose "
            "single, or lora for the differences as other programs read them."
        )


def write_control(
    stem: Path,
    encoder: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    spec: Spec,
    layout: str,
    dtype: torch.dtype,
    facts: Mapping[str, str],
) -> Path:
    """Write an encoder with its UNet differences (published names; may be empty); returns the path of the encoder's
    file.

    stem: the path without suffix; layout: `single` (one file, bundled) or `published` (a folder); spec: as trained;
    facts: further metadata with complete keys. Raises CheckpointError, ValueError for another layout.
    """
    check_layout(layout, spec)
    if layout == "lora":
        raise ValueError("layout: lora needs the model that the control's weights are on. Connect its MODEL to model.")
    encoder, weights = _as(dtype, encoder), _as(dtype, weights)
    kind = WeightsKind.DIFFERENCE.value
    if layout == "published":
        if weights:
            checkpoint.save(stem / PUBLISHED_FILES[1], weights, {"controlnext.weights_kind": kind, "format": "pt"})
        beside = PUBLISHED_FILES[1] if weights else None
        return checkpoint.save(stem / PUBLISHED_FILES[0], encoder, _metadata(spec, facts, weights_file=beside))
    metadata = _metadata(spec, facts, weights_kind=kind if weights else None)
    return checkpoint.save(_single(stem), _bundled(encoder, weights, BUNDLE_WEIGHTS), metadata)


def write_host_control(
    stem: Path,
    encoder: Mapping[str, Tensor],
    differences: Differences,
    spec: Spec,
    layout: str,
    dtype: torch.dtype,
    facts: Mapping[str, str],
    shape_of: Callable[[str], torch.Size | None],
) -> Path:
    """Write an encoder with differences under the host's names, full or low-rank; returns the path of the encoder's
    file.

    layout: `single` (one file), or `lora` (a folder: the encoder, and the differences in the host's LoRA form);
    shape_of: shape of a weight of the base by its host name. Otherwise as `write_control`.
    """
    check_layout(layout, spec)
    if layout == "published":
        raise ValueError(
            "layout: published holds whole weights under published names; the model has low-rank differences, or of "
            "slices. Choose single or lora."
        )
    encoder = _as(dtype, encoder)
    ranks = [difference.rank for difference in differences.values() if isinstance(difference, LowRank)]
    kind = (LOW_RANK if ranks else WeightsKind.DIFFERENCE.value) if differences else None
    rank = max(ranks, default=None)
    if layout == "lora":
        if differences:
            checkpoint.save(stem / LORA_FILE, _as(dtype, as_lora(differences, shape_of)), {"format": "pt"})
        beside = LORA_FILE if differences else None
        metadata = _metadata(spec, facts, weights_kind=kind, weights_file=beside, rank=rank)
        return checkpoint.save(stem / PUBLISHED_FILES[0], encoder, metadata)
    tensors, slices = written(differences)
    metadata = _metadata(spec, facts, weights_kind=kind, rank=rank, slices=slices)
    return checkpoint.save(_single(stem), _bundled(encoder, _as(dtype, tensors), BUNDLE_BASE), metadata)


def _as(dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().to("cpu", dtype) for name, t in tensors.items()}


def _single(stem: Path) -> Path:
    return stem.with_name(stem.name + ".safetensors")


def _bundled(encoder: Mapping[str, Tensor], weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    tensors = {BUNDLE_ENCODER + name: t for name, t in encoder.items()} if weights else dict(encoder)
    return tensors | {prefix + name: t for name, t in weights.items()}


def _metadata(spec: Spec, facts: Mapping[str, str], **values: Any) -> dict[str, str]:
    factor = spec.fusion.gain.factor
    trained = factor if factor != SPECS[spec.name].fusion.gain.factor else None
    return {**write_metadata(spec, spec.title, gain=trained, **values), **facts}
