"""Whole UNets from files, under published or host names, as a MODEL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .. import checkpoint
from ..checkpoint import CheckpointError
from ..key_maps import resolve_names, strip_prefix, unet_key_map
from ..published_unets import unet_config_of
from .files import FOLDER

UNET_FOLDERS = (FOLDER, "diffusion_models")
WEIGHT_DTYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}
"""As in the stock UNet loader."""


def unet_names() -> list[str]:
    """Weight files of the folders that may hold UNets."""
    return list(dict.fromkeys(name for folder in UNET_FOLDERS for name in folder_paths.get_filename_list(folder)))


def unet_path(name: str) -> Path:
    """The file behind a widget's name. Raises CheckpointError where it is gone."""
    for folder in UNET_FOLDERS:
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return Path(path)
    raise CheckpointError(f"{name}: no such file in {' or '.join(UNET_FOLDERS)}. Press R in ComfyUI, choose again.")


def load_unet(path: Path, weight_dtype: str = "default") -> ModelPatcher:
    """A whole UNet as a MODEL; no second copy of it is held. Raises CheckpointError."""
    tensors = _host_names(checkpoint.load(path), str(path))
    model = comfy.sd.load_diffusion_model_state_dict(tensors, model_options=dict(WEIGHT_DTYPES[weight_dtype]))
    if model is None:
        raise CheckpointError(
            f"{path}: the host does not know this UNet. Choose the UNet of an SD1.5, SDXL or SVD release, or load the "
            "file with the stock Load Diffusion Model node."
        )
    return model


def _host_names(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The same tensors under the host's names, every one of a UNet's."""
    bare = {name: stored for stored, name in strip_prefix(tensors).items()}
    if "input_blocks.0.0.weight" in bare:
        return {name: tensors[stored] for name, stored in bare.items()}
    key_map = unet_key_map(unet_config_of({name: tuple(tensors[s].shape) for name, s in bare.items()}, source))
    targets = resolve_names(bare, key_map, source)
    missing = sorted(key_map.keys() - bare.keys())
    if missing:
        raise CheckpointError(
            f"{source}: {checkpoint.listed('missing', missing)}. The UNet is not whole: get it again."
        )
    return {targets[name].name: tensors[stored] for name, stored in bare.items()}
