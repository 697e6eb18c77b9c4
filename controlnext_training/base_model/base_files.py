"""Loading of a base model from files, for runs without a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import torch

from ...controlnext_core import checkpoint
from ..config import ConfigError, TrainConfig
from .encode import BaseWithEncoders, device_of_host

PARTS = ("model", "clip", "vae", "vision")
"""Parts of a checkpoint, in the order in which the host's loader returns them."""
UNET_PREFIX = "model.diffusion_model."
HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}


def load_base(config: TrainConfig, folder: Path) -> BaseWithEncoders:
    """The checkpoint that `config.base` names: a path (from `folder` on), or a name in the host's folders.

    Of a safetensors file the encoders can be released and read again. Raises ConfigError naming the key and what was
    looked for, CheckpointError for a damaged file.
    """
    path = _find("base", config.base, "checkpoints", folder)
    own_vae = _find("vae", config.vae, "vae", folder) if config.vae else None
    header = checkpoint.peek(path) if path.suffix == ".safetensors" else None  # names a damaged file in words
    on_cpu = device_of_host().type == "cpu"
    halves = half_dtype(header) if header is not None and config.checkpointing and on_cpu else None

    @torch.inference_mode()
    def read(*wanted: str) -> tuple[Any, ...]:
        """(model, clip, vae, vision) of the checkpoint; None for a part that is not wanted."""
        try:
            return comfy.sd.load_checkpoint_guess_config(
                str(path),
                output_model="model" in wanted,
                output_clip="clip" in wanted,
                output_vae="vae" in wanted,
                output_clipvision="vision" in wanted,
                model_options={"dtype": halves} if halves else {},
            )
        except RuntimeError as error:
            raise ConfigError(f"base: {path} is no checkpoint that ComfyUI knows. Choose another.") from error

    @torch.inference_mode()
    def encoder(name: str) -> Any:
        if name == "vae" and own_vae is not None:
            state, metadata = comfy.utils.load_torch_file(str(own_vae), safe_load=True, return_metadata=True)
            return comfy.sd.VAE(sd=state, metadata=metadata)
        return read(name)[PARTS.index(name)]

    model, clip, vae, vision = read(*PARTS if own_vae is None else ("model", "clip", "vision"))
    if own_vae is not None:
        vae = encoder("vae")
    return BaseWithEncoders(model, vae, clip, vision, encoder if header is not None else None)


def half_dtype(header: checkpoint.Header) -> torch.dtype | None:
    """fp16 or bf16 where all weights of a file's UNet have it, else None. The host would widen them on a CPU.

    The numbers are the same; with checkpointing the trainer widens each where it is used.
    """
    found = {dtype for name, dtype in header.dtypes.items() if name.startswith(UNET_PREFIX)}
    return HALVES.get(found.pop()) if len(found) == 1 else None


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
    """The first folder that the loader nodes search."""
    return Path(folder_paths.get_folder_paths("controlnext")[0])


def runs_folder() -> Path:
    """The default folder of states and logs."""
    return Path(folder_paths.get_output_directory()) / "controlnext_training"
