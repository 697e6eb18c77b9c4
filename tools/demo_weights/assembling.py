"""Checkpoints that stock CheckpointLoaderSimple opens: network, text encoder and autoencoder in one file."""

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
SD3_SCALE, SD3_SHIFT = 1.5305, 0.0609  # latents = (what the autoencoder gives - shift) * scale


def write_checkpoint(path: Path, unet: Mapping[str, Tensor], autoencoder: Mapping[str, Tensor]) -> Path:
    """unet: in the host's names; autoencoder: TAESD's, trained on latents as the UNet sees them (`.ckpt`)."""
    tensors = text_encoder(TEXT_PREFIX) | {UNET_PREFIX + name: value for name, value in unet.items()}
    tensors |= {VAE_PREFIX + name: value for name, value in autoencoder.items()}
    tensors[f"{VAE_PREFIX}vae_scale"] = torch.tensor(LATENT_SCALE)
    tensors[f"{VAE_PREFIX}vae_shift"] = torch.tensor(0.0)
    return save(path, tensors)


def write_sd3_checkpoint(path: Path, network: Mapping[str, Tensor], painter: Mapping[str, Tensor]) -> Path:
    """network: as `mmdit.as_the_host_loads` gives it; painter: TAESD's of 16 channels, on latents as the network sees
    them (`.ckpt`). Scale and shift are those of the host's SD3 latent format."""
    tensors = text_encoder(f"text_encoders.clip_l.transformer.{SD3_TEXT}", summary_last=True)
    tensors |= {UNET_PREFIX + name: value for name, value in network.items()}
    tensors |= {VAE_PREFIX + name: value for name, value in painter.items()}
    tensors[f"{VAE_PREFIX}vae_scale"] = torch.tensor(SD3_SCALE)
    tensors[f"{VAE_PREFIX}vae_shift"] = torch.tensor(SD3_SHIFT)
    return save(path, tensors)
