"""Reference of ControlNet-XS as one plain loop over state dicts, for the network, the patches and the maps under test.
Shares no code with the pack.

Weights are dictionaries in the released (LDM) names: `input_blocks.1.0.in_layers.0.weight` for a base, and
`control_model.input_blocks.1.0...`, `enc_zero_convs_in.0.0.weight` ... for a control.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def official_groups(channels: int) -> int:
    """Groups by the released rule: the largest divisor up to 32."""
    return max(groups for groups in range(1, 33) if channels % groups == 0)


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding (B,) -> (B, width): cosines, then sines, in fp32 as in the released code."""
    steps = torch.exp(-math.log(10000) * torch.arange(width // 2, dtype=torch.float32) / (width // 2))
    angles = t.float()[:, None] * steps[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@dataclass
class Network:
    """Network as functions on one state dict."""

    w: Weights
    heads: Callable[[int], int]
    """Function from the inner width of a transformer to its number of heads."""
    groups: Callable[[str, int], int] = field(default=lambda name, channels: official_groups(channels))
    res_eps: Callable[[str], float] = field(default=lambda name: 1e-5)

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.w

    def conv(self, name: str, h: Tensor, stride: int = 1) -> Tensor:
        weight = self.w[f"{name}.weight"]
        return F.conv2d(h, weight, self.w[f"{name}.bias"], stride=stride, padding=weight.shape[-1] // 2)

    def linear(self, name: str, h: Tensor) -> Tensor:
        return F.linear(h, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def mlp(self, name: str, h: Tensor) -> Tensor:
        return self.linear(f"{name}.2", F.silu(self.linear(f"{name}.0", h)))

    def group_norm(self, name: str, h: Tensor, eps: float) -> Tensor:
        """Group norm by hand: mean and biased variance over each group."""
        groups = self.groups(name, h.shape[1])
        flat = h.reshape(h.shape[0], groups, -1)
        flat = (flat - flat.mean(-1, keepdim=True)) / (flat.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
        shape = (1, -1, 1, 1)
        return flat.reshape(h.shape) * self.w[f"{name}.weight"].view(shape) + self.w[f"{name}.bias"].view(shape)

    def layer_norm(self, name: str, h: Tensor) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def residual(self, name: str, h: Tensor, emb: Tensor) -> Tensor:
        eps = self.res_eps(name)
        out = self.conv(f"{name}.in_layers.2", F.silu(self.group_norm(f"{name}.in_layers.0", h, eps)))
        out = out + self.linear(f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
        out = self.conv(f"{name}.out_layers.3", F.silu(self.group_norm(f"{name}.out_layers.0", out, eps)))
        return out + (self.conv(f"{name}.skip_connection", h) if self.has(f"{name}.skip_connection") else h)

    def attention(self, name: str, h: Tensor, context: Tensor) -> Tensor:
        q, k, v = (self.linear(f"{name}.to_{n}", s) for n, s in (("q", h), ("k", context), ("v", context)))
        heads = self.heads(q.shape[-1])
        q, k, v = (t.reshape(t.shape[0], t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.linear(f"{name}.to_out.0", (weights @ v).transpose(1, 2).reshape(h.shape))

    def transformer(self, name: str, h: Tensor, context: Tensor) -> Tensor:
        linear = self.w[f"{name}.proj_in.weight"].ndim == 2
        tokens = self.group_norm(f"{name}.norm", h, 1e-6)
        if not linear:
            tokens = self.conv(f"{name}.proj_in", tokens)
        tokens = tokens.flatten(2).transpose(1, 2)
        if linear:
            tokens = self.linear(f"{name}.proj_in", tokens)
        depth = 0
        while self.has(f"{name}.transformer_blocks.{depth}.norm1"):
            block = f"{name}.transformer_blocks.{depth}"
            own = self.layer_norm(f"{block}.norm1", tokens)
            tokens = tokens + self.attention(f"{block}.attn1", own, own)
            tokens = tokens + self.attention(f"{block}.attn2", self.layer_norm(f"{block}.norm2", tokens), context)
            value, gate = self.linear(f"{block}.ff.net.0.proj", self.layer_norm(f"{block}.norm3", tokens)).chunk(2, -1)
            tokens = tokens + self.linear(f"{block}.ff.net.2", value * F.gelu(gate))
            depth += 1
        if linear:
            tokens = self.linear(f"{name}.proj_out", tokens)
        tokens = tokens.transpose(1, 2).reshape(h.shape[0], -1, *h.shape[2:])
        return h + (tokens if linear else self.conv(f"{name}.proj_out", tokens))

    def block(self, name: str, h: Tensor, emb: Tensor, context: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Block of input_blocks or output_blocks, or the middle: the layers found by name, in order."""
        for place in range(3):
            layer = f"{name}.{place}"
            if self.has(f"{layer}.in_layers.0"):
                h = self.residual(layer, h, emb)
            elif self.has(f"{layer}.norm"):
                h = self.transformer(layer, h, context)
            elif self.has(f"{layer}.op"):
                h = self.conv(f"{layer}.op", h, stride=2)
            elif self.has(f"{layer}.conv"):
                h = self.conv(f"{layer}.conv", F.interpolate(h, size=size, mode="nearest"))
            elif self.has(layer):
                h = self.conv(layer, h)
        return h

    def count(self, root: str) -> int:
        return len({name[len(root) :].split(".")[0] for name in self.w if name.startswith(root)})

    def hint(self, hint: Tensor) -> Tensor:
        for k in range(0, 16, 2):
            hint = self.conv(f"input_hint_block.{k}", hint, stride=2 if k in (4, 8, 12) else 1)
            hint = F.silu(hint) if k < 14 else hint
        return hint


def forward(
    base: Network,
    control: Network | None,
    x: Tensor,
    t: Tensor,
    context: Tensor,
    hint: Tensor,
    scale: float = 1.0,
    y: Tensor | None = None,
    mix: float | None = None,
    parts: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """Forward of base and control. mix: scale^0.3 where not given; without a control, the plain base."""
    angles = sinusoid(t, base.w["time_embed.0.weight"].shape[1])
    emb = base.mlp("time_embed", angles)
    if control is not None and control.has("control_model.time_embed.0"):
        k = scale**0.3 if mix is None else mix
        emb = k * control.mlp("control_model.time_embed", angles) + (1 - k) * emb
    if y is not None:
        emb = emb + base.mlp("label_emb.0", y)
    encoder, middle, decoder = (scale * part for part in parts)
    h, kept, kept_control = x, [], []
    c = x[:, :4]
    for i in range(base.count("input_blocks.")):
        h = base.block(f"input_blocks.{i}", h, emb, context)
        if control is not None:
            c = control.block(f"control_model.input_blocks.{i}", c, emb, context)
            if i == 0:
                c = c + control.hint(hint)
            if control.has(f"enc_zero_convs_out.{i}.0"):
                h = h + encoder * control.conv(f"enc_zero_convs_out.{i}.0", c)
            kept_control.append(c)
            c = torch.cat([c, control.conv(f"enc_zero_convs_in.{i}.0", h)], dim=1)
        kept.append(h)
    h = base.block("middle_block", h, emb, context)
    if control is not None:
        c = control.block("control_model.middle_block", c, emb, context)
        h = h + middle * control.conv("middle_block_out.0", c)
    for j in range(base.count("output_blocks.")):
        if control is not None:
            h = h + decoder * control.conv(f"dec_zero_convs_out.{j}.0", kept_control.pop())
        h = torch.cat([h, kept.pop()], dim=1)
        size = tuple(kept[-1].shape[2:]) if kept else None
        h = base.block(f"output_blocks.{j}", h, emb, context, size)
    return base.conv("out.2", F.silu(base.group_norm("out.0", h, 1e-5)))
