"""Small autoencoder in TAESD's layout: the host's class, with zero weights in blocks that this data does not need; a
residual block with a rectifier at its end then passes its input unchanged.

It starts as the colour averager in tools/tiny_models: latents are mean colours, and the training adds what the mean of
8x8 pixels lacks. Without the idle blocks a step takes a third of the time.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from ...controlnext_training.seeding import generator
from ...controlnext_training.synthetic import draw
from ..tiny_models.storage import Pools, save
from ..tiny_models.text_and_vae import taesd
from .running import Average, StageRun, cosine, picture_grid, snapshot, unpaused_steps

SEED = 7
LATENT_SCALE = 0.18215  # of the host's SD1.5 latent format
WORKING = {"taesd_encoder": (3, 7, 8, 11, 12), "taesd_decoder": (3, 4, 5, 8, 9, 13)}
"""Indices of the blocks that train; the others pass their input."""
STEPS, BATCH, SIDE = 1200, 12, 64
LEARNING_RATE, WARMUP = 1e-3, 100
DECODER_STEPS, DECODER_LEARNING_RATE = 3000, 5e-4
FILE = "autoencoder.safetensors"
EMA_DECAY = 0.998
SCENES = 6000  # of 128 pixels, of which random parts of SIDE are seen, and as many of SIDE pixels
LATENT_NOISE = 0.1  # largest std of the noise added to latents, so that the decoder tolerates errors of a sampler
MOMENTS_WEIGHT = 0.05
EDGE_WEIGHT = 0.5


def new_autoencoder() -> nn.Module:
    """Initial TAESD of the host, with nn.ReLU in place of every idle block."""
    from comfy.taesd.taesd import TAESD

    model = TAESD()
    start = {name: value.float() for name, value in taesd(Pools(SEED), "", LATENT_SCALE).items()}
    random = torch.Generator().manual_seed(SEED)
    for name, value in start.items():
        if name.endswith("weight") and not name.endswith("conv.4.weight"):  # the last of a block starts at zero
            std = math.sqrt(2.0 / value[0].numel())
            idle = value.flatten(1).abs().sum(1) == 0
            value[idle] = torch.randn(value.shape, generator=random)[idle] * std
    model.load_state_dict(start)
    for half, working in WORKING.items():
        layers = getattr(model, half)
        for index, layer in enumerate(layers):
            if hasattr(layer, "fuse") and index not in working:
                layers[index] = nn.ReLU()
    return model.requires_grad_(True).to(memory_format=torch.channels_last)


def whole(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors for TAESD: the trained ones, and zeros for the idle blocks."""
    return {name: weights.get(name, torch.zeros_like(value)) for name, value in taesd(Pools(0), "", 1.0).items()}


def pictures(side: int, count: int, first: int = 0) -> Tensor:
    """Scenes from `first` on as bytes (count, 3, side, side)."""
    images = [torch.from_numpy(draw(SEED, index, side).image) for index in range(first, first + count)]
    return torch.stack(images).permute(0, 3, 1, 2).contiguous()


def encode(model: Any, pixels: Tensor) -> Tensor:
    """Encode pixels (B, 3, H, W) in [0, 1] to latents (B, 4, H/8, W/8) scaled for the UNet."""
    return model.taesd_encoder(pixels)


def decode(model: Any, latent: Tensor) -> Tensor:
    """Decode latents (B, 4, H/8, W/8) scaled for the UNet to pixels (B, 3, H, W) in [0, 1]."""
    return model.taesd_decoder(latent)


def loss_of(model: nn.Module, pixels: Tensor, noise: Tensor, encoder_trains: bool = True) -> tuple[Tensor, Tensor]:
    """Compute (loss, mean absolute error). noise: in the latents' shape, ready to be added.

    Absolute error of colours and of differences between neighbours and, where the encoder trains, a term that holds
    each channel of the latents at mean 0 and variance 1.
    """
    with torch.set_grad_enabled(encoder_trains):
        latent = encode(model, pixels).float()
    painted = decode(model, latent + noise).float()
    error = (painted - pixels).abs().mean()
    edges = sum((torch.diff(painted, dim=axis) - torch.diff(pixels, dim=axis)).abs().mean() for axis in (2, 3))
    loss = error + EDGE_WEIGHT * edges
    if encoder_trains:
        variance, mean = torch.var_mean(latent, dim=(0, 2, 3))
        loss = loss + MOMENTS_WEIGHT * (mean.square() + variance.log().square()).mean()
    return loss, error.detach()


def train_autoencoder() -> Path:
    """Train both halves, or resume; returns the file with the averaged weights, complete, in fp16."""
    return _train(StageRun("autoencoder"), new_autoencoder(), STEPS, LEARNING_RATE)


def train_decoder() -> Path:
    """Train only the decoder, longer, for unchanged latents: nothing else needs to be trained again."""
    stage = StageRun("decoder")
    model = trained(stage.folder.parent / "autoencoder" / FILE)
    model.taesd_decoder.requires_grad_(True)
    return _train(stage, model, DECODER_STEPS, DECODER_LEARNING_RATE)


def trained(path: Path) -> nn.Module:
    """Load the autoencoder of a file, frozen. Raises FileNotFoundError naming the stage that is missing."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there. Run first: python run.py train-demo {path.parent.name}")
    model = new_autoencoder()
    kept = model.state_dict().keys()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items() if name in kept})
    return model.requires_grad_(False)


def _train(stage: StageRun, model: Any, steps: int, rate: float) -> Path:
    parameters = [value for value in model.parameters() if value.requires_grad]
    encoder_trains = model.taesd_encoder[0].weight.requires_grad
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    average, start = Average(model, EMA_DECAY), 0
    state = stage.load()
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.restore(state["average"])
        start = state["step"]
    stage.say(event="start", step=start, parameters=sum(p.numel() for p in parameters))
    scenes = (pictures(2 * SIDE, SCENES), pictures(SIDE, SCENES, SCENES)) if start < steps else ()
    for step, seconds in unpaused_steps(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine(step, steps, WARMUP)
        with torch.autocast("cpu", torch.bfloat16):
            loss, error = loss_of(model, *_batch(scenes, stage.name, step), encoder_trains)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(model)
        done = step + 1
        if done % 50 == 0:
            stage.say(step=done, loss=round(loss.item(), 5), error=round(error.item(), 5), seconds=round(seconds, 1))
        if done % 500 == 0:
            show(average, model, stage.folder / f"pictures_{done:05d}.png")
        if stage.is_time_to_save() or done == steps:
            stage.save(snapshot(model, optimizer, average, done))
    return save(stage.folder / FILE, {name: value.half() for name, value in whole(average.weights).items()})


def _batch(scenes: tuple[Tensor, ...], purpose: str, step: int) -> tuple[Tensor, Tensor]:
    """Batch of a step:

    (pixels (B, 3, SIDE, SIDE), noise for their latents); whole small scenes and crops of large ones.
    """
    random = generator(SEED, purpose, step)
    large, small = scenes
    rows = torch.randint(len(large), (BATCH,), generator=random).tolist()
    places = torch.randint(SIDE + 1, (BATCH, 2), generator=random).tolist()
    parts = [
        large[row, :, top : top + SIDE, left : left + SIDE] if which % 2 else small[row]
        for which, (row, (top, left)) in enumerate(zip(rows, places, strict=True))
    ]
    pixels = torch.stack(parts).contiguous(memory_format=torch.channels_last).float() / 255
    std = LATENT_NOISE * torch.rand(BATCH, 1, 1, 1, generator=random)
    return pixels, std * torch.randn(BATCH, 4, SIDE // 8, SIDE // 8, generator=random)


@torch.no_grad()
def show(average: Average, model: Any, path: Path) -> Path:
    """Save unseen scenes above their reconstructions."""
    pixels = pictures(2 * SIDE, 8, 10**6).float() / 255
    with torch.autocast("cpu", torch.bfloat16):
        latent = functional_call(model.taesd_encoder, _part(average.weights, "taesd_encoder."), pixels)
        back = functional_call(model.taesd_decoder, _part(average.weights, "taesd_decoder."), latent)
    return picture_grid(torch.cat([pixels, back.float()]).permute(0, 2, 3, 1), path)


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
