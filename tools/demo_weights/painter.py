"""Autoencoder of the picturebook: TAESD's layout with 16 channels, in the form that the host's loaders use for SD3.

Its training starts from the 4-channel one (autoencoder.py). Variance may differ between channels, only their mean is
held at 0: the most important channels then exceed the added noise most.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...controlnext_training.seeding import generator
from ..tiny_models.storage import save
from . import autoencoder
from .computing import device
from .running import StageRun

SEED, CHANNELS = 19, 16
SIDES = (192, 256)  # sides of the pictures in pixels
PICTURES, STEPS = 500, 1000  # pictures of each side
DECODER_STEPS, DECODER_RATE, DECODER_NOISE = 3000, 5e-4, 0.15
LATENT_NOISE = 0.25  # largest std of the noise added to latents while both halves train
FILE = "painter.safetensors"
RANDOM_STD = 0.02  # std of the weights of channels that the 4-channel one lacks


def new_painter(start: dict[str, Tensor] | None = None) -> nn.Module:
    """Initial network, with nn.ReLU in place of idle blocks. start: weights of the 4-channel one; None: random."""
    model = autoencoder.new_autoencoder()
    if start is not None:
        model.load_state_dict(start, strict=False)
    random = torch.Generator().manual_seed(SEED)
    for half, place, axis in (("taesd_encoder", 14, 0), ("taesd_decoder", 1, 1)):
        layer = getattr(model, half)[place]
        wider = [CHANNELS if axis == index else size for index, size in enumerate(layer.weight.shape)]
        weight = torch.randn(wider, generator=random) * RANDOM_STD
        weight.narrow(axis, 0, 4).copy_(layer.weight.detach())
        layer.weight = nn.Parameter(weight)
        if axis == 0:
            layer.bias = nn.Parameter(torch.cat([layer.bias.detach(), torch.zeros(CHANNELS - 4)]))
    return model.to(device()).to(memory_format=torch.channels_last).requires_grad_(True)  # type: ignore[call-overload]


def trained(path: Path) -> nn.Module:
    """Load the network with the weights of a packed file, frozen. Raises SetupError where it is missing."""
    return _with(new_painter(), path).requires_grad_(False)


def painter_of(folder: Path) -> nn.Module:
    """Autoencoder trained by the stage `painter` beside a stage's folder, or the shipped one without it."""
    from .shipped import PAINTER, SHIPPED

    made = folder.parent / "painter" / FILE
    return trained(made if made.is_file() else SHIPPED / PAINTER)


def moments_of_all(latent: Tensor) -> Tensor:
    """Penalty that is 0 where each channel of latents (B, channels, h, w) has mean 0, and all together variance 1."""
    variance, mean = torch.var_mean(latent, dim=(0, 2, 3))
    return mean.square().mean() + variance.mean().log().square()


def train_painter(steps: int = STEPS, seconds: float | None = None, start: Path | None = None) -> Path:
    """Train both halves, or resume; returns the file with the averaged weights in fp16.

    seconds: the length of this slice. start: folder of a packed file of this network with the initial weights of the
    first slice; None: the 4-channel one.
    """
    from .shipped import AUTOENCODER, PAINTER, SHIPPED, read_packed

    narrow = read_packed(SHIPPED / AUTOENCODER)[0]
    model = new_painter({name: value.float() for name, value in narrow.items()})
    if start is not None and (start / PAINTER).is_file():
        _with(model, start / PAINTER)
    return _train(StageRun("painter"), model, steps, autoencoder.LEARNING_RATE, LATENT_NOISE, seconds)


def train_decoder(steps: int = DECODER_STEPS, seconds: float | None = None) -> Path:
    """Train only the decoder, for unchanged latents: nothing else needs to be trained again.

    A third of the pictures stand in the light of `autoencoder.in_random_light`, so that styles keep their lines.
    """
    stage = StageRun("painter_decoder")
    model: Any = painter_of(stage.folder)
    model.taesd_decoder.requires_grad_(True)
    return _train(stage, model, steps, DECODER_RATE, DECODER_NOISE, seconds, styles=True)


def _with(model: nn.Module, path: Path) -> nn.Module:
    from .shipped import read_packed

    model.load_state_dict({name: value.float() for name, value in read_packed(path)[0].items()}, strict=False)
    return model


def _train(
    stage: StageRun,
    model: nn.Module,
    steps: int,
    rate: float,
    noise: float,
    seconds: float | None,
    styles: bool = False,
) -> Path:
    def drawing() -> list[Tensor]:
        drawn = [autoencoder.pictures(side, PICTURES, seed=SEED) for side in SIDES]
        return autoencoder.with_styles(drawn, SEED) if styles else drawn

    def loss(drawn: list[Tensor], step: int) -> tuple[Tensor, Tensor]:
        pixels, added = autoencoder.batch(drawn, generator(SEED, stage.name, step), noise, CHANNELS)
        return autoencoder.loss_of(model, pixels.to(device()), added.to(device()), moments_of_all)

    weights = autoencoder.train(stage, model, steps, rate, drawing, loss, seconds)
    return save(stage.folder / FILE, weights)
