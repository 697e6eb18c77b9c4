"""ControlNet-XS: a small encoder beside the base's encoder, which exchanges features with it after every block.

Shapes: B batch, C channels, H W size of the current features, T text tokens, D width of the time embedding.
The exchange, block by block (h base, c control, s strength):

    h = base.input[i](h)              c = control.encoder[i](c)          c += hint after block 0
    h += s * control_to_base[i](c)    keep h and c for the decoder
    c = cat(c, base_to_control[i](h))
    ... middle:  h += s * middle_to_base(middle(c))
    ... decoder: h += s * decoder_to_base[j](kept c), before h meets the kept h

Source: Zavadski, Feiden, Rother, "ControlNet-XS" (arXiv 2312.06573), type B of the released code; type A is the same
without `control_to_base`. Names of the released state dict: `controlnext_core.xs_key_maps`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, SpatialTransformer, TransformerConfig, attend
from .layers import Downsample, ResBlock, TimestepMLP, timestep_embedding, zeroed

CONV, RES, DOWN = "conv", "res", "down"
HINT_CONVS = 8
HINT_HALVINGS = (2, 4, 6)
"""Indices of the hint encoder's convolutions that halve its size: 8 pixels become one latent cell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockConfig:
    """Configuration of one block of the control encoder, or of one half of its middle."""

    kind: str
    """Kind of block: CONV, RES or DOWN."""
    in_ch: int
    """Input channels: the control's and, from the second block on, the base's as well."""
    out_ch: int
    base_ch: int
    """Channels of the base's features after the base's block of the same index."""
    groups: tuple[int, int] = (1, 1)
    """Numbers of groups of the two norms of a residual block."""
    eps: float = 1e-5
    transformer: TransformerConfig | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNetXSConfig:
    """Architecture of one ControlNet-XS."""

    encoder: tuple[BlockConfig, ...]
    middle: tuple[BlockConfig, ...]
    decoder: tuple[int, ...]
    """Channels of the base's features at the input of each of its decoder blocks."""
    hint: tuple[int, ...]
    """Channels of the hint encoder's layers, from 3 (RGB) to those of the first block."""
    context_dim: int
    time_dim: int
    own_time: int | None = None
    """Width of the sinusoidal embedding of the control's time embedding. None: only the base's time embedding is
    used."""
    adds_in_encoder: bool = True
    """True: type B, which also adds to the base's encoder. False: type A."""


class ControlBlock(nn.Module):
    """A convolution, a residual block with or without a transformer, or a downsampler."""

    def __init__(
        self, block: BlockConfig, config: ControlNetXSConfig, operations: Any, attention: Attention, **factory: Any
    ) -> None:
        super().__init__()
        self.kind = block.kind
        if block.kind == CONV:
            self.conv = operations.Conv2d(block.in_ch, block.out_ch, 3, padding=1, **factory)
        elif block.kind == DOWN:
            self.down = Downsample(block.in_ch, operations, block.out_ch, **factory)
        else:
            self.res = ResBlock(
                block.in_ch, block.out_ch, block.groups, config.time_dim, block.eps, operations, **factory
            )
            zeroed(self.res.conv2)
        self.transformer: nn.Module | None = None
        if block.transformer is not None:
            self.transformer = SpatialTransformer(
                block.out_ch, config.context_dim, block.transformer, operations, attention, **factory
            )

    def forward(self, c: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        """Apply the block to c: (B, in_ch, H, W).

        emb: (B, D), context: (B, T, context_dim). Returns (B, out_ch, H, W), halved by DOWN.
        """
        if self.kind == CONV:
            return self.conv(c)
        if self.kind == DOWN:
            return self.down(c)
        c = self.res(c, emb)
        return c if self.transformer is None else self.transformer(c, context)


class ControlNetXS(nn.Module):
    """The control stream and the 1x1 convolutions through which it and the base exchange features."""

    def __init__(
        self,
        config: ControlNetXSConfig,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Any = nn,
        attention: Attention = attend,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.config = config

        def exchange(in_ch: int, out_ch: int) -> nn.Module:
            return zeroed(operations.Conv2d(in_ch, out_ch, 1, **factory))

        def block(part: BlockConfig) -> nn.Module:
            return ControlBlock(part, config, operations, attention, **factory)

        encoder, hint = config.encoder, config.hint
        if config.own_time is not None:
            self.time_embedding = TimestepMLP(config.own_time, config.time_dim, operations, **factory)
        self.hint_encoder = nn.ModuleList(
            operations.Conv2d(hint[k], hint[k + 1], 3, stride=2 if k in HINT_HALVINGS else 1, padding=1, **factory)
            for k in range(HINT_CONVS)
        )
        zeroed(self.hint_encoder[-1])
        self.encoder = nn.ModuleList(block(part) for part in encoder)
        self.base_to_control = nn.ModuleList(exchange(part.base_ch, part.base_ch) for part in encoder)
        if config.adds_in_encoder:
            self.control_to_base = nn.ModuleList(exchange(part.out_ch, part.base_ch) for part in encoder)
        self.middle = nn.ModuleList(block(part) for part in config.middle)
        self.middle_to_base = exchange(config.middle[-1].out_ch, config.middle[-1].base_ch)
        self.decoder_to_base = nn.ModuleList(
            exchange(part.out_ch, base_ch) for part, base_ch in zip(reversed(encoder), config.decoder, strict=True)
        )

    def encode_hint(self, hint: Tensor) -> Tensor:
        """Encode the hint: (B, 3, 8H, 8W) in [0, 1], RGB. Returns (B, C of the first block, H, W)."""
        for conv in self.hint_encoder[:-1]:
            hint = F.silu(conv(hint))
        return self.hint_encoder[-1](hint)

    def embed_time(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """Time embedding of the control: timestep (B,), as the UNet gets it -> (B, D) in `dtype`."""
        assert self.config.own_time is not None, "this ControlNet-XS has no time embedding of its own"
        return self.time_embedding(timestep_embedding(timestep, self.config.own_time).to(dtype))


class Walk:
    """Forward of the control stream beside the base: `encode`, `take_base` per encoder block, `middle`, `decode`.

    Each method returns a correction that the caller multiplies with the strength and adds to the base's features.
    """

    def __init__(self, net: ControlNetXS, x: Tensor, hint: Tensor) -> None:
        """Start a forward. x:

        (B, in_ch or more, H, W), the base's input; hint: (B or 1, C, H, W), from `encode_hint`.
        """
        self.net = net
        self.c = x[:, : net.config.encoder[0].in_ch]
        self.hint = hint
        self.skips: list[Tensor] = []

    def encode(self, i: int, emb: Tensor, context: Tensor) -> Tensor | None:
        """Run encoder block i; returns the correction of the base's features, (B, base_ch, H, W), None for type A.

        emb: (B, D), the base's time embedding with its label embedding; context: (B, T, context_dim).
        """
        self.c = self.net.encoder[i](self.c, emb, context)
        if i == 0:
            self.c = self.c + self.hint
        self.skips.append(self.c)
        return self.net.control_to_base[i](self.c) if self.net.config.adds_in_encoder else None

    def take_base(self, i: int, h: Tensor) -> None:
        """Concatenate the base's features after encoder block i, h (B, base_ch, any, any), to the control's as
        channels.
        """
        self.c = torch.cat([fit(self.c, h), self.net.base_to_control[i](h)], dim=1)

    def middle(self, emb: Tensor, context: Tensor) -> Tensor:
        """Run the middle; returns the correction of the base's features after its middle, (B, base_ch, H, W)."""
        for block in self.net.middle:
            self.c = block(self.c, emb, context)
        return self.net.middle_to_base(self.c)

    def decode(self, j: int) -> Tensor:
        """Correction of the base's features before decoder block j; called once for each j, in ascending order."""
        return self.net.decoder_to_base[j](self.skips.pop())


def fit(c: Tensor, h: Tensor) -> Tensor:
    """Resize c to the size of h, which differs where another node resizes the base's features (deep shrink)."""
    if c.shape[-2:] == h.shape[-2:]:
        return c
    return F.interpolate(c, size=h.shape[-2:], mode="bilinear", align_corners=False)
