"""Another fine-tune of the demo's base, for showing that its controls need no training of their own on it: the same
scenes as photographic negatives, all weights trained for a few minutes. It is not shipped.

As the base it trains half as wide as the host runs it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...controlnext_core.picturebook import Picture
from ...controlnext_training.seeding import generator
from ...controlnext_training.synthetic import draw
from . import autoencoder
from .assembling import write_checkpoint
from .packing import unpack
from .running import StageRun, cosine, unpaused_steps
from .scene_base import SIDE, contexts_of, latents_of, loss_at, new_unet, sigmas, text_model
from .shipped import AUTOENCODER, SHIPPED, UNET
from .widening import widen

OTHER = "shapes_negative_sd15.ckpt"
SEED = 17
SCENES, STEPS, BATCH = 512, 400, 16
LEARNING_RATE, WARMUP = 3e-4, 20


def in_negative(scene: Picture) -> np.ndarray:
    """(H, W, 3) bytes."""
    return 255 - scene.image


def make_other_base(path: Path, steps: int | None = None, shipped: Path = SHIPPED) -> Path:
    """Train it from the shipped base, unless `path` is there and of that base; the checkpoint."""
    steps = steps or STEPS
    stamp = path.with_suffix(".txt")
    made_of = f"{hashlib.blake2b((shipped / UNET).read_bytes(), digest_size=8).hexdigest()}, {steps} steps"
    if path.is_file() and stamp.is_file() and stamp.read_text("utf-8") == made_of:
        return path
    stage = StageRun("other_base")
    painter = {name: value.float() for name, value in unpack(load_file(shipped / AUTOENCODER)).items()}
    unet = new_unet()
    unet.load_state_dict({name: value.float() for name, value in unpack(load_file(shipped / UNET)).items()})
    _train(unet, *_data(stage, painter), steps, stage)
    wide = {name: value.half() for name, value in widen(dict(unet.state_dict())).items()}
    write_checkpoint(path, wide, autoencoder.whole(painter))
    stamp.write_text(made_of, "utf-8")
    return path


def _data(stage: StageRun, painter: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Latents (SCENES, 4, h, w) of scenes in negative and their captions' contexts (SCENES, 77, 768)."""
    model, clip = autoencoder.new_autoencoder().requires_grad_(False), text_model(stage.folder)
    model.load_state_dict(painter)
    scenes = [draw(SEED, index, SIDE) for index in range(SCENES)]
    images = torch.stack([torch.from_numpy(in_negative(scene)) for scene in scenes])
    latents = torch.cat([latents_of(model, part) for part in images.split(32)])
    captions = [scene.caption for scene in scenes]
    contexts = [contexts_of(clip, captions[first : first + 32]).half() for first in range(0, SCENES, 32)]
    return latents, torch.cat(contexts)


def _train(unet: nn.Module, latents: Tensor, contexts: Tensor, steps: int, stage: StageRun) -> None:
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    table = sigmas()
    for step, seconds in unpaused_steps(0, steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cosine(step, steps, WARMUP)
        random = generator(SEED, "other base", step)
        rows = torch.randint(SCENES, (BATCH,), generator=random)
        error = loss_at(unet, latents[rows].float(), contexts[rows].float(), table, random)
        error.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            stage.say(step=step + 1, loss=round(error.item(), 5), seconds=round(seconds, 1))
