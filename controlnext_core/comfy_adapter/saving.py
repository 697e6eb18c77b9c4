"""Save a control, with the UNet weights that our loaders put on a MODEL, as a file that our loader reads."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .. import checkpoint
from ..detection import BUNDLE_ENCODER, BUNDLE_WEIGHTS
from ..key_maps import unet_key_map
from ..metadata import write_metadata
from ..specs import SPECS
from ..unet_weights import WeightsKind, published_names
from .base_facts import base_facts
from .control import ControlNeXtControl
from .weights import applied_weights

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = ("single", "published")
PUBLISHED_FILES = ("controlnet.safetensors", "unet.safetensors")


def save_control(control: ControlNeXtControl, model: ModelPatcher | None, prefix: str, layout: str, dtype: str) -> Path:
    """Write the control under the host's output folder and re-open it. Returns the path of the encoder's file.

    prefix: as in the stock save nodes, may hold sub-folders; layout: `single` (one file, bundled) or `published`
    (a folder with controlnet.safetensors and unet.safetensors, the authors' names). Raises CheckpointError.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: {layout} is for ControlNet-XS. Choose {' or '.join(LAYOUTS)} for a ControlNeXt.")
    kept = DTYPES[dtype]
    encoder = {name: t.to("cpu", kept) for name, t in control.net.patcher.model.state_dict().items()}
    weights = {name: t.to(kept) for name, t in _differences(model).items()} if model is not None else {}
    stem = free_stem(prefix)
    if layout == "published":
        metadata = _metadata(control, None, PUBLISHED_FILES[1] if weights else None)
        if weights:
            kind = {"controlnext.weights_kind": WeightsKind.DIFFERENCE.value, "format": "pt"}
            checkpoint.save(stem / PUBLISHED_FILES[1], weights, kind)
        return checkpoint.save(stem / PUBLISHED_FILES[0], encoder, metadata)
    tensors = {BUNDLE_ENCODER + name: t for name, t in encoder.items()} if weights else encoder
    tensors |= {BUNDLE_WEIGHTS + name: t for name, t in weights.items()}
    kind_name = WeightsKind.DIFFERENCE.value if weights else None
    return checkpoint.save(stem.with_suffix(".safetensors"), tensors, _metadata(control, kind_name, None))


def free_stem(prefix: str) -> Path:
    """A path below the host's output folder, without suffix, where no file or folder is yet."""
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    stem = Path(folder) / f"{name}_{counter:05}_"
    while stem.exists() or stem.with_suffix(".safetensors").exists():
        counter += 1
        stem = Path(folder) / f"{name}_{counter:05}_"
    return stem


def _metadata(control: ControlNeXtControl, kind: str | None, weights_file: str | None) -> dict[str, str]:
    spec = control.net.spec
    factor = spec.fusion.gain.factor
    trained = factor if factor != SPECS[spec.name].fusion.gain.factor else None
    return write_metadata(
        spec,
        spec.title,
        gain=trained,
        weights_kind=kind,
        weights_file=weights_file,
        sources={"encoder": control.name},
    )


def _differences(model: ModelPatcher) -> dict[str, Tensor]:
    """The sum of what our loaders put on this MODEL at their strengths, published names."""
    total: dict[str, Tensor] = {}
    for applied in applied_weights(model):
        for name, difference in applied.differences.items():
            part = difference.float() * applied.strength
            total[name] = total[name] + part if name in total else part
    return published_names(total, unet_key_map(base_facts(model.model).unet_config)) if total else {}
