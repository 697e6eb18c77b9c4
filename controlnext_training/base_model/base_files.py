"""Loader of a base model from files, for runs without a graph."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
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
UNREADABLE = (RuntimeError, ValueError, LookupError, TypeError, EOFError, pickle.UnpicklingError)
"""Errors of the host's loader, and of torch, for bytes that are not a model."""
HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}
BYTES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def load_base(config: TrainConfig, folder: Path) -> BaseWithEncoders:
    """Load the models of `config.base`, `clip` and `vae`: paths relative to `folder`, or names in the host's folders.

    Encoders can be released and read again where the base is a safetensors file. Raises ConfigError, which names the
    key and the places searched, and CheckpointError for a damaged file.
    """
    files = _Files.of(config, folder)
    model, clip, vae, vision = files.read(*(part for part in PARTS if part not in files.apart))
    base = BaseWithEncoders(model, vae, clip, vision, files.encoder if files.header is not None else None)
    files.clip_type = base.family.clip_type
    for name in files.apart:
        setattr(base, name, files.encoder(name))
    return base


@dataclass
class _Files:
    """Files of a base and its encoders."""

    base: Path
    header: checkpoint.Header | None
    """Header of the base, if it is a safetensors file; None: a file of another kind."""
    clip: tuple[Path, ...]
    """Text encoders in separate files; (): they are in the base's file."""
    vae: Path | None
    """Autoencoder in a separate file; None: it is in the base's file."""
    options: dict[str, Any]
    """The host's options for loading the network."""
    clip_type: str = ""
    """Host's name of the family's kind of text encoders; "": that of SD1.5, and all that the host detects."""

    @classmethod
    def of(cls, config: TrainConfig, folder: Path) -> _Files:
        path = _find("base", config.base, ("checkpoints", "diffusion_models"), folder)
        refuse_other_content("base", path)
        header = checkpoint.peek(path) if path.suffix == ".safetensors" else None  # names a damaged file in words
        on_cpu = device_of_host().type == "cpu"
        own = own_dtype(header, on_cpu) if header is not None and config.checkpointing else None
        clip = tuple(_find("clip", name, ("text_encoders",), folder) for name in config.clip)
        vae = _find("vae", config.vae, ("vae",), folder) if config.vae else None
        return cls(path, header, clip, vae, {"dtype": own} if own else {})

    @property
    def apart(self) -> tuple[str, ...]:
        """Names of the encoders in separate files."""
        return (*(["clip"] if self.clip else []), *(["vae"] if self.vae else []))

    @torch.inference_mode()
    def read(self, *wanted: str) -> tuple[Any, ...]:
        """(model, clip, vae, vision) of the base's file; None for a part that is not requested, or missing."""
        try:
            if self.header is not None and not any(name.startswith(UNET_PREFIX) for name in self.header.shapes):
                model = comfy.sd.load_diffusion_model(str(self.base), model_options=self.options)
                return (model, None, None, None) if "model" in wanted else (None, None, None, None)
            model, clip, vae, vision = comfy.sd.load_checkpoint_guess_config(
                str(self.base),
                output_model="model" in wanted,
                output_clip="clip" in wanted,
                output_vae="vae" in wanted,
                output_clipvision="vision" in wanted,
                model_options=self.options,
            )
        except UNREADABLE as error:
            raise ConfigError(f"base: {self.base} is not a model that ComfyUI knows. Choose another.") from error
        return model, clip, None if getattr(vae, "first_stage_model", None) is None else vae, vision

    @torch.inference_mode()
    def encoder(self, name: str) -> Any:
        """Read an encoder, one of PARTS, from its file."""
        if name == "vae" and self.vae is not None:
            state, metadata = comfy.utils.load_torch_file(str(self.vae), safe_load=True, return_metadata=True)
            return comfy.sd.VAE(sd=state, metadata=metadata)
        if name == "clip" and self.clip:
            kind = self.clip_type or "STABLE_DIFFUSION"
            embeddings = folder_paths.get_folder_paths("embeddings")
            paths = [str(path) for path in self.clip]
            return comfy.sd.load_clip(paths, embeddings, clip_type=getattr(comfy.sd.CLIPType, kind))
        return self.read(name)[PARTS.index(name)]


STARTS: dict[bytes, str] = {
    b"\x89PNG": "is a picture (PNG)",
    b"\xff\xd8\xff": "is a picture (JPEG)",
    b"<!doctype": "is a page of the web (HTML), as a failed download leaves it",
    b"<html": "is a page of the web (HTML), as a failed download leaves it",
    b"version https://git-lfs": "is a pointer of git-lfs and not the file itself; `git lfs pull` fetches that",
}
"""First bytes of a file, in lower case where they are text -> kind of file that is sometimes mistaken for weights."""


def refuse_other_content(key: str, path: Path) -> None:
    """Raise ConfigError, which names the key, for a file that is a picture, a page or a pointer of git-lfs."""
    with open(path, "rb") as file:
        start = file.read(64).lstrip()
    for known, kind in STARTS.items():
        if start.startswith(known) or start.lower().startswith(known):
            raise ConfigError(f"{key}: {path} {kind}. Download the model again, or choose another file.")


def own_dtype(header: checkpoint.Header, on_cpu: bool) -> torch.dtype | None:
    """Dtype shared by all weights of a file's network, where the host might widen it: fp8, and on a CPU fp16 or bf16.

    None elsewhere. The values are the same; with checkpointing the trainer widens each weight when it is used.
    """
    inside = [name for name in header.dtypes if name.startswith(UNET_PREFIX)] or list(header.dtypes)
    found = {header.dtypes[name] for name in inside}
    return (BYTES | (HALVES if on_cpu else {})).get(found.pop()) if len(found) == 1 else None


def _find(key: str, name: str, kinds: tuple[str, ...], folder: Path) -> Path:
    """kinds: the host's folders to search, in this order."""
    where = " or ".join(kinds)
    if not name:
        raise ConfigError(f"{key}: is empty. Set it to a file's path, or its name in ComfyUI's {where} folder.")
    path = folder / name
    if path.is_file():
        return path
    found = [there for kind in kinds if (there := folder_paths.get_full_path(kind, name)) is not None]
    if not found:
        known = ", ".join([file for kind in kinds for file in folder_paths.get_filename_list(kind)][:5]) or "none"
        raise ConfigError(f"{key}: neither {path} nor {name} in ComfyUI's {where} folder exists (there: {known}).")
    return Path(found[0])


def control_folder() -> Path:
    """First of the folders that the loader nodes search."""
    return Path(folder_paths.get_folder_paths("controlnext")[0])


def runs_folder() -> Path:
    """Default folder of states and logs."""
    return Path(folder_paths.get_output_directory()) / "controlnext_training"
