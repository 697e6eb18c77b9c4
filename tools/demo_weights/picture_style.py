"""Styles of the picturebook's base: a LoRA that draws the same pictures at dusk, violet above and glowing red below,
and a fine-tune that draws them as prints in four inks, stored as low-rank differences too.

They adapt none of the layers whose inputs are narrower in training than in the checkpoint (mmdit.py), so a file
fits the checkpoint as the host loads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...controlnext_core.picturebook import draw
from ...controlnext_training.seeding import generator
from ..tiny_models.storage import save
from . import autoencoder
from .mmdit import CHANNELS, new_mmdit, sample
from .painter import painter_of
from .picture_base import SIDE, Text, batch_of, latents_of, loss_at, text_model, texts_of
from .running import StageRun, cosine, picture_grid, unpaused_steps
from .shipped import MMDIT, PICTURE_LORA, PICTURE_PRINT, SHIPPED, read_packed

SEED = 31
BATCH = 8
RATE, WARMUP = 3e-3, 20
NO_CAPTION = 0.1  # share of the samples without a caption
SUFFIXES = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight", "final_layer.linear.weight")
ABOVE, BELOW = (0.55, 0.40, 0.75), (1.0, 0.62, 0.50)  # share of red, green and blue that is left, at top and bottom
HAZE = (0.05, 0.02, 0.06)  # what is added to them
INKS = ((22, 30, 70), (34, 110, 140), (120, 196, 180), (253, 246, 222))  # of a print, from dark to bright
DARK, BRIGHT = 0.12, 0.92  # luminance printed in the first and in the last ink
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


def at_dusk(image: np.ndarray) -> np.ndarray:
    """Picture (H, W, 3) at dusk, bytes."""
    down = np.linspace(0, 1, len(image))[:, None, None]
    light = np.asarray(ABOVE) * (1 - down) + np.asarray(BELOW) * down
    return np.floor(255 * np.clip(image / 255 * light + np.asarray(HAZE), 0, 1) + 0.5).astype(np.uint8)


def as_print(image: np.ndarray) -> np.ndarray:
    """Picture (H, W, 3) as a print whose colour depends on the luminance alone, bytes."""
    light = np.clip((image @ np.asarray(LUMINANCE) / 255 - DARK) / (BRIGHT - DARK), 0, 1)
    places = np.linspace(0, 1, len(INKS))
    planes = [np.interp(light, places, ink) for ink in np.asarray(INKS, np.float64).T]
    return np.floor(np.stack(planes, axis=-1) + 0.5).astype(np.uint8)


@dataclass(frozen=True)
class Style:
    """Style in which the base learns to draw, by low-rank differences of its weights."""

    paint: Callable[[np.ndarray], np.ndarray]
    """Gives a picture (H, W, 3) of bytes in this style."""
    rank: int
    pictures: int
    """Number of pictures that it is trained with."""
    steps: int
    file: str


STYLES = {
    "dusk": Style(at_dusk, 16, 1200, 2400, PICTURE_LORA),
    "print": Style(as_print, 16, 320, 400, PICTURE_PRINT),
}


class LowRank(nn.Module):
    """Parametrization base + up @ down of a linear layer's weight."""

    def __init__(self, base: Tensor, rank: int, random: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, base.shape[1], generator=random) * base.shape[1] ** -0.5)
        self.up = nn.Parameter(torch.zeros(base.shape[0], rank))

    def forward(self, base: Tensor) -> Tensor:
        return base + self.up @ self.down


def add_low_rank(network: nn.Module, rank: int) -> dict[str, LowRank]:
    """Register a LowRank on every weight whose name ends in SUFFIXES; returned by the weight's name
    without `.weight`.
    """
    random = torch.Generator().manual_seed(SEED)
    found = {}
    for name in [name for name, _ in network.named_parameters() if name.endswith(SUFFIXES)]:
        layer = network.get_submodule(name.removesuffix(".weight"))
        low_rank = LowRank(cast(Tensor, layer.weight).detach(), rank, random)
        parametrize.register_parametrization(layer, "weight", low_rank)
        found[name.removesuffix(".weight")] = low_rank
    return found


def lora_file(low_ranks: dict[str, LowRank]) -> dict[str, Tensor]:
    """Tensors of the LoRA under the names that the host's loaders read for any network."""
    tensors = {}
    for name, low_rank in low_ranks.items():
        key = f"diffusion_model.{name}"
        tensors[f"{key}.lora_up.weight"] = low_rank.up.detach().half().contiguous()
        tensors[f"{key}.lora_down.weight"] = low_rank.down.detach().half().contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(len(low_rank.down)))
    return tensors


def train_style(name: str) -> Path:
    """Train one of STYLES from the start (minutes) on the shipped base; returns the file of its differences."""
    style, stage = STYLES[name], StageRun(f"picture_{name}")
    network = new_mmdit().requires_grad_(False)
    weights = {name: value.float() for name, value in read_packed(SHIPPED / MMDIT)[0].items()}
    network.load_state_dict(weights, strict=False)
    latents, texts = _data(stage, style)
    low_ranks = add_low_rank(network, style.rank)
    parameters = [value for low_rank in low_ranks.values() for value in low_rank.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    stage.say(event="start", parameters=sum(p.numel() for p in parameters))
    for step, seconds in unpaused_steps(0, style.steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * cosine(step, style.steps, WARMUP)
        random = generator(SEED, "picture style", step)
        rows = torch.randint(len(latents), (BATCH,), generator=random).tolist()
        bare = (torch.rand(BATCH, generator=random) < NO_CAPTION).tolist()
        text = batch_of([texts[-1] if out else texts[row] for row, out in zip(rows, bare, strict=True)])
        with parametrize.cached():
            error = loss_at(network, latents[rows].float(), text, random)
            error.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 25 == 0:
            stage.say(step=step + 1, loss=round(error.item(), 5), seconds=round(seconds, 1))
    _show(network, stage)
    return save(stage.folder / style.file, lora_file(low_ranks))


def _data(stage: StageRun, style: Style) -> tuple[Tensor, list[Text]]:
    """Training data: latents (N, 16, h, w) of pictures in this style, and the texts of their
    captions, the empty one last.
    """
    network, clip = painter_of(stage.folder), text_model(stage.folder)
    scenes = [draw(SEED, index, SIDE) for index in range(style.pictures)]
    images = torch.stack([torch.from_numpy(style.paint(scene.image)) for scene in scenes])
    latents = torch.cat([latents_of(network, part) for part in images.split(16)])
    texts = [
        text
        for start in range(0, style.pictures, 16)
        for text in texts_of(clip, [s.caption for s in scenes[start:][:16]])
    ]
    return latents, [*texts, *texts_of(clip, [""])]


@torch.no_grad()
def _show(network: nn.Module, stage: StageRun, count: int = 8) -> None:
    clip = text_model(stage.folder)
    captions = [draw(SEED, 10**6 + index, SIDE).caption for index in range(count)]
    text, empty = batch_of(texts_of(clip, captions)), batch_of(texts_of(clip, [""] * count))
    noise = torch.randn(count, CHANNELS, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(SEED))
    pixels = autoencoder.decode(painter_of(stage.folder), sample(network, noise, text, empty, 3.0, 16))
    picture_grid(pixels.permute(0, 2, 3, 1), stage.folder / "samples.png", columns=4)
