"""Autoencoder of the picturebook: TAESD's layout with 16 channels, in the form that the host's loaders use for SD3.

Its training starts from the 4-channel one (autoencoder.py). Variance may differ between channels, only their mean is
held at 0: the most important channels then exceed the added noise most.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...controlnext_core.picturebook import draw
from ...controlnext_training.seeding import generator
from ..tiny_models.storage import save
from . import autoencoder
from .computing import device, quick
from .packing import unpack
from .running import Average, StageRun, cosine, picture_grid, snapshot, unpaused_steps

SEED, CHANNELS = 19, 16
SIDES = (192, 256)  # sides of the pictures in pixels
PICTURES, STEPS, BATCH = 500, 1000, 8  # pictures of each side
DECODER_STEPS, DECODER_RATE, DECODER_NOISE = 700, 5e-4, 0.15
LEARNING_RATE, WARMUP, EMA_DECAY = 1e-3, 50, 0.998
LATENT_NOISE = 0.25  # largest std of the noise added to latents while both halves train
MOMENTS_WEIGHT, EDGE_WEIGHT = 0.05, 0.5
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


def whole(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors for the host's TAESD: the trained ones, and zeros for the idle blocks."""
    return autoencoder.whole(weights)


def trained(path: Path) -> nn.Module:
    """Load the network with the weights of a packed file, frozen."""
    model = new_painter()
    model.load_state_dict({name: value.float() for name, value in unpack(load_file(path)).items()}, strict=False)
    return model.requires_grad_(False)


def loss_of(model: nn.Module, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (loss, mean absolute error): error of colours and of differences between neighbours, and moments of
    latents.
    """
    latent = autoencoder.encode(model, pixels).float()
    painted = autoencoder.decode(model, latent + noise).float()
    error = (painted - pixels).abs().mean()
    edges = sum((torch.diff(painted, dim=axis) - torch.diff(pixels, dim=axis)).abs().mean() for axis in (2, 3))
    variance, mean = torch.var_mean(latent, dim=(0, 2, 3))
    moments = mean.square().mean() + variance.mean().log().square()
    return error + EDGE_WEIGHT * edges + MOMENTS_WEIGHT * moments, error.detach()


def train_painter(steps: int = STEPS, seconds: float | None = None, start: Path | None = None) -> Path:
    """Train both halves, or resume; returns the file with the averaged weights in fp16.

    seconds: the length of this slice. start: folder of a packed file of this network with the initial weights of the
    first slice; None: the 4-channel one.
    """
    from .shipped import AUTOENCODER, PAINTER, SHIPPED

    model = new_painter({name: value.float() for name, value in unpack(load_file(SHIPPED / AUTOENCODER)).items()})
    if start is not None and (start / PAINTER).is_file():
        packed = unpack(load_file(start / PAINTER))
        model.load_state_dict({name: value.float() for name, value in packed.items()}, strict=False)
    return _train(StageRun("painter"), model, steps, LEARNING_RATE, LATENT_NOISE, seconds)


def train_decoder(steps: int = DECODER_STEPS, seconds: float | None = None) -> Path:
    """Train only the decoder of the shipped file, for unchanged latents: nothing else needs to be trained again."""
    from .shipped import PAINTER, SHIPPED

    model: Any = trained(SHIPPED / PAINTER)
    model.taesd_decoder.requires_grad_(True)
    return _train(StageRun("painter_decoder"), model, steps, DECODER_RATE, DECODER_NOISE, seconds)


def _train(stage: StageRun, model: nn.Module, steps: int, rate: float, noise: float, seconds: float | None) -> Path:
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    average, done, state = Average(model, EMA_DECAY), 0, stage.load()
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.restore(state["average"])
        done = state["step"]
    stage.say(event="start", step=done, parameters=sum(p.numel() for p in parameters))
    drawn = [pictures_of(side, PICTURES) for side in SIDES] if done < steps else []
    total = 0.0
    for step, spent in unpaused_steps(done, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine(step, steps, WARMUP)
        with quick():
            loss, error = loss_of(model, *_batch(drawn, stage.name, step, noise))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(model)
        total, done = total + error.item(), step + 1
        if done % 50 == 0:
            stage.say(step=done, error=round(total / 50, 5), seconds=round(spent, 1))
            total = 0.0
        if done % 250 == 0 or done == steps:
            show(average.weights, stage.folder / f"pictures_{done:05d}.png")
        late = seconds is not None and spent > seconds
        if stage.is_time_to_save() or done == steps or late:
            stage.save(snapshot(model, optimizer, average, done))
        if late:
            break
    return save(stage.folder / FILE, {name: value.half() for name, value in average.weights.items()})


def pictures_of(side: int, count: int, first: int = 0, seed: int = SEED) -> Tensor:
    """Pictures from `first` on as bytes (count, 3, side, side)."""
    images = [torch.from_numpy(draw(seed, index, side).image) for index in range(first, first + count)]
    return torch.stack(images).permute(0, 3, 1, 2).contiguous()


def _batch(drawn: list[Tensor], purpose: str, step: int, noise: float) -> tuple[Tensor, Tensor]:
    """Batch of a step: (crops of pictures (B, 3, PART, PART), noise for their latents).

    noise: its largest standard deviation.
    """
    random = generator(SEED, purpose, step)
    pixels = autoencoder.crops(drawn, BATCH, random)
    std = noise * torch.rand(BATCH, 1, 1, 1, generator=random)
    part = autoencoder.PART // 8
    return pixels.to(device()), (std * torch.randn(BATCH, CHANNELS, part, part, generator=random)).to(device())


@torch.no_grad()
def show(weights: dict[str, Tensor], path: Path) -> Path:
    """Save unseen pictures above their reconstructions."""
    model = new_painter().requires_grad_(False)
    model.load_state_dict(weights)
    pixels = pictures_of(SIDES[0], 4, 10**6).float().to(device()) / 255
    with quick():
        back = autoencoder.decode(model, autoencoder.encode(model, pixels)).float()
    return picture_grid(torch.cat([pixels, back]).permute(0, 2, 3, 1).cpu(), path, columns=4)
