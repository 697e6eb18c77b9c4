"""Reader of illustrations: a small network that finds depth and mask in a picture, so that tests and benchmarks can say
whether a drawn picture has those of its hint.

It sees pictures at 64 x 64, and was trained on scenes that no control saw. Its weights, in 8 bits, are
tests/data/picture_reader.safetensors.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ...controlnext_core.fidelity import mask_iou, rank_correlation
from ...controlnext_core.picturebook import Picture, draw
from ..environment import ROOT
from ..tiny_models.storage import save
from .packing import pack, unpack
from .running import StageRun

FILE = ROOT / "tests" / "data" / "picture_reader.safetensors"
SIDE, WIDTHS = 64, (16, 32, 48, 64)  # pixels; channels of the levels
SEED, PICTURES, DRAWN = 71, 400, 192  # pictures of the training, and their side in pixels
STEPS, BATCH, RATE = 700, 8, 3e-3
DEPTH_WEIGHT = 10.0


class Reader(nn.Module):
    """Network from pictures (N, 3, SIDE, SIDE) in [0, 1] to depth in [0, 1] and the logit of the mask, (N, 2, SIDE,
    SIDE).
    """

    def __init__(self) -> None:
        super().__init__()
        first, *others = WIDTHS
        below = [_block(low, high, 2) for low, high in zip(WIDTHS, others, strict=False)]
        self.down = nn.ModuleList([_block(3, first, 1), *below])
        pairs = list(zip(WIDTHS[:0:-1], WIDTHS[-2::-1], strict=True))
        self.up = nn.ModuleList([_block(low + high, high, 1) for low, high in pairs])
        self.out = nn.Conv2d(first, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.down:
            x = layer(x)
            kept.append(x)
        for layer, beside in zip(self.up, kept[-2::-1], strict=True):
            x = layer(torch.cat([functional.interpolate(x, beside.shape[-2:], mode="nearest"), beside], 1))
        return self.out(x)


def _block(inner: int, outer: int, stride: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for start, step in ((inner, stride), (outer, 1)):
        layers += [nn.Conv2d(start, outer, 3, step, 1), nn.GroupNorm(4, outer), nn.SiLU()]
    return nn.Sequential(*layers)


def small(picture: np.ndarray) -> Tensor:
    """Picture (H, W, 3) or plane (H, W) of bytes as (channels, SIDE, SIDE) in [0, 1], by the mean of areas."""
    planes = torch.from_numpy(picture.copy()).float() / 255
    planes = planes[None] if planes.ndim == 2 else planes.permute(2, 0, 1)
    return functional.interpolate(planes[None], (SIDE, SIDE), mode="area")[0]


def trained_reader(path: Path = FILE) -> Reader:
    """Load the reader of a packed file, frozen."""
    reader = Reader()
    reader.load_state_dict({name: value.float() for name, value in unpack(load_file(path)).items()})
    return reader.eval().requires_grad_(False)


def agreement(reader: Reader, picture: np.ndarray, scene: Picture) -> tuple[float, float]:
    """Agreement of a picture (H, W, 3) of bytes with its scene: rank correlation of the depth, and IoU of the mask."""
    depth, mask = reader(small(picture)[None])[0]
    ranks = rank_correlation(depth.numpy(), small(scene.depth)[0].numpy())
    return ranks, mask_iou(*((plane > 0).float().numpy() for plane in (mask, small(scene.mask)[0] - 0.5)))


def train_reader(target: Path = FILE) -> Path:
    """Train on pictures that are blurred, noised and tinted a little, as drawn ones are; returns the packed file."""
    stage = StageRun("reader")
    scenes = [draw(SEED, index, DRAWN) for index in range(PICTURES)]
    pictures = torch.stack([small(scene.image) for scene in scenes])
    wanted = torch.stack([torch.cat([small(scene.depth), small(scene.mask)]) for scene in scenes])
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        reader = Reader()
        optimizer = torch.optim.AdamW(reader.parameters(), RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
        for step in range(STEPS):
            rows = torch.randint(PICTURES, (BATCH,))
            found = reader(_as_drawn(pictures[rows], blurred=step % 2 == 1))
            depth = functional.mse_loss(found[:, 0], wanted[rows][:, 0])
            mask = functional.binary_cross_entropy_with_logits(found[:, 1], wanted[rows][:, 1])
            (DEPTH_WEIGHT * depth + mask).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if (step + 1) % 50 == 0:
                stage.say(step=step + 1, depth=round(depth.item(), 5), mask=round(mask.item(), 5))
    return save(target, pack(reader.state_dict()))


def _as_drawn(pictures: Tensor, blurred: bool) -> Tensor:
    if blurred:
        less = functional.interpolate(pictures, (SIDE * 2 // 3,) * 2, mode="bilinear")
        pictures = functional.interpolate(less, (SIDE, SIDE), mode="bilinear")
    tint = 1 + 0.1 * torch.randn(len(pictures), 3, 1, 1)
    shift = 0.05 * torch.randn(len(pictures), 3, 1, 1)
    return (pictures * tint + shift + 0.03 * torch.randn_like(pictures)).clamp(0, 1)
