"""Checkpoints for stock CheckpointLoaderSimple: network, text encoder and autoencoder in one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..tiny_models.storage import save
from .autoencoder import LATENT_SCALE
from .text_encoder import text_encoder

TEXT_PREFIX = "cond_stage_model.transformer.text_model."
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
SD3_TEXT = "text_model."
SD3_SCALE, SD3_SHIFT = 1.5305, 0.0609  # latents = (output of the autoencoder - shift) * scale


def merged(network: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a network with the low-rank differences of a file (diffusion_model.NAME.lora_up.weight, ...) added."""
    tensors = dict(network)
    for key, up in lora.items():
        if key.endswith(".lora_up.weight"):
            name = key.removesuffix(".lora_up.weight")
            down, alpha = lora[f"{name}.lora_down.weight"].float(), lora[f"{name}.alpha"].float()
            weight = f"{name.removeprefix('diffusion_model.')}.weight"
            tensors[weight] = tensors[weight].float() + up.float() @ down * (alpha / len(down))
            tensors[weight] = tensors[weight].to(network[weight].dtype)
    return tensors


def write_checkpoint(path: Path, unet: Mapping[str, Tensor], autoencoder: Mapping[str, Tensor]) -> Path:
    """Write an SD1.5 checkpoint. unet: in the host's names; autoencoder:

    TAESD's, trained on latents scaled for the UNet (`.ckpt`).
    """
    tensors = text_encoder(TEXT_PREFIX) | {UNET_PREFIX + name: value for name, value in unet.items()}
    tensors |= {VAE_PREFIX + name: value for name, value in autoencoder.items()}
    tensors[f"{VAE_PREFIX}vae_scale"] = torch.tensor(LATENT_SCALE)
    tensors[f"{VAE_PREFIX}vae_shift"] = torch.tensor(0.0)
    return save(path, tensors)


def write_sd3_checkpoint(path: Path, network: Mapping[str, Tensor], painter: Mapping[str, Tensor]) -> Path:
    """Write an SD3 checkpoint (`.ckpt`).

    network: from `mmdit.as_the_host_loads`; painter: TAESD's of 16 channels, on latents scaled for the network. Scale
    and shift are those of the host's SD3 latent format.
    """
    tensors = text_encoder(f"text_encoders.clip_l.transformer.{SD3_TEXT}", summary_last=True)
    tensors |= {UNET_PREFIX + name: value for name, value in network.items()}
    tensors |= {VAE_PREFIX + name: value for name, value in painter.items()}
    tensors[f"{VAE_PREFIX}vae_scale"] = torch.tensor(SD3_SCALE)
    tensors[f"{VAE_PREFIX}vae_shift"] = torch.tensor(SD3_SHIFT)
    return save(path, tensors)
