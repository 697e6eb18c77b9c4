"""Training on the narrow transformers: the host's models in MODELs, with encoders that are one matrix and one table.

The autoencoder's latent is the picture itself, averaged over 8 x 8 pixels, its three colours spread over 16 channels;
the text encoder gives each word of a caption numbers of its own, so that captions differ in length.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from comfyui_controlnext.tests.training_fixtures import CPU, drawn, small
from comfyui_controlnext.tests.transformer_fixtures import NARROW, narrow_model
from torch import Tensor, nn

PICTURES = ("sd3", "flux", "chroma", "qwen_image", "lumina2", "z_image")
CLIPS = ("wan", "wan_5b")
"""Families that train on clips of one latent."""
FAMILIES = (*PICTURES, *CLIPS)
CLIP_FRAMES = 5
COLORS = 3.5
"""A colour, whose standard deviation is about 0.3 in [0, 1], becomes a latent of about 1."""


class Averaging:
    """A linear autoencoder with the interface of the host's VAE: a latent cell is the mean colour of 8x8 pixels."""

    def __init__(self, model: Any, frames: bool, seed: int) -> None:
        self.format, self.frames = model.latent_format, frames
        self.first_stage_model = nn.Linear(3, 16, bias=False)
        mix = torch.linalg.qr(torch.randn(16, 3, generator=torch.Generator().manual_seed(seed)))[0]
        self.first_stage_model.weight.data.copy_(mix * COLORS * (16 / 3) ** 0.5)

    def encode(self, pixels: Tensor) -> Tensor:
        """(F, H, W, 3) in [0, 1] -> (F, 16, H/8, W/8), or with a dimension of frames, as the host's own gives them."""
        small = F.avg_pool2d(pixels.movedim(-1, 1) - 0.5, 8)
        latent = torch.einsum("oc,fchw->fohw", self.first_stage_model.weight.detach(), small)
        return self.format.process_out(latent[:, :, None] if self.frames else latent)

    def decode(self, latent: Tensor) -> Tensor:
        latent = self.format.process_in(latent)
        latent = latent[:, :, 0] if latent.ndim == 5 else latent
        colors = torch.einsum("co,fohw->fchw", torch.linalg.pinv(self.first_stage_model.weight.detach()), latent)
        pixels = F.interpolate(colors + 0.5, scale_factor=8).clamp(0, 1).movedim(1, -1)
        return pixels[:, None] if self.frames else pixels


class AveragingClips:
    """A linear autoencoder of clips: a cell is the mean colour of its pixels, in the four frames of a latent frame."""

    def __init__(self, model: Any, channels: int, pixels: int, seed: int) -> None:
        self.format, self.pixels = model.latent_format, pixels
        self.first_stage_model = nn.Linear(3, channels, bias=False)
        mix = torch.linalg.qr(torch.randn(channels, 3, generator=torch.Generator().manual_seed(seed)))[0]
        self.first_stage_model.weight.data.copy_(mix * COLORS * (channels / 3) ** 0.5)

    def encode(self, pixels: Tensor) -> Tensor:
        """(4n + 1, H, W, 3) in [0, 1] -> (1, C, n + 1, h, w)"""
        small = F.avg_pool2d(pixels.movedim(-1, 1) - 0.5, self.pixels)
        groups = torch.stack([small[0], *(group.mean(0) for group in small[1:].split(4) if len(group))])
        return self.format.process_out(
            torch.einsum("oc,tchw->othw", self.first_stage_model.weight.detach(), groups)[None]
        )

    def decode(self, latent: Tensor) -> Tensor:
        latent = self.format.process_in(latent)[0]
        colors = torch.einsum("co,othw->tchw", torch.linalg.pinv(self.first_stage_model.weight.detach()), latent)
        frames = torch.cat([colors[:1], colors[1:].repeat_interleave(4, 0)])
        return F.interpolate(frames + 0.5, scale_factor=self.pixels).clamp(0, 1).movedim(1, -1)[None]


class MovingScenes:
    """Drawn scenes that move to the side, two pixels a frame, as clips."""

    def __init__(self, count: int, frames: int) -> None:
        self.still, self.frames = drawn(count), frames
        self.sizes, self.captions = self.still.sizes, self.still.captions
        self.fingerprint = f"{self.still.fingerprint} {frames}"

    def __len__(self) -> int:
        return len(self.still)

    def share(self, index: int) -> Any:
        return self.still.share(index)

    def place(self, index: int, variant: int = 0) -> Any:
        return self.still.place(index)

    def job(self, index: int, seed: int, position: int, whole: bool, variant: int = 0) -> Any:
        return lambda: self.load(index, seed, position)

    def frame_keys(self, index: int, seed: int = 0, position: int = 0, variant: int = 0) -> tuple[str, ...]:
        return tuple(f"{self.still.frame_keys(index)[0]} {number}" for number in range(self.frames))

    def load(self, index: int, seed: int = 0, position: int = 0) -> Any:
        from dataclasses import replace

        scene = self.still.load(index)
        frames, hints = (
            torch.cat([tensor.roll(2 * number, 2) for number in range(self.frames)])
            for tensor in (scene.frames, scene.hints)
        )
        mask = None if scene.mask is None else scene.mask.expand(self.frames, -1, -1)
        return replace(scene, frames=frames, hints=hints, mask=mask, frame_keys=self.frame_keys(index))


class Words:
    """A text encoder with the interface of the host's CLIP: a fixed random vector for each word."""

    def __init__(self, width: int, pooled: int | None, seed: int) -> None:
        self.width, self.pooled = width, pooled
        self.cond_stage_model = nn.Embedding(64, width)
        self.cond_stage_model.weight.data.copy_(torch.randn(64, width, generator=torch.Generator().manual_seed(seed)))

    def tokenize(self, text: str) -> list[int]:
        return [sum(word.encode()) % 63 + 1 for word in text.split()] or [0]

    def encode_from_tokens(self, tokens: list[int], return_dict: bool) -> dict[str, Any]:
        assert return_dict
        context = self.cond_stage_model(torch.tensor(tokens)).detach()
        found: dict[str, Any] = {"cond": context[None]}
        if self.pooled:
            found["pooled_output"] = context.mean(dim=0)[None, : self.pooled]
        return found


def as_patcher(model: Any) -> Any:
    from comfy.model_patcher import ModelPatcher

    return ModelPatcher(model, CPU, CPU)


@functools.cache
def narrow_base(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A narrow model with its encoders, as something to train on."""
    return base_on(narrow_model(family, dtype), family)


def base_on(model: Any, family: str) -> Any:
    from comfyui_controlnext.controlnext_training.base_model.encode import BaseWithEncoders

    row = NARROW[family]
    seed = FAMILIES.index(family)  # what they give is cached by the identity of an encoder
    clips = family in CLIPS
    vae = AveragingClips(model, row.channels, row.pixels, seed) if clips else Averaging(model, row.frames, seed)
    words = Words(row.text, row.pooled, seed)
    return BaseWithEncoders(as_patcher(model), vae, words)


def config_for(family: str, **settings: Any) -> Any:
    return small(**({"variant": family, "learning_rate": 1e-3, "clip_frames": CLIP_FRAMES} | settings))


def scenes(count: int = 4, family: str = "") -> Any:
    """Drawn scenes, clips for families that train on them, whose captions are of several lengths."""
    found = MovingScenes(count, CLIP_FRAMES) if family in CLIPS else drawn(count)
    assert len({len(caption.split()) for caption in found.captions}) > 1
    return found


def train_narrow(folder: Path, family: str, watch: Any = None, base: Any = None, **settings: Any) -> Path:
    """A whole run; the trained file."""
    from comfyui_controlnext.tests.training_fixtures import train_in

    return train_in(folder, base or narrow_base(family), config_for(family, **settings), watch, scenes(4, family))


def with_model(base: Any, model: Any) -> Any:
    """A copy of `base` whose MODEL is `model`."""
    from dataclasses import replace

    return replace(base, model=model, _identities={})


def drawn_batch(loop: Any, count: int) -> Any:
    """The first samples with the noise and the levels of the run's first positions."""
    from comfyui_controlnext.controlnext_training.step import draw

    samples = [loop.samples.store.sample(index, index) for index in range(count)]
    return draw(samples, range(count), loop.objective, loop.config, loop.controlled)


def on_the_host(model: Any, batch: Any) -> Tensor:
    """Output of the host's own apply_model for a batch, in inference mode and with torch's attention."""
    import comfy.model_management
    from comfy.samplers import cond_cat
    from comfyui_controlnext.controlnext_training.base_model.trainable_copy import plain_attention

    ready = [
        {name: cond.process_cond(batch_size=1, device=CPU, area=None) for name, cond in one.items()}
        for one in batch.conditions
    ]
    options = {"optimized_attention_override": plain_attention}
    comfy.model_management.unload_all_models()  # takes patches of other tests off
    with torch.no_grad():
        given = cond_cat(ready)
        return model.apply_model(batch.noise.clone(), batch.sigma, transformer_options=options, **given)


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's r of two tensors of one shape, over all numbers."""
    a, b = (part.double().flatten() - part.double().mean() for part in (one, other))
    return float((a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
