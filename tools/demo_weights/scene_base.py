"""Base model of plain scenes: a UNet with the layout of SD1.5 and half its channels in training, on scenes of 128
pixels and their captions.

All inputs of the steps are computed once per scene: its latents (4, 16, 16) by the trained autoencoder and its
caption's 77 vectors by the host's text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...controlnext_training.objective import OBJECTIVES, loss, noisy
from ...controlnext_training.seeding import generator
from ...controlnext_training.synthetic import draw
from ..tiny_models.storage import save, write_atomically
from . import autoencoder
from .running import Average, StageRun, cosine, picture_grid, snapshot, unpaused_steps, wait_while_paused

SEED = 11
SCENES, PART, SIDE = 16384, 1024, 128  # number of scenes, and of those prepared at once
STEPS, BATCH = 5000, 16
LEARNING_RATE, WARMUP = 6e-4, 200
EMA_DECAY = 0.999
MIN_SNR_GAMMA = 5.0
NO_CAPTION = 0.1  # share of the samples without a caption
SHOW_EVERY = 1000
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
    """Autoencoder of earlier stages: the encoder of the first, the decoder of the second where that has run."""
    better = folder.parent / "decoder" / autoencoder.FILE
    return autoencoder.trained(better if better.is_file() else folder.parent / "autoencoder" / autoencoder.FILE)


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


def data(stage: StageRun) -> dict[str, Tensor]:
    """Training data: latents (SCENES, 4, 16, 16), contexts (SCENES + 1, 77, 768), the last for an
    empty caption; fp16.
    """
    files = [stage.folder / f"data_{first:05d}.pt" for first in range(0, SCENES, PART)]
    empty = stage.folder / "empty.pt"
    if not all(file.is_file() for file in (*files, empty)):
        model, clip = trained_autoencoder(stage.folder), text_model(stage.folder)
        for number, file in enumerate(files):
            if not file.is_file():
                stage.say(event="preparing", first=number * PART, scenes=PART)
                _save_part(file, model, clip, number * PART)
        nothing = context(clip, "")[None].half()
        write_atomically(empty, lambda path: torch.save(nothing, path))
    parts = [torch.load(file, mmap=True, weights_only=True) for file in files]
    latents = torch.cat([part["latents"] for part in parts])
    contexts = torch.cat([part["contexts"] for part in parts] + [torch.load(empty, weights_only=True)])
    std, mean = torch.std_mean(latents.float(), dim=(0, 2, 3))
    stage.say(event="data", mean=mean.tolist(), std=std.tolist())
    return {"latents": latents, "contexts": contexts}


def _save_part(file: Path, model: nn.Module, clip: Any, first: int) -> None:
    """Save latents and contexts of PART scenes from `first` on."""
    latents, contexts = [], []
    for start in range(first, first + PART, 32):
        wait_while_paused()
        scenes = [draw(SEED, index, SIDE) for index in range(start, start + 32)]
        latents.append(latents_of(model, torch.stack([torch.from_numpy(s.image) for s in scenes])).half())
        contexts.append(contexts_of(clip, [scene.caption for scene in scenes]).half())
    found = {"latents": torch.cat(latents), "contexts": torch.cat(contexts)}
    write_atomically(file, lambda path: torch.save(found, path))


@torch.inference_mode()
def latents_of(model: nn.Module, images: Tensor) -> Tensor:
    """Encode images (N, H, W, 3) as bytes to latents (N, 4, H/8, W/8)."""
    pixels = images.permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last) / 255
    with torch.autocast("cpu", torch.bfloat16):
        return autoencoder.encode(model, pixels).float()


def sigmas() -> Tensor:
    """Noise levels of the host for SD1.5 (1000,), ascending."""
    import comfy.model_sampling

    return comfy.model_sampling.ModelSamplingDiscrete().sigmas.float()


def predict(unet: nn.Module, x: Tensor, sigma: Tensor, steps: Tensor, contexts: Tensor) -> Tensor:
    """Predict epsilon for x (B, 4, h, w) at sigma (B,) = sigmas[steps], in fp32."""
    scaled = x / (1 + sigma.square()).sqrt().view(-1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
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


def train_base(steps: int = STEPS) -> Path:
    """Train, or resume; returns the file with the averaged weights of the half-width network, in fp16."""
    stage = StageRun("base")
    found, table = data(stage), sigmas()
    unet = new_unet()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average, start, state = Average(unet, EMA_DECAY), 0, stage.load()
    if state is not None:
        unet.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.restore(state["average"])
        start = state["step"]
    stage.say(event="start", step=start, parameters=sum(p.numel() for p in unet.parameters()))
    total, clock = 0.0, 0.0
    for step, seconds in unpaused_steps(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cosine(step, steps, WARMUP)
        error = _loss(unet, found, table, step)
        error.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(unet)
        total, done = total + error.item(), step + 1
        if done % 50 == 0:
            stage.say(step=done, loss=round(total / 50, 5), seconds_per_step=round((seconds - clock) / 50, 3))
            total, clock = 0.0, seconds
        if done % SHOW_EVERY == 0:
            show(average.weights, stage.folder, f"samples_{done:05d}.png")
        if stage.is_time_to_save() or done == steps:
            stage.save(snapshot(unet, optimizer, average, done))
            write_weights(average.weights, stage.folder)
    return write_weights(average.weights, stage.folder)


def write_weights(weights: Mapping[str, Tensor], folder: Path) -> Path:
    return save(folder / "unet_narrow.safetensors", {name: value.half() for name, value in weights.items()})


def _loss(unet: nn.Module, found: Mapping[str, Tensor], table: Tensor, step: int) -> Tensor:
    random = generator(SEED, "base", step)
    rows = torch.randint(SCENES, (BATCH,), generator=random)
    captions = torch.where(torch.rand(BATCH, generator=random) < NO_CAPTION, SCENES, rows)
    return loss_at(unet, found["latents"][rows].float(), found["contexts"][captions].float(), table, random)


def loss_at(unet: nn.Module, z: Tensor, contexts: Tensor, table: Tensor, random: torch.Generator) -> Tensor:
    """Mean loss of latents z (B, 4, h, w) with their captions, at noise levels spread over the whole table."""
    noise = torch.randn(z.shape, generator=random)
    place = (torch.arange(len(z)) + torch.rand(len(z), generator=random)) / len(z)
    times = (place * len(table)).long()
    sigma = table[times]
    out = predict(unet, noisy(z, noise, sigma, EPSILON), sigma, times, contexts)
    return loss(out, z, noise, sigma, EPSILON, min_snr_gamma=MIN_SNR_GAMMA).mean()


@torch.no_grad()
def show(weights: Mapping[str, Tensor], folder: Path, name: str, count: int = 8, cfg: float = 3.0) -> Path:
    """Save pictures of unseen captions, with guidance, above pictures without a caption; the captions beside them as
    text.
    """
    unet = new_unet().requires_grad_(False)
    unet.load_state_dict(dict(weights))
    clip = text_model(folder)
    captions = [draw(SEED, 10**6 + index, SIDE).caption for index in range(count)]
    contexts, empty = torch.stack([context(clip, c) for c in captions]), context(clip, "")[None].repeat(count, 1, 1)
    noise = torch.randn(count, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(SEED))
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
