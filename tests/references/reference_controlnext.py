"""Reference of ControlNeXt, written a second time from the layer tables of the released code, for comparison in tests.

Plain functions on a state dict: nothing here comes from the networks, the table or the maths under test. Importable as
`comfyui_controlnext.tests.references.reference_controlnext` (the pack's name is a package over the whole folder).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Build:
    """Facts about one released encoder, from its layer table."""

    parameters: int
    keys: int
    out: int
    padding: int | None
    """Padding of the second and third stem convolution; None: no stem."""
    pooled_stem: bool
    stages: tuple[tuple[int, int, int], ...]
    """Residual blocks as (channels in, channels out, groups)."""
    middle: Literal["bare", "norm", "norm and skip"]
    scale: bool


GEN1A = ((3, 128, 1), (128, 256, 8), (256, 256, 8))
GEN1B = ((128, 128, 4), (128, 256, 8), (256, 256, 8))
GEN2 = ((128, 128, 4), (128, 256, 8))

BUILDS: dict[str, Build] = {
    "SD15-L": Build(5_352_327, 51, 1280, None, False, GEN1A, "bare", True),
    "SDXL-0": Build(5_353_351, 55, 1280, None, False, GEN1A, "norm", True),
    "SDXL-1": Build(5_610_176, 64, 1280, 0, True, GEN1B, "norm and skip", False),
    "SVD-v1": Build(5_610_177, 65, 1280, 0, True, GEN1B, "norm and skip", True),
    "SDXL-2": Build(3_526_400, 52, 320, 1, False, GEN2, "norm and skip", False),
    "SD15-T": Build(3_526_400, 52, 320, 1, False, GEN2, "norm and skip", False),
    "SVD-v2": Build(3_526_400, 52, 320, 0, False, GEN2, "norm and skip", False),
    "SVD-v2-T": Build(3_526_400, 52, 320, 1, False, GEN2, "norm and skip", False),
    # not released: the second generation with a third stage
    "TOKENS-32": Build(5_807_552, 64, 2048, 1, False, GEN1B, "norm and skip", False),
}


@dataclass(frozen=True)
class Variant:
    """Fusion of the encoder's output in the released code of one variant."""

    build: str
    family: str
    site: str
    order: Literal["pool, norm", "norm, pool"]
    eps: float
    gain: str
    """Formula of the gain: `1`, a factor, `scale` or `1.3*sigmoid(scale)`."""
    uncond: float | None
    """Gain of the negative half; None: that of the positive half."""


VARIANTS: dict[str, Variant] = {
    "sd15_legacy": Variant("SD15-L", "SD1.5", "after middle", "pool, norm", 1e-12, "scale", None),
    "sdxl_june": Variant("SDXL-0", "SDXL", "after middle", "pool, norm", 1e-12, "scale", None),
    "sdxl_july": Variant("SDXL-1", "SDXL", "after middle", "pool, norm", 1e-12, "1", None),
    "svd_v1": Variant("SVD-v1", "SVD", "before middle", "norm, pool", 1e-5, "1.3*sigmoid(scale)", 0.65),
    "sd15": Variant("SD15-T", "SD1.5", "after down 0", "pool, norm", 1e-12, "1", None),
    "sdxl": Variant("SDXL-2", "SDXL", "after conv_in", "norm, pool", 1e-12, "1", None),
    "svd_v2": Variant("SVD-v2", "SVD", "after down 0", "norm, pool", 1e-5, "0.2", 0.0),
    "svd_v2_padded": Variant("SVD-v2-T", "SVD", "after down 0", "norm, pool", 1e-5, "0.2", 0.0),
}


def _layer(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def shapes(name: str, out: int | None = None) -> Shapes:
    """Names and shapes of all tensors in a build's file."""
    build = BUILDS[name]
    found = _layer("time_embedding.linear_1", 256, 128) | _layer("time_embedding.linear_2", 256, 256)
    if build.padding is not None:
        found |= _layer("embedding.0", 64, 3, 3, 3) | _layer("embedding.1", 64)
        found |= _layer("embedding.3", 64, 64, 3, 3) | _layer("embedding.4", 64)
        found |= _layer("embedding.6", 128, 64, 3, 3) | _layer("embedding.7", 128)
    for i, (wide_in, wide, _) in enumerate(build.stages):
        found |= _layer(f"down_res.{i}.norm1", wide_in) | _layer(f"down_res.{i}.conv1", wide, wide_in, 3, 3)
        found |= _layer(f"down_res.{i}.norm2", wide) | _layer(f"down_res.{i}.conv2", wide, wide, 3, 3)
        found |= _layer(f"down_res.{i}.time_emb_proj", wide, 256)
        found |= _layer(f"down_res.{i}.conv_shortcut", wide, wide_in, 1, 1) if wide != wide_in else {}
        found |= _layer(f"down_sample.{i}.conv", wide, wide, 3, 3)
    found |= _layer("mid_convs.0.0", 256, 256, 3, 3)
    if build.middle == "bare":
        found |= _layer("mid_convs.0.2", 256, 256, 3, 3)
    else:
        found |= _layer("mid_convs.0.2", 256) | _layer("mid_convs.0.3", 256, 256, 3, 3) | _layer("mid_convs.0.4", 256)
    found |= _layer("mid_convs.1", out or build.out, 256, 1, 1)
    return found | ({"scale": ()} if build.scale else {})


def random_weights(name: str, seed: int = 0, out: int | None = None, scale: float = 0.8) -> dict[str, Tensor]:
    """Random weights of an encoder's file in fp32: weights and biases, norms away from one and
    zero, the given `scale`.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in shapes(name, out).items():
        numbers = torch.randn(shape, generator=generator)
        fan_in = math.prod(shape[1:])
        weights[key] = numbers / math.sqrt(fan_in) if len(shape) > 1 else 0.1 * numbers
        if len(shape) == 1 and key.endswith("weight"):
            weights[key] += 1
    return weights | ({"scale": torch.tensor(scale)} if BUILDS[name].scale else {})


def encode(name: str, w: dict[str, Tensor], hint: Tensor, timestep: Tensor) -> Tensor:
    """Forward pass of a build. hint: (B, 3, H, W) in [0, 1]; timestep: (B,) or (1,)."""
    build = BUILDS[name]

    def conv(key: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        return F.conv2d(x, w[f"{key}.weight"], w[f"{key}.bias"], stride=stride, padding=padding)

    def norm(key: str, x: Tensor, groups: int, eps: float) -> Tensor:
        return F.group_norm(x, groups, w[f"{key}.weight"], w[f"{key}.bias"], eps)

    def linear(key: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{key}.weight"], w[f"{key}.bias"])

    rate = torch.tensor([10000 ** (-i / 64) for i in range(64)], dtype=torch.float64)
    angle = timestep.double()[:, None] * rate
    e = torch.cat([torch.cos(angle), torch.sin(angle)], dim=1).to(hint.dtype)
    e = linear("time_embedding.linear_2", F.silu(linear("time_embedding.linear_1", e)))

    x = hint
    if build.padding is not None:
        x = F.relu(norm("embedding.1", conv("embedding.0", x, stride=2), 2, 1e-5))
        x = F.relu(norm("embedding.4", conv("embedding.3", x, padding=build.padding), 2, 1e-5))
        x = F.relu(norm("embedding.7", conv("embedding.6", x, padding=build.padding), 2, 1e-5))
        x = F.max_pool2d(x, 2, 2) if build.pooled_stem else x
    for i, (wide_in, wide, groups) in enumerate(build.stages):
        block = f"down_res.{i}"
        a = conv(f"{block}.conv1", F.silu(norm(f"{block}.norm1", x, groups, 1e-6)))
        a = a + linear(f"{block}.time_emb_proj", F.silu(e)).reshape(-1, wide, 1, 1)
        a = conv(f"{block}.conv2", F.silu(norm(f"{block}.norm2", a, groups, 1e-6)))
        x = a + (x if wide == wide_in else conv(f"{block}.conv_shortcut", x, padding=0))
        x = conv(f"down_sample.{i}.conv", x, stride=2)
    y = F.relu(conv("mid_convs.0.0", x))
    if build.middle == "bare":
        y = conv("mid_convs.0.2", y)
    else:
        y = norm("mid_convs.0.4", conv("mid_convs.0.3", norm("mid_convs.0.2", y, 8, 1e-5)), 8, 1e-5)
    return conv("mid_convs.1", x + y if build.middle == "norm and skip" else y, padding=0)


def gain(variant: Variant, scale: float | None) -> float:
    """Released gain of the positive half."""
    if variant.gain == "scale":
        assert scale is not None
        return scale
    if variant.gain == "1.3*sigmoid(scale)":
        assert scale is not None
        return 1.3 / (1 + math.exp(-scale))
    return float(variant.gain)


def cross_normalise(c: Tensor, x: Tensor, eps: float) -> Tensor:
    """Released formula: c gets the mean and the (unbiased) standard deviation of x, per sample."""
    axes = (1, 2, 3)
    c = (c - c.mean(axes, keepdim=True)) / (c.std(axes, keepdim=True, unbiased=True) + eps)
    return c * x.std(axes, keepdim=True, unbiased=True) + x.mean(axes, keepdim=True)


def added(c: Tensor, x: Tensor, order: str, eps: float) -> Tensor:
    """Sum of x and the control at gain 1: (B, C, H, W) of x's size."""
    size = x.shape[-2:]
    if order == "pool, norm":
        return cross_normalise(F.adaptive_avg_pool2d(c, size), x, eps)
    assert order == "norm, pool"
    return F.adaptive_avg_pool2d(cross_normalise(c, x, eps), size)


def paper_equation_10(c: Tensor, x: Tensor, eps: float) -> Tensor:
    """Equation 10 of the paper: (c - mean(x)) / sqrt(var(x) + eps), biased variance over all elements of a sample."""
    axes = (1, 2, 3)
    return (c - x.mean(axes, keepdim=True)) / torch.sqrt(x.var(axes, keepdim=True, unbiased=False) + eps)
