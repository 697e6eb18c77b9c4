"""Text encoder in CLIP-L's shape with computed weights: no training, and no file to ship.

Tokens are random vectors, positions a code whose shifts are rotations. One attention layer is active, the other eleven
pass their input: five heads read the words one to five positions back, one averages all words so far, so that the
vector at `circle` also contains `red`, and the vector after the last word contains all of them. Without that a caption
is a bag of words.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ..tiny_models.layouts import Shapes, linear, norm
from ..tiny_models.storage import Pools, random_tensor

SEED = 3
WIDTH, HEADS, LAYERS, PLACES, WORDS = 768, 12, 12, 77, 49408
HEAD = WIDTH // HEADS
FREQUENCIES = HEAD // 2  # of the position code, which occupies the first HEAD of WIDTH values
CODES = 2 * HEAD  # values of a position code that occurs twice
POSITION_GAIN = 4.0
SHARPNESS = 1.7  # undoes the layer norm, whose input has this mean square, so that a head's softmax is nearly one-hot
BACK = (1, 2, 3, 4, 5)  # head k reads this many words back; the next head reads all of them
BACK_GAIN, ALL_GAIN = (0.9, 0.7, 0.5, 0.5, 0.4), 1.6  # std of what a head adds; the mean of many words is small
POSITION_KEPT = 0.35  # share of the position code in the output


def text_encoder(prefix: str, summary_last: bool = False) -> dict[str, Tensor]:
    """Tensors of the encoder under `prefix`, in the names of transformers; zeros take no space.

    summary_last: True puts the head that reads all words into the last layer, False into the first. SD3 uses the words
    before that layer and the caption's vector after it. The position code then occurs a second time with the opposite
    sign, so that all positions have the same mean, and positions after a caption's end differ in their codes, the first
    CODES values, and otherwise by about a fiftieth, since a layer norm's scale depends on word and code together.
    """
    pools, shapes = Pools(SEED), Shapes()
    for layer in range(LAYERS):
        name = f"{prefix}encoder.layers.{layer}"
        shapes |= norm(f"{name}.layer_norm1", WIDTH) | norm(f"{name}.layer_norm2", WIDTH)
        for end in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{name}.self_attn.{end}", WIDTH, WIDTH)
        shapes |= linear(f"{name}.mlp.fc1", WIDTH, 4 * WIDTH) | linear(f"{name}.mlp.fc2", 4 * WIDTH, WIDTH)
    shapes |= norm(f"{prefix}final_layer_norm", WIDTH)
    tensors = {
        name: pools.constant(1.0 if "norm" in name and name.endswith("weight") else 0.0, shape)
        for name, shape in shapes.items()
    }
    heads = {0: range(len(BACK)), LAYERS - 1: [len(BACK)]} if summary_last else {0: range(len(BACK) + 1)}
    for layer, working in heads.items():
        name = f"{prefix}encoder.layers.{layer}.self_attn"
        tensors |= {
            f"{name}.{end}": value for end, value in _attention(working, CODES if summary_last else HEAD).items()
        }
    final = torch.ones(WIDTH)
    final[:HEAD] = POSITION_KEPT
    tensors[f"{prefix}final_layer_norm.weight"] = final.half()
    words = "embeddings.token_embedding.weight"
    # values depend on this name, which must not depend on the file that holds the encoder
    tensors[prefix + words] = pools.normal(f"text_model.{words}", (WORDS, WIDTH), 1.0)
    tensors[f"{prefix}embeddings.position_embedding.weight"] = _positions(summary_last).half()
    return tensors


def _positions(twice: bool) -> Tensor:
    """Position codes (PLACES, WIDTH): cosines and sines of FREQUENCIES angles, their negatives if `twice`, then zeros.

    Angles are pi (k + 1/2) / FREQUENCIES, for which the codes of two positions less than HEAD apart are orthogonal.
    """
    angles = torch.outer(torch.arange(PLACES), (torch.arange(FREQUENCIES) + 0.5) * math.pi / FREQUENCIES)
    code = torch.zeros(PLACES, WIDTH)
    code[:, :HEAD] = POSITION_GAIN * torch.cat([angles.cos(), angles.sin()], dim=1)
    if twice:
        code[:, HEAD:CODES] = -code[:, :HEAD]
    return code


def _turn(places: int) -> Tensor:
    """Rotation (HEAD, HEAD) from the code of position p to that of p - places."""
    angles = places * (torch.arange(FREQUENCIES) + 0.5) * math.pi / FREQUENCIES
    cosine, sine = torch.diag(angles.cos()), torch.diag(angles.sin())
    return torch.cat([torch.cat([cosine, sine], dim=1), torch.cat([-sine, cosine], dim=1)])


def _attention(working: Collection[int], first: int) -> Mapping[str, Tensor]:
    """Weights of an active layer, which passes on values from index `first` on. The other heads stay zero."""
    weights = {end: torch.zeros(WIDTH, WIDTH) for end in ("q_proj", "k_proj", "v_proj", "out_proj")}
    for head, gain in enumerate((*BACK_GAIN, ALL_GAIN)):
        if head not in working:
            continue
        rows = slice(head * HEAD, (head + 1) * HEAD)
        if head < len(BACK):
            weights["q_proj"][rows, :HEAD] = _turn(BACK[head]) * SHARPNESS
            weights["k_proj"][rows, :HEAD] = torch.eye(HEAD)
        weights["v_proj"][rows, HEAD:] = random_tensor(f"v {head}", (HEAD, WIDTH - HEAD), (WIDTH - HEAD) ** -0.5, SEED)
        weights["out_proj"][HEAD:, rows] = random_tensor(f"out {head}", (WIDTH - HEAD, HEAD), gain * HEAD**-0.5, SEED)
    weights["v_proj"][:, :first] = 0
    return {f"{end}.weight": value.half() for end, value in weights.items()}
