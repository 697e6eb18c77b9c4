"""Base model with the host's encoders: pictures to latents and back, and the identity of the weights."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...controlnext_core.comfy_adapter.files.weights import base_weights, stored_names, stored_weight
from ...controlnext_core.unet_weights import HOST_PREFIX
from ..config import ConfigError
from .trained_families import TrainedFamily, family_of

SAMPLED = 64
"""Number of values of each tensor that enter an identity."""

ENCODERS = {"vae": "vae", "clip": "text", "vision": "vision"}
"""Field of a BaseWithEncoders -> name of its weights in `identity`."""
MISSING = {
    "vae": "vae: the checkpoint holds none. Connect a VAE, or set vae to a file that holds one.",
    "clip": "clip: this base needs its text encoder. Connect CLIP of the same checkpoint, or set clip to its files.",
    "vision": "clip_vision: this base needs its image encoder. Connect CLIP_VISION of the same checkpoint (SVD), "
    "or of Load CLIP Vision for Wan 2.1 (image to video, which trains in a graph and not from a recipe).",
}
"""Field -> error message where a family needs that encoder and it is missing."""


@dataclass
class BaseWithEncoders:
    """Base model of the host with its encoders."""

    model: ModelPatcher
    vae: Any
    clip: Any = None
    """Text encoder; None for SVD."""
    vision: Any = None
    """Image encoder of SVD and of Wan 2.1's image to video."""
    read_again: Callable[[str], Any] | None = None
    """Function that reloads a released encoder (`vae`, `clip`, `vision`) from its file. None: the graph owns the
    encoders, which are never released."""
    _identities: dict[str, str] = field(default_factory=dict)
    _released: set[str] = field(default_factory=set)
    _lock: Any = field(default_factory=threading.RLock, repr=False)

    @property
    def family(self) -> TrainedFamily:
        """Row of this base's family. Raises ValueError for a family that cannot be trained."""
        return family_of(self.model)

    def check(self) -> None:
        """Raise ConfigError where an encoder that this family needs is missing."""
        for name in self.family.encoders:
            if not self._has(name):
                raise ConfigError(MISSING[name])

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None or name in self._released

    def release(self) -> None:
        """Free the encoders until one is needed again; no effect where they cannot be reloaded."""
        with self._lock:
            for name, what in ENCODERS.items():
                if self.read_again is not None and getattr(self, name) is not None:
                    self.identity(what)  # computed and cached while the weights are here
                    setattr(self, name, None)
                    self._released.add(name)

    def release_unused(self) -> None:
        """Release the encoders, unless conditions are still encoded while training."""
        if not self.family.conditioning.encoded_while_training:
            self.release()

    def encoder(self, name: str) -> Any:
        """Encoder in that field, reloaded if it was released."""
        with self._lock:  # samples are also prefetched in a thread
            if self.read_again is not None and name in self._released:
                setattr(self, name, self.read_again(name))
                self._released.remove(name)
            return getattr(self, name)

    def latent(self, frames: Tensor) -> Tensor:
        """Encode frames (F, H, W, 3) in [0, 1] to latents (F, C, H/8, W/8), scaled for the network, fp32, on the CPU.

        For a base whose clips are one latent: (1, C, T, H/8, W/8); T = 1 for one frame.
        """
        with torch.inference_mode():
            latent = self.encoder("vae").encode(frames)
            latent = self.model.model.process_latent_in(latent.float())
        return latent.cpu().clone()

    def picture(self, latent: Tensor) -> Tensor:
        """Decode latents, scaled for the network, to pictures (F, H, W, 3) in [0, 1], on the CPU."""
        with torch.inference_mode():
            pixels = self.encoder("vae").decode(self.model.model.process_latent_out(latent))
        return pixels.float().cpu().clone().flatten(0, -4)  # a latent with frames decodes to (F, 1, H, W, 3)

    def identity(self, what: str) -> str:
        """Identity of the `model`, `vae`, `text` or `vision` weights: a hash of names, shapes and
        some of the values.
        """
        if what not in self._identities:
            self._identities[what] = _identity(self._weights(what))
        return self._identities[what]

    def _weights(self, what: str) -> Iterable[tuple[str, Tensor]]:
        """Names and tensors in the order of the names."""
        if what == "model":
            return _network_weights(self.model)
        module = {
            "vae": lambda: self.encoder("vae").first_stage_model,
            "text": lambda: self.encoder("clip").cond_stage_model,
            "vision": lambda: self.encoder("vision").model,
        }[what]()
        return sorted(module.state_dict().items())


def _network_weights(model: ModelPatcher) -> Iterator[tuple[str, Tensor]]:
    """Tensors as they are stored; those in a tensor type of the host are dequantised."""
    numbers = base_weights(model)
    for name in stored_names(model, HOST_PREFIX):
        weight, _ = stored_weight(model, name) or (None, None)
        if weight is not None and type(weight.detach()) is not Tensor:
            weight = numbers(name)
        if weight is not None:
            yield name, weight


def _identity(weights: Iterable[tuple[str, Tensor]]) -> str:
    """weights: in the order of their names."""
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in weights:
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].float().cpu()
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(picked.numpy().tobytes())
    return digest.hexdigest()


def device_of_host() -> torch.device:
    """Device on which the host computes."""
    return comfy.model_management.get_torch_device()


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Dtype of a run: as configured, or for `auto` bf16 on a device that is fast at it, else fp32."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision in named:
        return named[precision]
    quick = device.type != "cpu" and comfy.model_management.should_use_bf16(device)
    return torch.bfloat16 if quick else torch.float32


def make_room(device: torch.device) -> None:
    """Move the host's models off the device, and return freed memory to the system."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    gc.collect()
    if sys.platform == "linux" and (
        trim := getattr(ctypes.CDLL(None), "malloc_trim", None)
    ):  # glibc does not return freed memory otherwise
        trim(0)


def is_interruption(error: BaseException) -> bool:
    """True: the host raised this because the user pressed Cancel, possibly inside a forward pass.

    False: another error.
    """
    return isinstance(error, comfy.model_management.InterruptProcessingException)


def is_out_of_memory(error: BaseException) -> bool:
    """True: the device had no memory left. False: another error. Later hosts have their own test for it."""
    hosts = getattr(comfy.model_management, "is_oom", None)
    return bool(hosts(error)) if hosts else isinstance(error, comfy.model_management.OOM_EXCEPTION)
