"""Base model of the picturebook: a diffusion transformer of SD3's shape, depth 4, on latents of 16 channels.

In training it reads 768 of the values of a word and of a caption, the others of SD3's 4096 and 2048 are zero. Words
have no position embedding in this network, so the equal ones after a caption's end are represented by one with their
weight: a batch has 25 words instead of 77 (`bias_of`). They are equal within a fiftieth, which changes the output by a
thousandth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .computing import device, quick
from .text_encoder import CODES, PLACES, WIDTH

DEPTH, CHANNELS, PATCH, GRID = 4, 16, 2, 16
HIDDEN = 64 * DEPTH
CONTEXT, POOLED = 4096, 2048  # sizes of the host's text conditions
SEED = 23
BEHIND = 6  # from the end on: five positions that still see a caption's words, and the one that represents the others
LAYOUT: dict[str, Any] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "depth": DEPTH,
    "input_size": None,
    "adm_in_channels": WIDTH,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": HIDDEN}},
    "num_patches": GRID * GRID,
    "pos_embed_max_size": GRID,
    "qk_norm": "rms",
}
SHIFT = 3.0
"""Shift of the host's noise levels for SD3."""


def new_mmdit() -> Any:
    """Initial network of the host: blocks add nothing at first, and the output is the best linear guess."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    model = OpenAISignatureMMDITWrapper(**LAYOUT, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    random = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.normal_(std=value[0].numel() ** -0.5, generator=random)
            else:
                value.fill_(1.0 if name.endswith("weight") else 0.0)
        for name, value in model.named_parameters():
            if "adaLN_modulation.1.weight" in name or name.startswith(("final_layer.linear", "y_embedder.mlp.2")):
                value.zero_()
        model.context_embedder.weight[:, :CODES] = 0  # stays zero, since `shortened` leaves no signal there
        model.pos_embed.copy_(positions()[None])
        _pass_through(model)
    return model.to(device()).requires_grad_(True)


def positions() -> Tensor:
    """Position embedding (GRID * GRID, HIDDEN): sines and cosines of columns, then of rows, at frequencies for this
    small grid.
    """
    quarter = HIDDEN // 4
    angle = torch.outer(torch.arange(GRID).float(), 10.0 ** (-2 * torch.arange(quarter) / quarter)) * 1.5
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    columns, rows = line[None].expand(GRID, -1, -1), line[:, None].expand(-1, GRID, -1)
    return torch.cat([columns, rows], dim=2).reshape(GRID * GRID, HIDDEN) * 0.5


def _pass_through(model: Any) -> None:
    """Initialise the output as gain(s) * x, where gain is the best for data and noise of variance 1."""
    numbers = PATCH * PATCH * CHANNELS
    embed, readout = model.x_embedder.proj.weight, model.final_layer.linear.weight
    basis = torch.linalg.qr(torch.randn(HIDDEN, numbers, generator=torch.Generator().manual_seed(SEED)))[0].T
    embed.copy_(basis.T.reshape(HIDDEN, PATCH, PATCH, CHANNELS).permute(0, 3, 1, 2) * 2)
    readout.copy_(basis)
    s = torch.linspace(0, 1, 256)
    inside = torch.nn.functional.silu(model.t_embedder(1000 * s, torch.float32))
    norm = (4 * numbers / HIDDEN + 0.25) ** 0.5
    gain = (2 * s - 1) / ((1 - s).square() + s.square()) * norm / 2 - 1
    ridge = inside.T @ inside + 1e-3 * torch.eye(HIDDEN)
    row = torch.linalg.solve(ridge, inside.T @ gain)
    model.final_layer.adaLN_modulation[1].weight[HIDDEN:] = row


def bias_of(lengths: Tensor, words: int, tokens: int) -> Tensor:
    """Attention bias (B, 1, 1, words + tokens), added to the logarithm of attention.

    lengths (B,): number of words of each row, the last of which represents all that follow up to PLACES; later ones in
    the batch do not count.
    """
    place = torch.arange(words, device=lengths.device)[None]
    last = lengths[:, None] - 1
    many = (PLACES - last).float().log()
    bias = torch.where(place < last, 0.0, torch.where(place == last, many, -torch.inf))
    return torch.cat([bias, bias.new_zeros(len(bias), tokens)], dim=1)[:, None, None]


def shortened(context: Tensor, end: int) -> Tensor:
    """Distinct part (end + BEHIND, WIDTH) of a context (PLACES, WIDTH), without the position codes.

    end: the position of the caption's end.
    """
    words = context[: end + BEHIND].clone()
    words[:, :CODES] = 0
    return words


def attention_with(bias: Tensor) -> Callable[..., Tensor]:
    """Attention function for the host with `bias`. q, k, v:

    (B, positions, ...), with separate dimensions for heads and their width.
    """

    def attention(_chosen: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
        q, k, v = (part.reshape(*part.shape[:2], heads, -1).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias).softmax(-1)
        return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)

    return attention


def predict(model: nn.Module, x: Tensor, s: Tensor, text: Mapping[str, Tensor]) -> Tensor:
    """Predict noise - latents from x (B, 16, h, w) at s (B,) in 0..1.

    text: `words` (B, n, WIDTH), `lengths` (B,), `pooled` (B, WIDTH).
    """
    tokens = -(-x.shape[-2] // PATCH) * -(-x.shape[-1] // PATCH)
    words = text["words"]
    options = {"optimized_attention_override": attention_with(bias_of(text["lengths"], words.shape[1], tokens))}
    with quick():
        return model(x, 1000 * s, context=words, y=text["pooled"], transformer_options=options).float()


@torch.no_grad()
def sample(
    model: nn.Module,
    noise: Tensor,
    text: Mapping[str, Tensor],
    empty: Mapping[str, Tensor],
    cfg: float = 3.0,
    steps: int = 20,
    shift: float = SHIFT,
) -> Tensor:
    """Sample latents from noise (N, 16, h, w) with Euler's method; text and empty as for `predict`."""
    levels = torch.linspace(1, 0, steps + 1)
    levels = shift * levels / (1 + (shift - 1) * levels)
    x = noise
    for high, low in zip(levels[:-1], levels[1:], strict=True):
        s = high.expand(len(x)).to(x.device)
        out = predict(model, x, s, text)
        if cfg != 1:
            without = predict(model, x, s, empty)
            out = without + cfg * (out - without)
        x = x + (low - high) * out
    return x


def as_the_host_loads(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained weights in the host's shapes, with zeros for the inputs of SD3 that are not trained, and the position
    embedding.
    """
    tensors = dict(weights)
    for name, width in (("context_embedder.weight", CONTEXT), ("y_embedder.mlp.0.weight", POOLED)):
        narrow = tensors[name]
        tensors[name] = torch.cat([narrow, narrow.new_zeros(len(narrow), width - narrow.shape[1])], dim=1)
    return tensors | {"pos_embed": positions()[None]}
