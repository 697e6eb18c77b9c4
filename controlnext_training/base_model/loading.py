"""A base model from files, for runs without a graph."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import comfy.utils
import folder_paths
import torch

from ...controlnext_core import checkpoint
from ..config import ConfigError, TrainConfig
from .encode import Base


def load_base(config: TrainConfig, folder: Path) -> Base:
    """The checkpoint that `config.base` names: a path (from `folder` on), or a name in the host's folders.

    Raises ConfigError naming the key and what was looked for, CheckpointError for a damaged file.
    """
    path = _find("base", config.base, "checkpoints", folder)
    if path.suffix == ".safetensors":
        checkpoint.peek(path)  # a damaged file is named here, in words
    with torch.inference_mode():
        try:
            model, clip, vae, vision = comfy.sd.load_checkpoint_guess_config(
                str(path), output_vae=True, output_clip=not config.video, output_clipvision=config.video
            )
        except RuntimeError as error:
            raise ConfigError(f"base: {path} is no checkpoint that ComfyUI knows. Choose another.") from error
        if config.vae:
            state, metadata = comfy.utils.load_torch_file(
                str(_find("vae", config.vae, "vae", folder)), safe_load=True, return_metadata=True
            )
            vae = comfy.sd.VAE(sd=state, metadata=metadata)
    return Base(model, vae, clip, vision)


def _find(key: str, name: str, kind: str, folder: Path) -> Path:
    if not name:
        raise ConfigError(f"{key}: is empty. Set it to a checkpoint's path, or its name in ComfyUI's {kind} folder.")
    path = folder / name
    if path.is_file():
        return path
    found = folder_paths.get_full_path(kind, name)
    if found is None:
        known = ", ".join(folder_paths.get_filename_list(kind)[:5]) or "none"
        raise ConfigError(f"{key}: neither {path} nor {name} in ComfyUI's {kind} folder exists (there: {known}).")
    return Path(found)


def control_folder() -> Path:
    """Where the loader nodes look first."""
    return Path(folder_paths.get_folder_paths("controlnext")[0])


def runs_folder() -> Path:
    """Where runs keep their states and logs unless they say otherwise."""
    return Path(folder_paths.get_output_directory()) / "controlnext_training"
