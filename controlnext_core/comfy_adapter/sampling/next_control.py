"""ControlNeXt as a CONTROL_NET: the encoder's features are cached and added at the variant's site."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import cast

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....models.controlnext import PartialEncoding
from ...families import FAMILIES
from ...injection import Term, pool_to, prepare
from ...latent_clips import Clip, averaged, clip_of, distinct_frames, one_below_the_other
from ...memory import feature_bytes, numbers_per_pixel, rows_at_once, wide_bytes
from ...specs import Spec
from ..bases.base import LoadedBase, check_pair
from ..bases.forward_options import TransformerOptions
from ..feedback import warn_if_tiled
from .features import Row, cached_rows, group_of
from .host_control import STEPS_TO_KEEP, HostControl
from .next_forward import Job, collect


@dataclass(frozen=True)
class LoadedControlNeXt:
    """Encoder in the host's patcher, with its settings."""

    patcher: ModelPatcher
    spec: Spec
    name: str
    uid: str
    """Content hash of the weights and of all else that changes the features: build and dtype."""
    scale: float | None
    """Learned gain of the file, for the variants that have one."""
    weights_source: str | None = None
    """File of weights that the loader added to its MODEL; None: no weights."""


class ControlNeXtControl(HostControl):
    """ControlNeXt control, for the stock Apply nodes and for ControlNeXtApply."""

    def __init__(self, net: LoadedControlNeXt) -> None:
        super().__init__()
        self.net = net
        self.name, self.weights_source = net.name, net.weights_source
        self.gain, self.scale = net.spec.fusion.gain, net.scale
        self.compression_ratio = FAMILIES[net.spec.family].pixels
        self.hints_together = FAMILIES[net.spec.family].frames or 1
        self.set_hooks()

    def copy(self) -> ControlNeXtControl:
        c = ControlNeXtControl(self.net)
        self.copy_to(c)
        return c

    @property
    def network(self) -> ModelPatcher:
        return self.net.patcher

    def with_network(self, network: ModelPatcher) -> ControlNeXtControl:
        c = ControlNeXtControl(replace(self.net, patcher=network))
        self.copy_to(c)
        return c

    def check(self, base: LoadedBase) -> None:
        check_pair(base, self.net.spec, self.net.patcher.model.config.out_channels, self.name)

    def join(
        self, transformer_options: TransformerOptions, x: Tensor, sigma: float, strength: float, owner: object
    ) -> None:
        assert self.run is not None
        place = self.run.base.places[self.net.spec.fusion.site]
        order = (self.net.uid, self.hint_id, strength, self.options.apply_to.value, *self.options.ids)
        term = functools.partial(self.term, x=x, sigma=sigma, strength=strength)
        collect(transformer_options, place, tuple(x.shape), Job(order, term, owner))

    def term(
        self, h: Tensor, transformer_options: TransformerOptions, *, x: Tensor, sigma: float, strength: float
    ) -> Term | None:
        """Term of this control for h (rows, C, H, W) at its site; None: nothing to add."""
        assert self.run is not None
        self.run.counts.reached += 1
        warn_if_tiled(self.name, transformer_options.get("original_shape"), x.shape)
        at_one, latents = self.layout(h.shape[0], transformer_options)
        gains = tuple(strength * gain for gain in at_one)
        if not any(gains):
            return None
        self.run.counts.added += 1
        clip = clip_of(self.net.spec.family, tuple(x.shape))
        if clip is None:
            rows: tuple[Row, ...] = self.hint_rows(latents, transformer_options)
        else:
            rows = self.clip_rows(clip, transformer_options)
        return Term(
            self.features(rows, h, x, sigma, clip),
            gains,
            self.net.spec.fusion,
            self.mask(latents, h, transformer_options, sigma, clip),
        )

    def features(self, rows: tuple[Row, ...], h: Tensor, x: Tensor, sigma: float, clip: Clip | None = None) -> Tensor:
        """Encoder output for each row's hint, normalised and pooled: (len(rows), C, H, W) in h's dtype; cached.

        For a clip: (1, C, T * H, W), where the rows are groups of frames and the clip is one sample.
        """
        assert self.run is not None
        group = group_of(self.net.uid, self.hint_id, self.network)
        pixels = x.shape[-2] * x.shape[-1] * self.compression_ratio**2
        row_bytes = pixels * self.bytes_per_pixel(h.dtype) * (1 if clip is None else clip.frames)
        later = functools.partial(self.later_timesteps, sigma)
        encoder = _Encoder(self, h, x, clip)
        timestep = self.run.timestep(sigma)
        kept = cached_rows(group, rows, encoder, timestep, later, h.device, self.run.recent, rows_at_once(row_bytes))
        if not self.net.spec.fusion.project_last:
            return kept
        key = (rows, *encoder.key(timestep))
        if key not in self.run.ready:  # once a step for all its forwards
            self.run.ready = {key: encoder.project(kept)}
        return self.run.ready[key]

    def later_timesteps(self, sigma: float) -> list[float]:
        """Later timesteps of the run's schedule, after this sigma, at which this control acts; each once."""
        assert self.run is not None
        if self.tiles is not None and self.tiles.forwards < 2:
            return []  # tiles that are cut elsewhere in every step are used once
        later = (self.run.timestep(s) for s in self.run.sigmas_after(sigma) if self.strength_at(s) != 0)
        return list(dict.fromkeys(later))

    def bytes_per_pixel(self, dtype: torch.dtype) -> int:
        height, width = self.cond_hint_original.shape[-2:]
        return numbers_per_pixel(self.net.spec.build, height * width) * dtype.itemsize

    def kept_bytes(self, dtype: torch.dtype) -> int:
        height, width = self.cond_hint_original.shape[-2:]
        config = self.net.patcher.model.config
        out_channels = config.stages[-1].out_ch if self.net.spec.fusion.project_last else config.out_channels
        return STEPS_TO_KEEP * feature_bytes(self.net.spec, out_channels, height, width, dtype.itemsize)

    def bytes_beside_base(self, dtype: torch.dtype) -> int:
        if not self.net.spec.fusion.project_last:
            return 0
        height, width = self.cond_hint_original.shape[-2:]
        return wide_bytes(self.net.spec, self.net.patcher.model.config.out_channels, height, width, dtype.itemsize)


class _Encoder:
    """`HintEncoder` of a ControlNeXt; the part that no timestep changes is computed once for the current rows."""

    def __init__(self, control: ControlNeXtControl, h: Tensor, x: Tensor, clip: Clip | None = None) -> None:
        """h: (rows, C, H, W) at the site, with the latent frames of a clip stacked along the height; x: the latent."""
        self.control, self.x, self.dtype, self.clip = control, x, h.dtype, clip
        height, self.fusion = int(h.shape[-2]), control.net.spec.fusion
        self.size = (height // (1 if clip is None else clip.length), int(h.shape[-1]))
        self.rows: tuple[Row, ...] = ()
        self.begun: PartialEncoding | None = None

    def key(self, timestep: float) -> tuple[Hashable, ...]:
        fusion = self.fusion
        how = (self.dtype, fusion.normalization, fusion.pool_first, fusion.eps, fusion.project_last)
        return (round(timestep, 6), tuple(self.x.shape[-2:]), self.size, *how)

    def encode(self, rows: tuple[Row, ...], timestep: float) -> Tensor:
        network, frames = self.control.network.model, _distinct(rows)
        if rows != self.rows or self.begun is None:
            self.begun = None  # not beside the next: it is most of what a pass needs
            self.rows, self.begun = rows, network.begin(self.control.sized_hint(frames, self.x, self.dtype))
        time = torch.full((1,), timestep, device=self.x.device)
        if self.fusion.project_last:
            pooled = pool_to(network.narrow(self.begun, time).float(), self.size)
            return _averaged(pooled, frames, rows).to(self.dtype).contiguous()
        return prepare(network.finish(self.begun, time), self.size, self.fusion).to(self.dtype).contiguous()

    def project(self, kept: Tensor) -> Tensor:
        """Features (rows, C, H, W) from a map with the encoder's channels, the result of `encode` for bases with more
        channels.
        """
        size = self.size
        if self.clip is not None:
            kept, size = one_below_the_other(kept, len(kept)), (len(kept) * size[0], size[1])
        wide = prepare(self.control.network.model.project(kept), size, self.fusion)
        return wide.to(self.dtype, memory_format=torch.channels_last)  # as tokens lie in memory


def _distinct(rows: tuple[Row, ...]) -> tuple[int, ...]:
    """Frames of the hint that these rows use, each once, also where latent frames of a clip share one."""
    if not any(isinstance(row, tuple) for row in rows):
        return cast(tuple[int, ...], rows)
    return distinct_frames(row for row in rows if isinstance(row, tuple))


def _averaged(maps: Tensor, frames: tuple[int, ...], rows: tuple[Row, ...]) -> Tensor:
    """Maps (len(frames), C, H, W) of frames -> maps of rows: groups of frames are averaged."""
    groups = [row for row in rows if isinstance(row, tuple)]
    return averaged(maps, frames, groups) if groups else maps
