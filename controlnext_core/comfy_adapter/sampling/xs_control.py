"""ControlNet-XS as a CONTROL_NET."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....models.controlnet_xs import ControlNetXS, Walk
from ...memory import XS_ROWS_PER_HINT, rows_at_once, xs_numbers_per_cell, xs_numbers_per_pixel
from ...xs_detection import XSFile
from ...xs_specs import XSShape, base_widths_of
from ..bases.base import LoadedBase
from ..bases.forward_options import TransformerOptions
from ..feedback import warn_if_tiled
from .features import CACHE, cached_rows, group_of
from .host_control import HostControl
from .xs_forward import Companion, XSJob, join_forward

ANY_TIME = 0.0
TIME_EXPONENT = 0.3
"""Exponent of the share of the control's time embedding, strength^0.3. Source: the released samplers; diffusers has a
constant^0.3."""


@dataclass(frozen=True)
class LoadedXS:
    """ControlNet-XS in the host's patcher, with its settings."""

    patcher: ModelPatcher
    file: XSFile
    norm_rule: str
    heads: tuple[int, ...]
    """Attention heads per encoder block, the middle's at the end; 0 = no attention."""
    uid: str
    """Content hash of the weights and of all else that changes the features."""

    @property
    def net(self) -> ControlNetXS:
        return self.patcher.model


class ControlNetXSControl(HostControl):
    """ControlNet-XS control, for the stock Apply nodes and for ControlNeXtApply."""

    has_parts = True

    def __init__(self, loaded: LoadedXS) -> None:
        super().__init__()
        self.loaded = loaded
        self.name = loaded.file.header.path.name
        self.set_hooks()

    def copy(self) -> ControlNetXSControl:
        c = ControlNetXSControl(self.loaded)
        self.copy_to(c)
        return c

    @property
    def network(self) -> ModelPatcher:
        return self.loaded.patcher

    def with_network(self, network: ModelPatcher) -> ControlNetXSControl:
        c = ControlNetXSControl(replace(self.loaded, patcher=network))
        self.copy_to(c)
        return c

    def check(self, base: LoadedBase) -> None:
        check_xs_pair(base, self.loaded.file.shape, self.name)

    def join(
        self, transformer_options: TransformerOptions, x: Tensor, sigma: float, strength: float, owner: object
    ) -> None:
        options = self.options
        mix = -1.0 if options.time_mix is None else options.time_mix
        order = (self.loaded.uid, self.hint_id, strength, options.apply_to.value, *options.ids, options.parts, mix)
        start = functools.partial(self.start, prepared_for=x, sigma=sigma, strength=strength)
        join_forward(transformer_options, XSJob(order, start, owner))

    def start(
        self,
        x: Tensor,
        context: Tensor,
        transformer_options: TransformerOptions,
        *,
        prepared_for: Tensor,
        sigma: float,
        strength: float,
    ) -> Companion | None:
        """Start the control stream beside the base. x (rows, 4 or more, H, W) and context (rows, T, D): the UNet's
        inputs.
        """
        assert self.run is not None
        self.run.counts.reached += 1
        warn_if_tiled(self.name, x.shape, prepared_for.shape)
        gains, latents = self.layout(x.shape[0], transformer_options)
        active = [n for n, gain in enumerate(gains) if gain]
        if not active:
            return None
        self.run.counts.added += 1
        rows, of_gain = None, x.shape[0] // len(gains)
        if len(active) < len(gains):
            rows = torch.cat([torch.arange(n * of_gain, (n + 1) * of_gain, device=x.device) for n in active])
        hint = self.hint_features(self.hint_rows(latents, transformer_options), x)
        own_time = self.own_time(sigma, x) if self.loaded.net.config.own_time is not None else None

        def take(batch: Tensor) -> Tensor:
            return batch if rows is None else batch.index_select(0, rows)

        def in_rows(batch: Tensor) -> Tensor:
            if len(batch) == 1:
                return batch
            return take(batch) if self.tiles is not None else batch.repeat(len(active), 1, 1, 1)

        def mask(h: Tensor) -> Tensor | None:
            whole = self.mask(latents, h, transformer_options, sigma)
            return whole if whole is None else in_rows(whole)

        encoder, middle, decoder = self.options.parts
        return Companion(
            name=self.name,
            walk=Walk(self.loaded.net, take(x), in_rows(hint)),
            rows=rows,
            context=take(context),
            strengths=(strength * encoder, strength * middle, strength * decoder),
            mask=mask,
            own_time=own_time,
            mix=time_mix(strength if self.options.time_mix is None else self.options.time_mix),
        )

    def hint_features(self, rows: tuple[int, ...], x: Tensor) -> Tensor:
        """Output of the hint encoder for each row's hint: (len(rows), C, H, W) in x's dtype; cached."""
        assert self.run is not None
        group = group_of(self.loaded.uid, self.hint_id, self.network)
        pixels = x.shape[-2] * x.shape[-1] * self.compression_ratio**2
        at_once = rows_at_once(pixels * self.bytes_per_pixel(x.dtype))
        return cached_rows(group, rows, _Encoder(self, x), ANY_TIME, list, x.device, self.run.recent, at_once)

    def own_time(self, sigma: float, x: Tensor) -> Tensor:
        """Time embedding of the control at this sigma, (1, D) in x's dtype; cached."""
        assert self.run is not None
        group, timestep = group_of(self.loaded.uid, "time", self.network), self.run.timestep(sigma)
        key = (round(timestep, 6), x.dtype)
        found = CACHE.get(group, key, x.device)
        if found is None:
            found = self.loaded.net.embed_time(torch.full((1,), timestep, device=x.device), x.dtype)
            CACHE.put(group, key, found)
        return found

    def bytes_per_pixel(self, dtype: torch.dtype) -> int:
        return xs_numbers_per_pixel(self.loaded.net.config) * dtype.itemsize

    def bytes_beside_base(self, dtype: torch.dtype) -> int:
        fp32_norms = self.loaded.file.shape.fp32_norms and dtype != torch.float32
        numbers = xs_numbers_per_cell(self.loaded.net.config, fp32_norms)
        return int(XS_ROWS_PER_HINT * numbers * self.cells() * dtype.itemsize)

    def kept_bytes(self, dtype: torch.dtype) -> int:
        return self.loaded.net.config.hint[-1] * self.cells() * dtype.itemsize

    def cells(self) -> int:
        """Number of latent cells under a hint of this size."""
        height, width = (-(-side // self.compression_ratio) for side in self.cond_hint_original.shape[-2:])
        return height * width


class _Encoder:
    """`HintEncoder` of a ControlNet-XS, whose output does not depend on the timestep."""

    def __init__(self, control: ControlNetXSControl, x: Tensor) -> None:
        self.control, self.x = control, x

    def key(self, timestep: float) -> tuple[Hashable, ...]:
        return (tuple(self.x.shape[-2:]), self.x.dtype)

    def encode(self, rows: tuple[int, ...], timestep: float) -> Tensor:
        hint = self.control.sized_hint(rows, self.x, self.x.dtype)
        return self.control.loaded.net.encode_hint(hint).contiguous()


def time_mix(strength: float) -> float:
    """Share of the control's time embedding in place of the base's: strength^0.3, 0 for strengths below 0."""
    return max(strength, 0.0) ** TIME_EXPONENT


def check_xs_pair(base: LoadedBase, shape: XSShape, name: str) -> None:
    """Raise ValueError unless a ControlNet-XS of this shape fits this base model; `name` is the control's file."""
    wanted = shape.family.value
    if base.family is not shape.family or not base.places:
        raise ValueError(
            f"{name}: is a ControlNet-XS for {wanted}, but the connected model is {base.family.value}. Connect a "
            f"{wanted} checkpoint or choose another control."
        )
    config = base.config
    encoder, decoder = base_widths_of(config)
    for what, theirs, ours in (
        ("text context", config.get("context_dim"), shape.context_dim),
        ("first channels and time embedding", 4 * config["model_channels"], shape.time_dim),
        ("encoder blocks", encoder, shape.base_widths),
        ("decoder blocks", decoder, shape.decoder_widths),
    ):
        if theirs != ours:
            raise ValueError(
                f"{name}: was made for a base model with other {what}: {_words(ours)}, but the connected model has "
                f"{_words(theirs)}. Connect the {wanted} checkpoint that this control was trained for."
            )


def _words(widths: Any) -> str:
    """Channels as text; those of a whole UNet as runs of equal numbers."""
    if not isinstance(widths, tuple):
        return str(widths)
    return f"{len(widths)} blocks of " + "-".join(str(width) for width in dict.fromkeys(widths))
