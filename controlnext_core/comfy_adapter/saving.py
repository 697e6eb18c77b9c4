"""Save a control, with the UNet weights that our loaders put on a MODEL, as a file that our loader reads."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..control_files import DTYPES, check_layout, write_control
from ..metadata import PREFIX
from ..unet_weights import published_names
from .bases.table import loaded_base
from .control import ControlNeXtControl
from .weights import applied_weights


def save_control(control: ControlNeXtControl, model: ModelPatcher | None, prefix: str, layout: str, dtype: str) -> Path:
    """Write the control under the host's output folder and re-open it. Returns the path of the encoder's file.

    prefix: as in the stock save nodes, may hold sub-folders; layout: `single` (one file, bundled) or `published`
    (a folder with controlnet.safetensors and unet.safetensors, the authors' names). Raises CheckpointError.
    """
    check_layout(layout)
    weights = _differences(model) if model is not None else {}
    facts = {f"{PREFIX}sources": f"encoder: {control.name}"}
    encoder = control.net.patcher.model.state_dict()
    return write_control(free_stem(prefix), encoder, weights, control.net.spec, layout, DTYPES[dtype], facts)


def free_stem(prefix: str) -> Path:
    """A path below the host's output folder, without suffix, where no file or folder is yet."""
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    while True:
        stem = Path(folder) / f"{name}_{counter:05}_"
        if not stem.exists() and not stem.with_name(f"{stem.name}.safetensors").exists():
            return stem
        counter += 1


def _differences(model: ModelPatcher) -> dict[str, Tensor]:
    """The sum of what our loaders put on this MODEL at their strengths, published names."""
    total: dict[str, Tensor] = {}
    for applied in applied_weights(model):
        for name, difference in applied.differences.items():
            part = difference.float() * applied.strength
            total[name] = total[name] + part if name in total else part
    return published_names(total, loaded_base(model.model).key_map()) if total else {}
