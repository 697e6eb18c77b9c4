"""Reference of ControlNeXt on diffusion transformers, for the tests; shares no code with the pack.

A torch forward hook on the host's block finds the picture's tokens by counting, and adds the released formula with
tokens in place of pixels: ((c - m(c)) / (s(c) + eps)) * s(x) + m(x), moments of each sample over tokens and channels.
The encoder is that of `reference_controlnext`, averaged onto the grid of tokens after its last convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from comfyui_controlnext.tests.references import reference_controlnext as released
from torch import Tensor

BUILD = "SD15-T"
EPS = 1e-12


@dataclass(frozen=True)
class Family:
    """Facts about a family: its first joint block, and the position of the picture's tokens."""

    block: Callable[[Any], Any]
    """Function from the host's transformer to the module of its first joint block."""
    part: int | None
    """Index of the picture's stream in the block's result; None: it returns one stream, the text first."""
    text_multiple: int = 1
    """Multiple to which the number of text tokens is padded."""
    text_in_stream: bool = True
    """True: the returned stream contains the text. False: it does not."""
    build: str = BUILD
    frames: int = 4
    """Frames in each latent frame of a clip after the first."""
    differences: str = ""
    """Names of the attention output projections of the picture's stream, with N for the index of the block."""


_WAN = Family(lambda net: net.blocks[0], None, text_in_stream=False, differences="blocks.N.self_attn.o.weight")

FAMILIES: dict[str, Family] = {
    "sd3": Family(lambda net: net.joint_blocks[0], 1, differences="joint_blocks.N.x_block.attn.proj.weight"),
    "flux": Family(lambda net: net.double_blocks[0], 0, differences="double_blocks.N.img_attn.proj.weight"),
    "chroma": Family(lambda net: net.double_blocks[0], 0, differences="double_blocks.N.img_attn.proj.weight"),
    "qwen_image": Family(
        lambda net: net.transformer_blocks[0], 1, differences="transformer_blocks.N.attn.to_out.0.weight"
    ),
    "lumina2": Family(lambda net: net.layers[0], None, differences="layers.N.attention.out.weight"),
    "z_image": Family(lambda net: net.layers[0], None, 32, differences="layers.N.attention.out.weight"),
    "wan": _WAN,
    "wan_wide": _WAN,
    "wan_reference": _WAN,
    "wan_i2v": _WAN,
    "wan_vace": _WAN,
    "wan_5b": replace(_WAN, build="TOKENS-32"),
}


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    """Grid of tokens along each side of a latent: two cells per token, an odd last cell has a token of its own."""
    return math.ceil(size[0] / 2), math.ceil(size[1] / 2)


def encode(weights: dict[str, Tensor], hint: Tensor, sigma: float, grid: tuple[int, int], build: str = BUILD) -> Tensor:
    """Control of each hint: (n, tokens, channels). hint: (n, 3, H, W) at eight times the latent's size."""
    found = released.encode(build, weights, hint, torch.tensor([1000.0 * sigma]))
    return F.adaptive_avg_pool2d(found, grid).permute(0, 2, 3, 1).flatten(1, 2)


def encode_clip(
    family: str, weights: dict[str, Tensor], hint: Tensor, sigma: float, grid: tuple[int, int], latent_frames: list[int]
) -> Tensor:
    """Control of these latent frames of a clip: (1, tokens of all, channels). hint: (frames, 3, H, W).

    Latent frame 0 is frame 0; each later one is the mean of four frames' controls. The last frame is repeated.
    """
    row, parts = FAMILIES[family], []
    for k in latent_frames:
        first = 0 if k == 0 else 1 + row.frames * (k - 1)
        places = [min(place, len(hint) - 1) for place in ([first] if k == 0 else range(first, first + row.frames))]
        maps = [encode(weights, hint[place : place + 1], sigma, grid, row.build) for place in places]
        parts.append(sum(maps) / len(maps))
    return torch.cat(parts, dim=1)


def cross_normalise(c: Tensor, x: Tensor) -> Tensor:
    """Tensor c (B, N, D) with the mean and the (unbiased) standard deviation of x (B, N, D), over each whole sample."""
    axes = (1, 2)
    c = (c - c.mean(axes, keepdim=True)) / (c.std(axes, keepdim=True, unbiased=True) + EPS)
    return c * x.std(axes, keepdim=True, unbiased=True) + x.mean(axes, keepdim=True)


@dataclass(frozen=True)
class Term:
    """Control with its gain and mask."""

    control: Tensor
    """Control (rows, tokens, channels)."""
    gain: Tensor
    """Gain (rows,)."""
    mask: Tensor | None = None
    """Mask (1 or rows, 1, h, w); of a clip (1, latent frames, h, w)."""


def added(terms: list[Term], x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Sum of x (rows, tokens, channels) and every control, all measured against the same x."""
    total = x
    for term in terms:
        part = term.gain.view(-1, 1, 1) * cross_normalise(term.control, x)
        if term.mask is not None:
            part = part * F.adaptive_avg_pool2d(term.mask, grid).flatten(1).unsqueeze(-1)
        total = total + part
    return total


@contextmanager
def controlled(
    model: Any,
    family: str,
    text: int,
    size: tuple[int, int],
    terms: list[Term],
    references: int = 0,
    length: int = 1,
    in_front: int = 0,
) -> Iterator[None]:
    """Context in which the host's BaseModel has these controls.

    text: tokens of the prompt; size: the latent's cells; references: pictures whose tokens are in one stream with the
    text's and precede the picture's; length: latent frames; in_front: tokens before those of a clip.
    """
    row, grid = FAMILIES[family], grid_of(size)
    count = length * grid[0] * grid[1]

    def hook(module: Any, args: Any, out: Any) -> Any:
        stream = out if row.part is None else out[row.part]
        alone = row.part is not None or not row.text_in_stream
        start = in_front if alone else math.ceil(text / row.text_multiple) * row.text_multiple
        if row.part is None and references:  # the picture's tokens are last, padded to a multiple
            start = stream.shape[1] - math.ceil(count / row.text_multiple) * row.text_multiple
        before, x, after = stream[:, :start], stream[:, start : start + count], stream[:, start + count :]
        assert x.shape[1] == count
        changed = torch.cat([before, added(terms, x, grid), after], dim=1)
        if row.part is None:
            return changed
        return tuple(changed if place == row.part else other for place, other in enumerate(out))

    handle = row.block(model.diffusion_model).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
