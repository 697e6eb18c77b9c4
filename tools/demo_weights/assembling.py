"""The checkpoint that stock CheckpointLoaderSimple opens: UNet, text encoder and autoencoder in one file."""

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


def write_checkpoint(path: Path, unet: Mapping[str, Tensor], autoencoder: Mapping[str, Tensor]) -> Path:
    """unet: in the host's names; autoencoder: TAESD's, trained on latents as the UNet sees them (`.ckpt`)."""
    tensors = text_encoder(TEXT_PREFIX) | {UNET_PREFIX + name: value for name, value in unet.items()}
    tensors |= {VAE_PREFIX + name: value for name, value in autoencoder.items()}
    tensors[f"{VAE_PREFIX}vae_scale"] = torch.tensor(LATENT_SCALE)
    tensors[f"{VAE_PREFIX}vae_shift"] = torch.tensor(0.0)
    return save(path, tensors)
