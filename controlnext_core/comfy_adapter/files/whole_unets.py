"""Loader of whole UNets as a MODEL, from files with published or host names."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ... import checkpoint
from ...checkpoint import CheckpointError
from ...key_maps import resolve_names, strip_prefix, unet_key_map
from ...published_unets import unet_config_of
from ..bases.table import loaded_base
from . import folders

WHOLE_UNET = "controlnext_whole_unet"
"""Key of the attachment of a MODEL from `load_unet`; clones keep it."""
UNET_FOLDERS = (folders.FOLDER, "diffusion_models")
WEIGHT_DTYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}
"""Choices of dtype, the same as those of the stock UNet loader."""


def unet_names() -> list[str]:
    """Names of all weight files in the folders that may hold UNets."""
    return folders.list_names(UNET_FOLDERS)


def unet_path(name: str) -> Path:
    """Path of the file with a widget's name. Raises CheckpointError where it is missing."""
    return folders.find(name, UNET_FOLDERS)


def load_unet(path: Path, weight_dtype: str = "default", disable_dynamic: bool = False) -> ModelPatcher:
    """Load a whole UNet as a MODEL, without a second copy of its weights. Raises CheckpointError.

    disable_dynamic: True uses a plain patcher; False uses a dynamic one where the host has them. The host calls this
    function again, with True for weight hooks and with False for each further device.
    """
    tensors = _host_names(checkpoint.load(path), str(path))
    names = set(tensors)
    options = {"model_options": dict(WEIGHT_DTYPES[weight_dtype]), **_dynamic_option(disable_dynamic)}
    try:
        model = comfy.sd.load_diffusion_model_state_dict(tensors, **options)
    except (KeyError, RuntimeError) as error:  # what the host's detection and loading say of parts of a UNet
        raise CheckpointError(
            f"{path}: the host cannot load it ({str(error).strip()[:300]}). The file is damaged, or not a whole UNet: "
            "download it again."
        ) from error
    if model is None:
        raise CheckpointError(
            f"{path}: the host does not know this UNet. Choose the UNet of an SD1.5, SDXL or SVD release, or load the "
            "file with the stock Load Diffusion Model node."
        )
    _refuse_missing(model.model.diffusion_model.state_dict().keys() - names, str(path))
    model.cached_patcher_init = (load_unet, (path, weight_dtype))
    model.set_attachments(WHOLE_UNET, True)
    return model


def is_whole_unet(model: ModelPatcher) -> bool:
    """True: `load_unet` loaded this MODEL or the one that it is a clone of. False: another loader did."""
    return bool(model.get_attachment(WHOLE_UNET))


def describe_loaded(model: ModelPatcher, path: Path) -> str:
    """Report for the node, in two lines: the loaded UNet and its file."""
    dtype = str(model.model.get_dtype()).removeprefix("torch.")
    return (
        f"{path.name}: a whole UNet, {loaded_base(model.model).family.value}, {dtype}\nUNet weights: all, from {path}"
    )


def _dynamic_option(disable_dynamic: bool) -> dict[str, bool]:
    """Keyword argument `disable_dynamic` of the host's loader, where the host has it."""
    known = inspect.signature(comfy.sd.load_diffusion_model_state_dict).parameters
    return {"disable_dynamic": disable_dynamic} if "disable_dynamic" in known else {}


def _refuse_missing(names: Iterable[str], source: str) -> None:
    """Raise CheckpointError where a UNet lacks tensors."""
    if missing := sorted(names):
        raise CheckpointError(
            f"{source}: {checkpoint.listed('missing', missing)}. The UNet is not whole: download it again. Weights "
            "for a loaded model are chosen as weights_name in Load ControlNeXt."
        )


def _host_names(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Tensors under the host's names, for all tensors of a UNet."""
    bare = {name: stored for stored, name in strip_prefix(tensors, source=source).items()}
    if "input_blocks.0.0.weight" in bare:
        return {name: tensors[stored] for name, stored in bare.items()}
    key_map = unet_key_map(unet_config_of({name: tuple(tensors[s].shape) for name, s in bare.items()}, source))
    targets = resolve_names(bare, key_map, source)
    _refuse_missing(key_map.keys() - bare.keys(), source)
    return {targets[name].name: tensors[stored] for name, stored in bare.items()}
