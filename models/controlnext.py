"""The ControlNeXt encoders: a hint and a timestep in, one feature map out.

Shapes: B batch, H W hint pixels. Module names are the published state-dict keys.
Source: the released code of ControlNeXt (arXiv 2408.06070), all builds from June 2024 on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .halving import MergedStage, merge_stage, own_weights
from .layers import Downsample, ResBlock, TimestepMLP, timestep_embedding

TIME_CHANNELS, TIME_DIM = 128, 256
STEM_CHANNELS, STEM_OUT, STEM_GROUPS = 64, 128, 2
MID_GROUPS = 8
RES_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Stage:
    """Configuration of one residual block and the downsampling after it."""

    in_ch: int
    out_ch: int
    groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNeXtConfig:
    """Architecture of one variant of the encoder."""

    stages: tuple[Stage, ...]
    stem: bool
    """True: a convolutional stem halves the hint. False: the RGB hint enters the first residual block."""
    stem_padded: bool = True
    """True: the second and third stem convolutions pad. False: they do not, as one published SVD-v2 file was run."""
    stem_pool: bool = False
    """True: a 2x2 maximum pool follows the stem. False: none."""
    mid_norm: bool = True
    mid_skip: bool = True
    out_channels: int = 320
    learned_scale: bool = False
    """True: the file has a 0-d parameter `scale`, the gain of its injection, outside of its forward. False: it has
    none."""


@dataclass(frozen=True, slots=True)
class PartialEncoding:
    """Intermediate result of an encoder for one hint, before the timestep enters."""

    shortcut: Tensor
    """Shortcut of the first residual block, (B, C, h, w); already downsampled where the stage's convolutions are
    merged."""
    first_half: Tensor
    """Output of `ResBlock.first_half` of the first residual block, (B, C, h, w)."""
    stages: tuple[MergedStage | None, ...]
    """Merged convolutions of each stage; None where merging does not pay at this map size."""


class ControlNeXt(nn.Module):
    """ControlNeXt encoder of one variant."""

    def __init__(
        self,
        config: ControlNeXtConfig,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Any = nn,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.config = config
        self.dtype = dtype
        self.weights_of = getattr(operations, "weights_of", own_weights)
        if config.learned_scale:
            self.scale = nn.Parameter(torch.ones((), **factory))
        self.time_embedding = TimestepMLP(TIME_CHANNELS, TIME_DIM, operations, **factory)
        if config.stem:
            self.embedding = _stem(config, operations, factory)
        self.down_res = nn.ModuleList(
            ResBlock(s.in_ch, s.out_ch, s.groups, TIME_DIM, RES_EPS, operations, **factory) for s in config.stages
        )
        self.down_sample = nn.ModuleList(Downsample(s.out_ch, operations, **factory) for s in config.stages)
        width = config.stages[-1].out_ch
        self.mid_convs = nn.ModuleList(
            [
                _mid(width, config.mid_norm, operations, factory),
                operations.Conv2d(width, config.out_channels, 1, **factory),
            ]
        )

    def forward(self, hint: Tensor, timestep: Tensor) -> Tensor:
        """Encode the hint for one timestep.

        hint: (B, 3, H, W) in [0, 1], RGB; timestep: (B,) or (1,), as given to the UNet. Returns (B, out_channels, h,
        w): h = ceil(H/8) for the padded and the stemless builds, H/8 - 1 unpadded, about H/32 with the pool.
        """
        return self.finish(self.begin(hint), timestep)

    def begin(self, hint: Tensor) -> PartialEncoding:
        """Encode the part that does not depend on the timestep: once per hint, nearly half of the second generation's
        work.
        """
        stages = tuple(self._merged(hint))
        h = self.embedding(hint) if self.config.stem else hint
        res: Any = self.down_res[0]
        first_half = res.first_half(h)
        shortcut = res.conv_shortcut(h)
        return PartialEncoding(self.down_sample[0](shortcut) if stages[0] else shortcut, first_half, stages)

    def _merged(self, hint: Tensor) -> Iterator[MergedStage | None]:
        """The products of each stage for maps of this hint."""
        cells = hint.shape[-2] * hint.shape[-1] / 4 ** (self.config.stem + self.config.stem_pool)
        for res, down in zip(self.down_res, self.down_sample, strict=True):
            yield merge_stage(cast(ResBlock, res), cast(Downsample, down), cells, hint, self.weights_of)
            cells /= 4

    def finish(self, begun: PartialEncoding, timestep: Tensor) -> Tensor:
        """Complete `forward` from the result of `begin`. timestep: (B,) or (1,). Returns (B, out_channels, h, w)."""
        return self.project(self.narrow(begun, timestep))

    def narrow(self, begun: PartialEncoding, timestep: Tensor) -> Tensor:
        """Features before the last convolution of `finish`: (B, channels of the last stage, h, w)."""
        emb = self.time_embedding(timestep_embedding(timestep, TIME_CHANNELS).to(begun.first_half.dtype))
        h = begun.first_half
        for index, (res, down, joined) in enumerate(zip(self.down_res, self.down_sample, begun.stages, strict=True)):
            block, halving = cast(ResBlock, res), cast(Downsample, down)
            first_half = block.first_half(h) if index else h
            if joined is None:
                shortcut = block.conv_shortcut(h) if index else begun.shortcut
                h = halving(shortcut + block.second_half(first_half, emb))
            else:
                shortcut = joined.shortcut(h) if index else begun.shortcut
                h = shortcut + joined.residual(block.timed(first_half, emb))
        mid = self.mid_convs[0](h)
        return h + mid if self.config.mid_skip else mid

    def project(self, h: Tensor) -> Tensor:
        """Apply the last convolution, 1x1: (B, channels of the last stage, h, w) -> (B, out_channels, h, w).

        It commutes with every average over cells: where out_channels is large, pool first and cache the map with fewer
        channels.
        """
        return self.mid_convs[1](h)


def _stem(config: ControlNeXtConfig, operations: Any, factory: dict[str, Any]) -> nn.Sequential:
    pad = 1 if config.stem_padded else 0
    layers = [
        operations.Conv2d(3, STEM_CHANNELS, 3, stride=2, padding=1, **factory),
        operations.GroupNorm(STEM_GROUPS, STEM_CHANNELS, **factory),
        nn.ReLU(),
        operations.Conv2d(STEM_CHANNELS, STEM_CHANNELS, 3, padding=pad, **factory),
        operations.GroupNorm(STEM_GROUPS, STEM_CHANNELS, **factory),
        nn.ReLU(),
        operations.Conv2d(STEM_CHANNELS, STEM_OUT, 3, padding=pad, **factory),
        operations.GroupNorm(STEM_GROUPS, STEM_OUT, **factory),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2, 2)] if config.stem_pool else []))


def _mid(width: int, norm: bool, operations: Any, factory: dict[str, Any]) -> nn.Sequential:
    def conv() -> nn.Module:
        return operations.Conv2d(width, width, 3, padding=1, **factory)

    def group_norm() -> nn.Module:
        return operations.GroupNorm(MID_GROUPS, width, **factory)

    layers = [conv(), nn.ReLU(), group_norm(), conv(), group_norm()] if norm else [conv(), nn.ReLU(), conv()]
    return nn.Sequential(*layers)
