"""A small autoencoder and a small base of Wan's shape, trained on moving scenes; video_outpainting.py uses them.

Both are the host's own classes and become files that its loaders take: the autoencoder 16 channels wide, the base 128.
Training ends after a given time, and the learning rate falls with it. The base goes on from its file where it has one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..controlnext_training.seeding import generator
from ..tools.demo_weights.muon import Muon
from ..tools.demo_weights.running import Average, StageRun, picture_grid
from ..tools.tiny_models.storage import save, write_atomically
from .outpainting_scenes import PAINTS, SETTINGS, THINGS, draw

SEED = 19
SIDE, FRAMES = 64, 5
"""Pixels of a clip's side, and its frames: two latent frames."""
CHANNELS, VAE_WIDTH = 16, 16
CLIPS = 1536
"""Clips that train the base."""
CROPPED, CROP, VAE_BATCH = 384, 40, 4
"""Clips that train the autoencoder, the side of their random parts, and how many parts are in a step."""
LATENT_NOISE, MOMENTS_WEIGHT, EDGE_WEIGHT = 0.1, 0.05, 0.5
WIDTH, LAYERS, FEED_FORWARD, TEXT = 128, 8, 512, 4096
BATCH, RATE, ADAM_RATE = 16, 0.02, 2e-3
MATRICES = tuple(
    f"{part}.weight" for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "ffn.0", "ffn.2")
)
WARMUP, EMA_DECAY, NO_CAPTION = 0.02, 0.995, 0.1
SHIFT = 3.0
"""Shift of the noise levels, in training and sampling."""
PHRASES = 4
"""Places of a caption; those that it does not need are zero."""
SAY_EVERY = 25
VAE_FILE, BASE_FILE = "outpainting_vae.safetensors", "outpainting_wan.safetensors"
VOCABULARY = (*SETTINGS, *(f"{paint} {kind}" for paint in PAINTS for kind in THINGS))


class Words:
    """A text encoder with the interface of the host's CLIP: a fixed random vector for each phrase between commas."""

    def __init__(self) -> None:
        self.cond_stage_model = nn.Embedding(len(VOCABULARY), TEXT)
        random = torch.Generator().manual_seed(SEED)
        self.cond_stage_model.weight.data.copy_(torch.randn(len(VOCABULARY), TEXT, generator=random))

    def tokenize(self, text: str) -> list[int]:
        return [VOCABULARY.index(phrase) for phrase in text.split(", ") if phrase][:PHRASES]

    def encode_from_tokens(self, tokens: list[int], return_dict: bool = True) -> dict[str, Tensor]:
        """`cond`: (1, PHRASES, TEXT)."""
        context = torch.zeros(1, PHRASES, TEXT)
        context[0, : len(tokens)] = self.cond_stage_model.weight.detach()[tokens]
        return {"cond": context}


def clip(number: int, seed: int = SEED) -> tuple[Tensor, str]:
    """(frames (FRAMES, SIDE, SIDE, 3) in bytes, caption) of a scene that trains, or of another seed."""
    scene = draw(seed, number, SIDE, FRAMES)
    return torch.from_numpy(scene.frames), scene.caption


def pixels(frames: Tensor) -> Tensor:
    """Bytes (B, F, H, W, 3) -> (B, 3, F, H, W) in [-1, 1]."""
    return frames.movedim(-1, 1).float() / 127.5 - 1


def timed(seconds: float) -> Iterator[tuple[int, float]]:
    """(step, factor of the learning rate) until the time is over: a short rise, then half a cosine to nothing."""
    begun = time.monotonic()
    step = 0
    while (part := (time.monotonic() - begun) / seconds) < 1:
        yield step, min(1.0, part / WARMUP + 0.01) * 0.5 * (1 + math.cos(math.pi * part))
        step += 1


class Passing(nn.Module):
    """In place of a residual block that adds nothing; hosts differ in the further arguments of their blocks."""

    def forward(self, x: Tensor, *caches: Any, **others: Any) -> Tensor:
        return x


def new_autoencoder() -> Any:
    """The host's autoencoder of Wan 2.1, with one working residual block a level; `whole` gives the tensors of all."""
    from comfy.ldm.wan.vae import ResidualBlock

    model = _autoencoder()
    for part in (model.encoder.downsamples, model.decoder.upsamples):
        first = True
        for index, layer in enumerate(part):
            if not isinstance(layer, ResidualBlock):
                first = True
                continue
            if not first and layer.in_dim == layer.out_dim:
                part[index] = Passing()
            first = False
    model.encoder.middle[1] = model.decoder.middle[1] = Passing()
    return model


def _autoencoder() -> Any:
    """The host's class whose residual blocks and attention add nothing yet."""
    from comfy.ldm.wan.vae import AttentionBlock, ResidualBlock, WanVAE

    model = WanVAE(dim=VAE_WIDTH, z_dim=CHANNELS, temperal_downsample=[False, True, True])  # as the host loads it
    random = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("gamma"):
                value.fill_(1.0)
            elif value.ndim > 1:
                value.normal_(std=value[0].numel() ** -0.5, generator=random)
            else:
                value.zero_()
        for layer in model.modules():
            if isinstance(layer, ResidualBlock):
                layer.residual[-1].weight.zero_()
            if isinstance(layer, AttentionBlock):
                layer.proj.weight.zero_()
    return model


def whole(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of the host's class, with what the trained ones lack, and latents as Wan 2.1's are scaled."""
    from comfy.latent_formats import Wan21

    tensors = {name: weights.get(name, value).clone() for name, value in _autoencoder().state_dict().items()}
    scale = Wan21()
    mean, std = scale.latents_mean.flatten(), scale.latents_std.flatten()
    tensors["conv1.weight"][:CHANNELS] *= std[:, None, None, None, None]
    tensors["conv1.bias"][:CHANNELS] = tensors["conv1.bias"][:CHANNELS] * std + mean
    into = tensors["conv2.weight"] / std[None, :, None, None, None]
    tensors["conv2.bias"] -= torch.einsum("oixyz,i->o", into, mean)
    tensors["conv2.weight"] = into
    return tensors


def autoencoder_loss(model: Any, x: Tensor, noise: Tensor) -> Tensor:
    """Absolute error of colours and of differences between neighbours, and what holds latents to mean 0, variance 1.

    x: (B, 3, F, H, W) in [-1, 1]; noise: as the latents, which it is added to.
    """
    latent = model.encode(x)
    painted = model.decode(latent + noise)
    edges = sum((torch.diff(painted, dim=axis) - torch.diff(x, dim=axis)).abs().mean() for axis in (3, 4))
    variance, mean = torch.var_mean(latent, dim=(0, 2, 3, 4))
    moments = (mean.square() + variance.log().square()).mean()
    return (painted - x).abs().mean() + EDGE_WEIGHT * edges + MOMENTS_WEIGHT * moments


def train_autoencoder(folder: Path, seconds: float, count: int = CROPPED) -> Path:
    """Train the autoencoder for a time, and write its file; count: number of clips."""
    stage = StageRun("autoencoder", folder)
    model = new_autoencoder()
    clips = torch.stack([clip(number)[0] for number in range(count)])
    inner = (name for name, value in model.named_parameters() if value.ndim > 3 and value.shape[0] % CHANNELS == 0)
    matrices = tuple(name for name in inner if not name.endswith("gamma") and name != "encoder.conv1.weight")
    optimizer = Muon(model.named_parameters(), RATE, ADAM_RATE, matrices)
    average = Average(model, EMA_DECAY)

    def update(step: int, factor: float) -> float:
        random = generator(SEED, "autoencoder", step)
        rows = torch.randint(count, (VAE_BATCH,), generator=random).tolist()
        places = torch.randint(SIDE - CROP + 1, (VAE_BATCH, 2), generator=random).tolist()
        parts = [clips[r, :, y : y + CROP, x : x + CROP] for r, (y, x) in zip(rows, places, strict=True)]
        std = LATENT_NOISE * torch.rand(VAE_BATCH, 1, 1, 1, 1, generator=random)
        cells = (VAE_BATCH, CHANNELS, 1 + (FRAMES - 1) // 4, CROP // 8, CROP // 8)
        loss = autoencoder_loss(model, pixels(torch.stack(parts)), std * torch.randn(cells, generator=random))
        _step(loss, model, optimizer, factor)
        average.update(model)
        return loss.item()

    steps = _fit(stage, seconds, update)
    stage.say(event="finished", steps=steps)
    with torch.no_grad():
        model.load_state_dict(average.weights, strict=False)
        shown = pixels(torch.stack([clip(number, SEED + 1)[0] for number in range(4)]))
        back = torch.cat([shown, model.decode(model.encode(shown))]).clamp(-1, 1) / 2 + 0.5
    picture_grid(back[:, :, -1].permute(0, 2, 3, 1), stage.folder / "back.png", 4)
    return save(stage.folder / VAE_FILE, whole(average.weights))


def _step(loss: Tensor, model: nn.Module, optimizer: Muon, factor: float) -> None:
    """One step; factor: of the learning rates."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step(factor)
    optimizer.zero_grad()


def _fit(stage: StageRun, seconds: float, update: Callable[[int, float], float]) -> int:
    """Steps of `update` until the time is over; their number."""
    losses: list[float] = []
    for step, factor in timed(seconds):
        losses.append(update(step, factor))
        if len(losses) % SAY_EVERY == 0:
            stage.say(step=step + 1, loss=round(math.fsum(losses[-SAY_EVERY:]) / SAY_EVERY, 4), rate=round(factor, 3))
    return len(losses)


def new_base() -> Any:
    """The host's network of Wan 2.1, text to video; its blocks and its output start at nothing."""
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    settings: dict[str, Any] = {"model_type": "t2v", "in_dim": CHANNELS, "out_dim": CHANNELS, "dim": WIDTH}
    settings |= {"ffn_dim": FEED_FORWARD, "num_heads": WIDTH // 128, "num_layers": LAYERS, "freq_dim": 256}
    model = WanModel(**settings, text_dim=TEXT, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    random = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1 and not name.endswith("modulation"):
                value.normal_(std=value[0].numel() ** -0.5, generator=random)
            elif name.endswith("modulation"):
                value.normal_(std=WIDTH**-0.5, generator=random)
            else:
                value.fill_(float(name.endswith("weight")))
        for name, value in model.named_parameters():
            if name.endswith(("self_attn.o.weight", "cross_attn.o.weight", "ffn.2.weight", "head.head.weight")):
                value.zero_()
    return model.requires_grad_(True)


class QuickEncoder:
    """The trained autoencoder without its idle blocks, which cost the host's most of its time."""

    def __init__(self, path: Path) -> None:
        self.model = new_autoencoder().requires_grad_(False)
        self.model.load_state_dict(load_file(path), strict=False)

    def encode(self, frames: Tensor) -> Tensor:
        """Latents as those of the host's VAE. frames: (F, H, W, 3) in [0, 1]."""
        found: Tensor = self.model.encode(2 * frames.movedim(-1, 0)[None] - 1)
        return found


def prepared(folder: Path, vae: Any, count: int = CLIPS) -> dict[str, Any]:
    """`latents` (count, CHANNELS, T, h, w) as the base takes them, and `captions`, from their file or made now."""
    file = folder / f"latents_{count}.pt"
    if not file.is_file():
        clips = [clip(number) for number in range(count)]
        latents = [latent_of(vae, frames.float() / 255) for frames, _ in clips]
        found = {"latents": torch.cat(latents).half(), "captions": [caption for _, caption in clips]}
        write_atomically(file, lambda path: torch.save(found, path))
    prepared: dict[str, Any] = torch.load(file, weights_only=True)
    return prepared


@torch.inference_mode()
def latent_of(vae: Any, frames: Tensor) -> Tensor:
    """Frames (F, H, W, 3) in [0, 1] -> (1, CHANNELS, T, h, w) as the base takes them."""
    from comfy.latent_formats import Wan21

    latent: Tensor = Wan21().process_in(vae.encode(frames).float())
    return latent


def train_base(folder: Path, seconds: float, count: int = CLIPS) -> Path:
    """Train the base for a time, and write its file; count: number of clips."""
    from ..controlnext_training.base_model.blocks import host_in_training

    stage = StageRun("base", folder)
    vae = QuickEncoder(folder / "autoencoder" / VAE_FILE)
    data, words = prepared(stage.folder, vae, count), Words()
    texts = torch.cat([words.encode_from_tokens(words.tokenize(text))["cond"] for text in data["captions"]])
    model = new_base()
    if (file := stage.folder / BASE_FILE).is_file():
        model.load_state_dict(load_file(file))
    optimizer = Muon(model.named_parameters(), RATE, ADAM_RATE, MATRICES)
    average = Average(model, EMA_DECAY)

    def update(step: int, factor: float) -> float:
        random = generator(SEED, "base", step)
        rows = torch.randint(count, (BATCH,), generator=random)
        kept = (torch.rand(BATCH, 1, 1, generator=random) >= NO_CAPTION).float()
        loss = base_loss(model, data["latents"][rows].float(), texts[rows] * kept, random)
        _step(loss, model, optimizer, factor)
        average.update(model)
        return loss.item()

    with host_in_training():
        steps = _fit(stage, seconds, update)
    stage.say(event="finished", steps=steps)
    return save(file, dict(average.weights))


def base_loss(model: Any, z: Tensor, text: Tensor, random: torch.Generator) -> Tensor:
    """Mean square of what is wrong with noise - z at shifted, evenly spread noise levels."""
    even = torch.rand(len(z), generator=random)
    s = SHIFT * even / (1 + (SHIFT - 1) * even)
    noise = torch.randn(z.shape, generator=random)
    level = s[:, None, None, None, None]
    found = model((1 - level) * z + level * noise, 1000 * s, text)
    return (found - (noise - z)).square().mean()
