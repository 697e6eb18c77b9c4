"""LoRA for the base that draws the same scenes at night, dark with white outlines.

It is trained on the half-width network and written for the full-width one. There every channel is duplicated, so a
difference that gives equal outputs to a pair and reads half from each of a pair has the same effect, and the same rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...controlnext_core.picturebook import Picture
from ...controlnext_training.seeding import generator
from ...controlnext_training.synthetic import draw
from ..tiny_models.storage import save
from . import autoencoder
from .running import StageRun, cosine, picture_grid, unpaused_steps
from .scene_base import (
    SIDE,
    context,
    latents_of,
    loss_at,
    new_unet,
    sample,
    sigmas,
    text_model,
    trained_autoencoder,
)
from .shipped import LORA

SEED = 13
SCENES, STEPS, BATCH = 768, 500, 16
RANK = 8
LEARNING_RATE, WARMUP = 2e-3, 20
DARKER = 0.3
SUFFIXES = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "in_layers.2.weight", "out_layers.3.weight")


def at_night(scene: Picture) -> np.ndarray:
    """Scene at night, (H, W, 3) bytes: darker, with white outlines."""
    line = scene.edges.astype(np.float64)[..., None] / 255
    return np.floor(scene.image * DARKER * (1 - line) + 255 * line + 0.5).astype(np.uint8)


class LowRank(nn.Module):
    """Parametrization base + up @ down, over the flattened inputs of a layer."""

    def __init__(self, base: Tensor, random: torch.Generator) -> None:
        super().__init__()
        inputs = base[0].numel()
        self.down = nn.Parameter(torch.randn(RANK, inputs, generator=random) * inputs**-0.5)
        self.up = nn.Parameter(torch.zeros(base.shape[0], RANK))

    def forward(self, base: Tensor) -> Tensor:
        return base + (self.up @ self.down).view_as(base)


def add_low_rank(unet: nn.Module) -> dict[str, LowRank]:
    """Register a LowRank on every weight whose name ends in SUFFIXES; returned by the weight's name
    without `.weight`.
    """
    random = torch.Generator().manual_seed(SEED)
    found = {}
    for name in [name for name, _ in unet.named_parameters() if name.endswith(SUFFIXES)]:
        layer = unet.get_submodule(name.removesuffix(".weight"))
        low_rank = LowRank(cast(Tensor, layer.weight).detach(), random)
        parametrize.register_parametrization(layer, "weight", low_rank)
        found[name.removesuffix(".weight")] = low_rank
    return found


def widened(name: str, low_rank: LowRank, narrow: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Pairs (name in the file, tensor) of one layer of the full-width network. narrow: the layer's weight, for its
    shape.
    """
    up = low_rank.up.detach().repeat_interleave(2, dim=0)
    down = low_rank.down.detach().view(RANK, *narrow.shape[1:])
    if not name.endswith(("attn2.to_k", "attn2.to_v")):  # those read the caption, whose width does not change
        down = down.repeat_interleave(2, dim=1) / 2
    if name.endswith("to_q"):
        up = up * 0.5**0.5
    ones = [1] * (narrow.ndim - 2)
    key = f"lora_unet_{name.replace('.', '_')}"
    yield f"{key}.lora_up.weight", up.view(*up.shape, *ones).half().contiguous()
    yield f"{key}.lora_down.weight", down.half().contiguous()
    yield f"{key}.alpha", torch.tensor(float(RANK))


def train_style(steps: int = STEPS) -> Path:
    """Train the LoRA from the start (minutes); returns its file."""
    stage = StageRun("style")
    unet = new_unet().requires_grad_(False)
    unet.load_state_dict(
        {n: t.float() for n, t in load_file(stage.folder.parent / "base" / "unet_narrow.safetensors").items()}
    )
    shapes = {name: value for name, value in unet.state_dict().items()}
    low_ranks = add_low_rank(unet)
    parameters = [value for low_rank in low_ranks.values() for value in low_rank.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    stage.say(event="start", parameters=sum(p.numel() for p in parameters))
    latents, contexts, table = *_data(stage), sigmas()
    for step, seconds in unpaused_steps(0, steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cosine(step, steps, WARMUP)
        random = generator(SEED, "style", step)
        rows = torch.randint(SCENES, (BATCH,), generator=random)
        with parametrize.cached():
            error = loss_at(unet, latents[rows].float(), contexts[rows].float(), table, random)
            error.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            stage.say(step=step + 1, loss=round(error.item(), 5), seconds=round(seconds, 1))
    _show(unet, stage)
    tensors = dict(
        part for name, low_rank in low_ranks.items() for part in widened(name, low_rank, shapes[f"{name}.weight"])
    )
    return save(stage.folder / LORA, tensors)


def _data(stage: StageRun) -> tuple[Tensor, Tensor]:
    """Training data: latents (SCENES, 4, h, w) of scenes at night and their captions' contexts (SCENES, 77, 768)."""
    model, clip = trained_autoencoder(stage.folder), text_model(stage.folder)
    scenes = [draw(SEED, index, SIDE) for index in range(SCENES)]
    images = torch.stack([torch.from_numpy(at_night(scene)) for scene in scenes])
    latents = torch.cat([latents_of(model, part) for part in images.split(32)])
    return latents, torch.stack([context(clip, scene.caption) for scene in scenes]).half()


@torch.no_grad()
def _show(unet: nn.Module, stage: StageRun) -> None:
    clip: Any = text_model(stage.folder)
    captions = [draw(SEED, 10**6 + index, SIDE).caption for index in range(8)]
    contexts, empty = torch.stack([context(clip, c) for c in captions]), context(clip, "")[None].repeat(8, 1, 1)
    noise = torch.randn(8, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(SEED))
    pixels = autoencoder.decode(trained_autoencoder(stage.folder), sample(unet, noise, contexts, empty, 3.0))
    picture_grid(pixels.permute(0, 2, 3, 1), stage.folder / "samples.png")
