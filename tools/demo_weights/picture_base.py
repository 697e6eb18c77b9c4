"""Training of the picturebook's base (mmdit.py): latents and words are computed once, slices end with packed weights.

A slice has a fixed duration. Its learning rate falls to zero at the end, and the next slice continues from its weights,
with the optimizer's state where that still exists.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...controlnext_core.picturebook import Picture, draw, draw_children
from ...controlnext_training.seeding import generator
from ..tiny_models.storage import save, write_atomically
from . import autoencoder
from .computing import device, quick
from .mmdit import CHANNELS, new_mmdit, predict, sample, shortened
from .muon import Muon
from .painter import painter_of
from .running import Slice, StageRun, picture_grid, wait_while_paused

SEED = 29
SIDE = 192  # pixels
PICTURES, CHILDREN, PART = 3072, 3072, 512  # pictures, further ones with children, and the number prepared at once
BATCH = 16
RATE, ADAM_RATE = 0.02, 1.5e-3
EMA_DECAY = 0.995
SLICE = 90 * 60.0  # seconds
SHOW_EVERY = 250  # steps
NO_CAPTION = 0.1  # share of the samples without a caption
MIDDLE, SPREAD = 0.3, 1.0  # of the logit-normal distribution of every second noise level
FILE = "picturebook_mmdit.safetensors"
Text = dict[str, Tensor]
Drawing = Callable[[int, int, int], Picture]


def text_model(folder: Path) -> Any:
    """CLIP of the host for SD3 with this project's text encoder, without the layers and parts that add nothing."""
    import comfy.sd

    from .text_encoder import text_encoder

    path = save(folder / "text.pt", text_encoder("text_model.", summary_last=True))
    clip = comfy.sd.load_clip([str(path)], clip_type=comfy.sd.CLIPType.SD3)
    layers = clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers
    del layers[1:-1]
    for layer in layers:
        layer.mlp = _Nothing()
    return clip


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@torch.inference_mode()
def texts_of(clip: Any, captions: list[str]) -> list[Text]:
    """Encode captions: `words` (n, 768), whose last row represents all that follow, and `pooled` (768,)."""
    tokens = [[word for word, _ in clip.tokenize(caption)["l"][0]] for caption in captions]
    contexts, pooled = clip.cond_stage_model.clip_l.encode(tokens)
    found = []
    for row, words in enumerate(tokens):
        end = words.index(words[-1])
        found.append({"words": shortened(contexts[row].half(), end), "pooled": pooled[row].half()})
    return found


def batch_of(texts: list[Text]) -> Text:
    """Text inputs of `mmdit.predict` for several captions."""
    lengths = torch.tensor([len(text["words"]) for text in texts])
    words = nn.utils.rnn.pad_sequence([text["words"].float() for text in texts], batch_first=True)
    pooled = torch.stack([text["pooled"].float() for text in texts])
    return {"words": words.to(device()), "lengths": lengths.to(device()), "pooled": pooled.to(device())}


def data(stage: StageRun, side: int, count: int, children: int = 0) -> tuple[Tensor, list[Text]]:
    """Training data: latents (count + children, 16, side / 8, side / 8) in fp16 and the captions' texts, the empty one
    last.
    """
    found = [(_parts(stage, "data", draw, side, count), count)]
    if children:
        found.append((_parts(stage, "children", draw_children, side, children), children))
    latents = [torch.cat([part["latents"] for part in parts])[:wanted] for parts, wanted in found]
    texts = [text for parts, wanted in found for text in [t for part in parts for t in part["texts"]][:wanted]]
    return torch.cat(latents), [*texts, found[0][0][0]["empty"]]


def _parts(stage: StageRun, name: str, drawing: Drawing, side: int, count: int) -> list[dict[str, Any]]:
    """Parts of PART pictures, read from their files or prepared."""
    files = [stage.folder / f"{name}_{side}_{first:05d}.pt" for first in range(0, count, PART)]
    network: nn.Module | None = None
    clip: Any = None
    for number, file in enumerate(files):
        if file.is_file():
            continue
        if network is None:
            network, clip = painter_of(stage.folder), text_model(stage.folder)
        stage.say(event="preparing", name=name, first=number * PART, pictures=PART, side=side)
        _prepare(file, network, clip, drawing, side, number * PART)
    return [torch.load(file, weights_only=True) for file in files]


def _prepare(file: Path, network: nn.Module, clip: Any, drawing: Drawing, side: int, first: int) -> None:
    latents: list[Tensor] = []
    texts: list[Text] = []
    for start in range(first, first + PART, 16):
        wait_while_paused()
        pictures = [drawing(SEED, index, side) for index in range(start, start + 16)]
        latents.append(latents_of(network, torch.stack([torch.from_numpy(p.image) for p in pictures])).half())
        texts += texts_of(clip, [picture.caption for picture in pictures])
    found = {"latents": torch.cat(latents), "texts": texts, "empty": texts_of(clip, [""])[0]}
    write_atomically(file, lambda path: torch.save(found, path))


@torch.inference_mode()
def latents_of(network: nn.Module, images: Tensor) -> Tensor:
    """Encode images (N, H, W, 3) as bytes to latents (N, 16, H/8, W/8) on the CPU."""
    pixels = images.permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last) / 255
    with quick():
        return autoencoder.encode(network, pixels.to(device())).float().cpu()


def loss_at(model: nn.Module, z: Tensor, text: Text, random: torch.Generator) -> Tensor:
    """Mean squared error of the prediction of noise - z, for latents z (B, 16, h, w) with their captions.

    Every second noise level is drawn from a logit-normal distribution in the middle, the others are evenly spaced.
    """
    count = len(z)
    noise = torch.randn(z.shape, generator=random)
    even = (torch.arange(count) + torch.rand(count, generator=random)) / count
    middle = torch.sigmoid(MIDDLE + SPREAD * torch.randn(count, generator=random))
    s = torch.where(torch.arange(count) % 2 == 0, even, middle).clamp(0.01, 0.99)
    share = s.view(-1, 1, 1, 1)
    x, target = ((1 - share) * z + share * noise).to(device()), (noise - z).to(device())
    return (predict(model, x, s.to(device()), text) - target).square().mean()


def train_base(
    seconds: float = SLICE,
    side: int = SIDE,
    pictures: int = PICTURES,
    batch: int = BATCH,
    start: Path | None = None,
    end: float = math.inf,
    children: int = CHILDREN,
) -> Path:
    """Train one slice of `seconds`, not counting drawing and encoding; returns the file with the averaged weights in
    fp16.

    A slice that was stopped is resumed; after a complete one another begins. start: folder of the packed weights for
    the first slice, by default the shipped ones. end: latest end of the training, on the clock of time.monotonic.
    """
    from .shipped import MMDIT, SHIPPED

    stage, model = StageRun("picture_base"), new_mmdit()
    latents, texts = data(stage, side, pictures, children)
    run = Slice(stage, model, Muon(model.named_parameters(), RATE, ADAM_RATE), EMA_DECAY)
    run.go_on(seconds, (start or SHIPPED) / MMDIT)
    seconds = max(0.0, min(seconds, run.spent + end - time.monotonic()))
    for step in run.steps(seconds, lambda: loss_at(model, *_chosen(latents, texts, batch, run.step))):
        if step % SHOW_EVERY == 0:
            show(run.average.weights, stage.folder, f"samples_{step:06d}.png", side)
    show(run.average.weights, stage.folder, f"samples_{run.step:06d}.png", side)
    return save(stage.folder / FILE, {name: value.half() for name, value in run.average.weights.items()})


def _chosen(latents: Tensor, texts: list[Text], batch: int, step: int) -> tuple[Tensor, Text, torch.Generator]:
    """Latents and texts of a step, and the generator of its noise."""
    random = generator(SEED, "picture base", step)
    rows = torch.randint(len(latents), (batch,), generator=random).tolist()
    bare = (torch.rand(batch, generator=random) < NO_CAPTION).tolist()
    chosen = [texts[-1] if out else texts[row] for row, out in zip(rows, bare, strict=True)]
    return latents[rows].float(), batch_of(chosen), random


@torch.no_grad()
def show(
    weights: Mapping[str, Tensor], folder: Path, name: str, side: int = SIDE, count: int = 10, cfg: float = 3.0
) -> Path:
    """Save pictures of unseen captions; the captions are saved beside them as text."""
    model = new_mmdit().requires_grad_(False)
    model.load_state_dict(dict(weights), strict=False)
    clip = text_model(folder)
    drawings = (draw, draw, draw_children)
    captions = [drawings[index % 3](SEED, 10**6 + index, side).caption for index in range(count)]
    text, empty = batch_of(texts_of(clip, captions)), batch_of(texts_of(clip, [""] * count))
    noise = torch.randn(count, CHANNELS, side // 8, side // 8, generator=torch.Generator().manual_seed(SEED))
    latents = sample(model, noise.to(device()), text, empty, cfg, 16)
    with quick():
        pixels = autoencoder.decode(painter_of(folder), latents).float().cpu()
    write_atomically(folder / "samples.txt", lambda file: file.write_text("\n".join(captions), "utf-8"))
    return picture_grid(pixels.permute(0, 2, 3, 1), folder / name, columns=5)
