"""Base model of illustrations: a UNet with the layout of SD1.5 and half its channels in training, on pictures
and their captions.

All inputs of the steps are computed once per picture: its latents by the trained autoencoder and its caption's 77
vectors by the host's text encoder. A first slice may have smaller pictures, whose steps take less time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...controlnext_core.picturebook import draw
from ...controlnext_training.objective import OBJECTIVES, loss, noisy
from ...controlnext_training.seeding import generator
from ..tiny_models.storage import save, write_atomically
from . import autoencoder
from .computing import quick
from .muon import Muon
from .running import Slice, StageRun, picture_grid, wait_while_paused

SEED = 11
PICTURES, PART, SIDE = 3072, 512, 192  # number of pictures, of those prepared at once, and their side in pixels
BATCH = 16
RATE, ADAM_RATE = 0.02, 1e-3
EMA_DECAY = 0.995
SLICE = 90 * 60.0  # seconds
MIDDLE = (0.3, 6.0)  # noise levels of every second sample
NO_CAPTION = 0.1  # share of the samples without a caption
SHOW_EVERY = 500  # steps
FILE = "unet_narrow.safetensors"
EPSILON = OBJECTIVES["epsilon"]
LAYOUT: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 160,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 1],
    "num_heads": 8,
    "use_spatial_transformer": True,
    "context_dim": 768,
    "transformer_depth": [0, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 1, 1],  # the last block first
    "legacy": False,
}
MATRICES = (
    "in_layers.2.weight",
    "out_layers.3.weight",
    "skip_connection.weight",
    "op.weight",
    "conv.weight",
    "proj_in.weight",
    "proj_out.weight",
    "to_q.weight",
    "to_k.weight",
    "to_v.weight",
    "to_out.0.weight",
    "net.0.proj.weight",
    "net.2.weight",
)
"""Endings of the names of weights whose steps are made orthogonal."""
ZERO_AT_FIRST = ("out_layers.3", "proj_out", "out.2")


def new_unet() -> nn.Module:
    """Initial UNet of the host with LAYOUT; layers that end a residual branch start at zero."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    unet = UNetModel(**LAYOUT, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    random = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, value in unet.named_parameters():
            if value.ndim > 1:
                std = 0.0 if name.removesuffix(".weight").endswith(ZERO_AT_FIRST) else value[0].numel() ** -0.5
                value.normal_(std=std, generator=random)
            else:
                value.fill_(1.0 if name.endswith("weight") else 0.0)
    return unet.requires_grad_(True)


def trained_autoencoder(folder: Path) -> nn.Module:
    """Autoencoder trained by the previous stage, or the shipped one without it."""
    from .shipped import AUTOENCODER, SHIPPED

    made = folder.parent / "autoencoder" / autoencoder.FILE
    return autoencoder.trained(made if made.is_file() else SHIPPED / AUTOENCODER)


def text_model(folder: Path) -> Any:
    """CLIP of the host with this project's text encoder, without the layers and parts that add nothing."""
    import comfy.sd

    from ..tiny_models.storage import save as write
    from .text_encoder import text_encoder

    path = write(folder / "text.pt", text_encoder("text_model."))
    clip = comfy.sd.load_clip([str(path)], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
    layers = clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers
    del layers[1:]
    layers[0].mlp = _Nothing()
    return clip


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@torch.inference_mode()
def context(clip: Any, caption: str) -> Tensor:
    """Context (77, 768) of a caption."""
    found, _ = clip.encode_from_tokens(clip.tokenize(caption), return_pooled=True)
    return found[0]


@torch.inference_mode()
def contexts_of(clip: Any, captions: list[str]) -> Tensor:
    """Contexts (N, 77, 768) of several captions at once."""
    words = [[word for word, _ in clip.tokenize(caption)["l"][0]] for caption in captions]
    return clip.cond_stage_model.clip_l.encode(words)[0]


def data(stage: StageRun, side: int, count: int) -> dict[str, Tensor]:
    """Training data in fp16: latents (count, 4, side / 8, side / 8), contexts (count + 1, 77, 768), the last for an
    empty caption.
    """
    files = [stage.folder / f"data_{side}_{first:05d}.pt" for first in range(0, count, PART)]
    empty = stage.folder / "empty.pt"
    if not all(file.is_file() for file in (*files, empty)):
        model, clip = trained_autoencoder(stage.folder), text_model(stage.folder)
        for number, file in enumerate(files):
            if not file.is_file():
                stage.say(event="preparing", first=number * PART, pictures=PART, side=side)
                _save_part(file, model, clip, side, number * PART)
        nothing = context(clip, "")[None].half()
        write_atomically(empty, lambda path: torch.save(nothing, path))
    parts = [torch.load(file, mmap=True, weights_only=True) for file in files]
    latents = torch.cat([part["latents"] for part in parts])[:count]
    contexts = torch.cat([part["contexts"] for part in parts])[:count]
    contexts = torch.cat([contexts, torch.load(empty, weights_only=True)])
    std, mean = torch.std_mean(latents.float(), dim=(0, 2, 3))
    stage.say(event="data", mean=mean.tolist(), std=std.tolist())
    return {"latents": latents, "contexts": contexts}


def _save_part(file: Path, model: nn.Module, clip: Any, side: int, first: int) -> None:
    """Save latents and contexts of PART pictures from `first` on."""
    latents, contexts = [], []
    for start in range(first, first + PART, 32):
        wait_while_paused()
        pictures = [draw(SEED, index, side) for index in range(start, start + 32)]
        latents.append(latents_of(model, torch.stack([torch.from_numpy(s.image) for s in pictures])).half())
        contexts.append(contexts_of(clip, [scene.caption for scene in pictures]).half())
    found = {"latents": torch.cat(latents), "contexts": torch.cat(contexts)}
    write_atomically(file, lambda path: torch.save(found, path))


@torch.inference_mode()
def latents_of(model: nn.Module, images: Tensor) -> Tensor:
    """Encode images (N, H, W, 3) as bytes to latents (N, 4, H/8, W/8)."""
    pixels = images.permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last) / 255
    with quick():
        return autoencoder.encode(model, pixels).float()


def sigmas() -> Tensor:
    """Noise levels of the host for SD1.5 (1000,), ascending."""
    import comfy.model_sampling

    return comfy.model_sampling.ModelSamplingDiscrete().sigmas.float()


def predict(unet: nn.Module, x: Tensor, sigma: Tensor, steps: Tensor, contexts: Tensor) -> Tensor:
    """Predict epsilon for x (B, 4, h, w) at sigma (B,) = sigmas[steps], in fp32."""
    scaled = x / (1 + sigma.square()).sqrt().view(-1, 1, 1, 1)
    with quick():
        return unet(scaled, steps.float(), contexts, transformer_options=_options()).float()


def _options() -> dict[str, Any]:
    return {"optimized_attention_override": _attention}


def _attention(_chosen: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
    """Attention function for the host, written out: for so few positions torch's takes many times as long in the
    backward pass.

    q, k, v: (B, positions, heads * width).
    """
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


def train_base(seconds: float = SLICE, side: int = SIDE, pictures: int = PICTURES, batch: int = BATCH) -> Path:
    """Train one slice of `seconds`, not counting drawing and encoding; returns the file with the averaged weights of
    the half-width network in fp16.

    A slice that was stopped is resumed; after a complete one another begins. The first starts from the shipped weights.
    """
    from .shipped import SHIPPED, UNET

    stage, model = StageRun("base"), new_unet()
    found, table = data(stage, side, pictures), sigmas()
    run = Slice(stage, model, Muon(model.named_parameters(), RATE, ADAM_RATE, MATRICES), EMA_DECAY)
    run.go_on(seconds, SHIPPED / UNET)
    for step in run.steps(seconds, lambda: _loss(model, found, table, batch, run.step)):
        if step % SHOW_EVERY == 0:
            show(run.average.weights, stage.folder, f"samples_{step:06d}.png", side)
    show(run.average.weights, stage.folder, f"samples_{run.step:06d}.png", side)
    return save(stage.folder / FILE, {name: value.half() for name, value in run.average.weights.items()})


def _loss(unet: nn.Module, found: Mapping[str, Tensor], table: Tensor, batch: int, step: int) -> Tensor:
    random, count = generator(SEED, "base", step), len(found["latents"])
    rows = torch.randint(count, (batch,), generator=random)
    captions = torch.where(torch.rand(batch, generator=random) < NO_CAPTION, count, rows)
    return loss_at(unet, found["latents"][rows].float(), found["contexts"][captions].float(), table, random)


def loss_at(unet: nn.Module, z: Tensor, contexts: Tensor, table: Tensor, random: torch.Generator) -> Tensor:
    """Mean loss of latents z (B, 4, h, w) with their captions.

    Every second noise level is log-uniform in MIDDLE, where edges and colors are decided, the others are evenly spaced
    in the table. The factor (1 + sigma)^2 makes the squared error of epsilon that of a flow's velocity, in which high
    noise keeps its weight.
    """
    count = len(z)
    noise = torch.randn(z.shape, generator=random)
    even = (torch.arange(count) + torch.rand(count, generator=random)) / count * len(table)
    low, high = (math.log(value) for value in MIDDLE)
    middle = torch.exp(low + (high - low) * torch.rand(count, generator=random))
    times = torch.where(torch.arange(count) % 2 == 0, even.long(), torch.searchsorted(table, middle))
    sigma = table[times]
    out = predict(unet, noisy(z, noise, sigma, EPSILON), sigma, times, contexts)
    return (loss(out, z, noise, sigma, EPSILON) * (1 + sigma).square()).mean()


@torch.no_grad()
def show(
    weights: Mapping[str, Tensor], folder: Path, name: str, side: int = SIDE, count: int = 8, cfg: float = 3.0
) -> Path:
    """Save pictures of unseen captions, with guidance, above pictures without a caption; the captions beside them as
    text.
    """
    unet = new_unet().requires_grad_(False)
    unet.load_state_dict(dict(weights))
    clip = text_model(folder)
    captions = [draw(SEED, 10**6 + index, side).caption for index in range(count)]
    contexts, empty = torch.stack([context(clip, c) for c in captions]), context(clip, "")[None].repeat(count, 1, 1)
    noise = torch.randn(count, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(SEED))
    latents = torch.cat([sample(unet, noise, contexts, empty, cfg), sample(unet, noise, empty, empty, 1.0)])
    pixels = autoencoder.decode(trained_autoencoder(folder), latents)
    write_atomically(folder / "samples.txt", lambda file: file.write_text("\n".join(captions), "utf-8"))
    return picture_grid(pixels.permute(0, 2, 3, 1), folder / name)


def sample(unet: nn.Module, noise: Tensor, positive: Tensor, negative: Tensor, cfg: float, steps: int = 20) -> Tensor:
    """Sample latents from noise (N, 4, h, w), with Euler's method at evenly spaced timesteps."""
    table = sigmas()
    times = torch.linspace(len(table) - 1, 0, steps).round().long()
    x = noise * (1 + table[-1].square()).sqrt()
    for place, time in enumerate(times):
        sigma = table[time].expand(len(x))
        out = predict(unet, x, sigma, time.expand(len(x)), positive)
        if cfg != 1:
            without = predict(unet, x, sigma, time.expand(len(x)), negative)
            out = without + cfg * (out - without)
        following = table[times[place + 1]] if place + 1 < steps else torch.tensor(0.0)
        x = x + (following - table[time]) * out
    return x
