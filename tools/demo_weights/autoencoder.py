"""Autoencoder of the UNet base: TAESD's layout with 4 channels, the host's class, with zero weights in blocks that this
data does not need; a residual block with a rectifier at its end then passes its input unchanged.

Its training starts from the one with 16 channels (painter.py), whose latents are projected on their four principal
components. Without the idle blocks a step takes a third of the time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...controlnext_core.picturebook import draw
from ...controlnext_training.seeding import generator
from ..tiny_models.storage import Pools, save
from ..tiny_models.text_and_vae import taesd
from .computing import quick
from .running import Average, StageRun, cosine, picture_grid, snapshot, unpaused_steps

SEED, CHANNELS = 7, 4
LATENT_SCALE = 0.18215  # of the host's SD1.5 latent format
WORKING = {"taesd_encoder": (3, 7, 8, 11, 12), "taesd_decoder": (3, 4, 5, 8, 9, 13)}
"""Indices of the blocks that train; the others pass their input."""
SIDES, PART = (128, 192), 64  # sides of the pictures in pixels, and of the crop for a step
PICTURES, STEPS, BATCH = 600, 1000, 8
LEARNING_RATE, WARMUP, EMA_DECAY = 1e-3, 50, 0.998
FILE = "autoencoder.safetensors"
LATENT_NOISE = 0.1  # largest std of the noise added to latents, so that the decoder tolerates errors of a sampler
DECODER_STEPS, DECODER_RATE = 2500, 5e-4
DARKEST, HAZE = 0.35, 0.06  # least share of a channel's light that is left, and the most that is added
MOMENTS_WEIGHT = 0.05
EDGE_WEIGHT = 0.5


def new_autoencoder() -> nn.Module:
    """Initial TAESD of the host, a colour averager, with nn.ReLU in place of every idle block."""
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


def narrowed(weights: dict[str, Tensor], latents: Tensor) -> dict[str, Tensor]:
    """Weights with CHANNELS latent channels: the principal components of latents (N, channels, h, w) of `weights`, each
    with mean 0 and variance 1.
    """
    rows = latents.transpose(0, 1).flatten(1).double()
    mean = rows.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(rows))  # ascending
    scale = values[-CHANNELS:].sqrt()
    inward, outward = (vectors[:, -CHANNELS:] / scale).T, vectors[:, -CHANNELS:] * scale
    last, first = "taesd_encoder.14", "taesd_decoder.1"
    kernel = weights[f"{first}.weight"].double()  # (64, channels, 3, 3)
    found = {
        f"{last}.weight": torch.einsum("ij,jkyx->ikyx", inward, weights[f"{last}.weight"].double()),
        f"{last}.bias": inward @ (weights[f"{last}.bias"].double() - mean),
        f"{first}.weight": torch.einsum("kjyx,ji->kiyx", kernel, outward),
        f"{first}.bias": weights[f"{first}.bias"].double() + torch.einsum("kjyx,j->k", kernel, mean),
    }
    return weights | {name: value.float() for name, value in found.items()}


def whole(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors for TAESD: the trained ones, and zeros for the idle blocks."""
    return {name: weights.get(name, torch.zeros_like(value)) for name, value in taesd(Pools(0), "", 1.0).items()}


def pictures(side: int, count: int, first: int = 0, seed: int = SEED) -> Tensor:
    """Pictures from `first` on as bytes (count, 3, side, side)."""
    images = [torch.from_numpy(draw(seed, index, side).image) for index in range(first, first + count)]
    return torch.stack(images).permute(0, 3, 1, 2).contiguous()


def in_random_light(images: Tensor, random: torch.Generator) -> Tensor:
    """Pictures (N, 3, H, W) of bytes, each with shares of red, green and blue light of its own, another at the bottom
    than at the top, and a haze.
    """
    count, _, height, _ = images.shape
    above, below = DARKEST + (1 - DARKEST) * torch.rand(2, count, 3, 1, 1, generator=random)
    down = torch.linspace(0, 1, height)[:, None]
    haze = HAZE * torch.rand(count, 3, 1, 1, generator=random)
    lit = images / 255 * torch.lerp(above, below, down) + haze
    return (lit.clamp(0, 1) * 255).round().to(torch.uint8)


def with_styles(drawn: list[Tensor], seed: int) -> list[Tensor]:
    """Pictures of each side, and after them those of the first side in random light."""
    return [*drawn, in_random_light(drawn[0], generator(seed, "light", 0))]


def encode(model: Any, pixels: Tensor) -> Tensor:
    """Encode pixels (B, 3, H, W) in [0, 1] to latents (B, channels, H/8, W/8) scaled for the base."""
    return model.taesd_encoder(pixels)


def decode(model: Any, latent: Tensor) -> Tensor:
    """Decode latents (B, channels, H/8, W/8) scaled for the base to pixels (B, 3, H, W) in [0, 1]."""
    return model.taesd_decoder(latent)


def moments_of_each(latent: Tensor) -> Tensor:
    """Penalty that is 0 where each channel of latents (B, channels, h, w) has mean 0 and variance 1."""
    variance, mean = torch.var_mean(latent, dim=(0, 2, 3))
    return (mean.square() + variance.log().square()).mean()


def loss_of(
    model: nn.Module, pixels: Tensor, noise: Tensor, moments: Callable[[Tensor], Tensor] = moments_of_each
) -> tuple[Tensor, Tensor]:
    """Compute (loss, mean absolute error): error of colours and of differences between neighbours, and `moments` of
    the latents. noise: in the latents' shape, ready to be added.
    """
    latent = encode(model, pixels).float()
    painted = decode(model, latent + noise).float()
    error = (painted - pixels).abs().mean()
    edges = sum((torch.diff(painted, dim=axis) - torch.diff(pixels, dim=axis)).abs().mean() for axis in (2, 3))
    return error + EDGE_WEIGHT * edges + MOMENTS_WEIGHT * moments(latent), error.detach()


def trained(path: Path) -> nn.Module:
    """Load the autoencoder of a file, packed or not, frozen. Raises SetupError where it is missing."""
    from .shipped import read_packed

    model = new_autoencoder()
    model.load_state_dict({name: value.float() for name, value in read_packed(path)[0].items()})
    return model.requires_grad_(False)


def _first_weights() -> dict[str, Tensor]:
    """Weights to start from: the shipped autoencoder with 16 channels, narrowed."""
    from . import painter
    from .shipped import PAINTER, SHIPPED

    network = painter.trained(SHIPPED / PAINTER)
    with torch.inference_mode(), quick():
        latents = encode(network, pictures(SIDES[-1], 64).float() / 255).float()
    return narrowed({name: value.clone() for name, value in network.state_dict().items()}, latents)


def train_autoencoder(seconds: float | None = None, steps: int = STEPS) -> Path:
    """Train, or resume; returns the file with the averaged weights in fp16. seconds: the length of this slice."""
    stage, model = StageRun("autoencoder"), new_autoencoder()
    if not stage.state_file.is_file():
        model.load_state_dict(_first_weights())

    def loss(drawn: list[Tensor], step: int) -> tuple[Tensor, Tensor]:
        return loss_of(model, *batch(drawn, generator(SEED, stage.name, step), LATENT_NOISE, CHANNELS))

    weights = train(stage, model, steps, LEARNING_RATE, lambda: [pictures(s, PICTURES) for s in SIDES], loss, seconds)
    return save(stage.folder / FILE, weights)


def train_decoder(seconds: float | None = None, steps: int = DECODER_STEPS) -> Path:
    """Train only the decoder of the autoencoder trained by the stage `autoencoder`, or of the shipped one without it.

    Latents stay as they are, so nothing else needs to be trained again. A third of the pictures stand in the light of
    `in_random_light`, so that styles keep their lines.
    """
    from .shipped import AUTOENCODER, SHIPPED

    stage = StageRun("decoder")
    made = stage.folder.parent / "autoencoder" / FILE
    model: Any = trained(made if made.is_file() else SHIPPED / AUTOENCODER)
    model.taesd_decoder.requires_grad_(True)

    def drawing() -> list[Tensor]:
        return with_styles([pictures(side, PICTURES) for side in SIDES[::-1]], SEED)

    def loss(drawn: list[Tensor], step: int) -> tuple[Tensor, Tensor]:
        return loss_of(model, *batch(drawn, generator(SEED, stage.name, step), LATENT_NOISE, CHANNELS))

    return save(stage.folder / FILE, train(stage, model, steps, DECODER_RATE, drawing, loss, seconds))


def train(
    stage: StageRun,
    model: Any,
    steps: int,
    rate: float,
    drawing: Callable[[], list[Tensor]],
    loss: Callable[[list[Tensor], int], tuple[Tensor, Tensor]],
    seconds: float | None,
) -> dict[str, Tensor]:
    """Train what requires gradients, or resume; returns all averaged weights in fp16.

    drawing: makes the pictures, one tensor for each side. loss: of these and the step, (loss, error). seconds: the
    length of this slice.
    """
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    average, done, state = Average(model, EMA_DECAY), 0, stage.load()
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.restore(state["average"])
        done = state["step"]
    stage.say(event="start", step=done, parameters=sum(p.numel() for p in parameters))
    drawn, total = drawing() if done < steps else [], 0.0
    for step, spent in unpaused_steps(done, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine(step, steps, WARMUP)
        with quick():
            found, error = loss(drawn, step)
        found.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(model)
        total, done = total + error.item(), step + 1
        if done % 50 == 0:
            stage.say(step=done, error=round(total / 50, 5), seconds=round(spent, 1))
            total = 0.0
        if done % 250 == 0 or done == steps:
            show(model, average.weights, stage.folder / f"pictures_{done:05d}.png")
        late = seconds is not None and spent > seconds
        if stage.is_time_to_save() or done == steps or late:
            stage.save(snapshot(model, optimizer, average, done))
        if late:
            break
    return {name: value.half() for name, value in average.weights.items()}


def batch(drawn: list[Tensor], random: torch.Generator, noise: float, channels: int) -> tuple[Tensor, Tensor]:
    """Batch of a step: (crops of pictures (B, 3, PART, PART), noise for their latents).

    noise: its largest standard deviation; channels: of the latents.
    """
    pixels = crops(drawn, BATCH, random)
    std = noise * torch.rand(BATCH, 1, 1, 1, generator=random)
    return pixels, std * torch.randn(BATCH, channels, PART // 8, PART // 8, generator=random)


def crops(drawn: list[Tensor], count: int, random: torch.Generator) -> Tensor:
    """Random crops (count, 3, PART, PART) in [0, 1] of pictures, those of each side in turn."""
    parts = []
    for number in range(count):
        pool = drawn[number % len(drawn)]
        row = int(torch.randint(len(pool), (), generator=random))
        y, x = torch.randint(pool.shape[-1] - PART + 1, (2,), generator=random).tolist()
        parts.append(pool[row, :, y : y + PART, x : x + PART])
    return torch.stack(parts).contiguous(memory_format=torch.channels_last).float() / 255


@torch.no_grad()
def show(model: Any, weights: dict[str, Tensor], path: Path) -> Path:
    """Save unseen pictures above their reconstructions by `model` with these weights."""
    averaged = copy.deepcopy(model)
    averaged.load_state_dict(weights)
    pixels = pictures(SIDES[-1], 4, 10**6).float().to(weights["taesd_encoder.0.weight"].device) / 255
    with quick():
        back = decode(averaged, encode(averaged, pixels)).float()
    return picture_grid(torch.cat([pixels, back]).permute(0, 2, 3, 1).cpu(), path, columns=4)
