"""ControlNeXt as a CONTROL_NET: the encoder's features, cached, added where the row of the table says."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..feature_cache import FeatureCache, GroupKey
from ..injection import Term, prepare
from ..specs import Spec
from .base_facts import BaseFacts, check_pair
from .collector import Job, collect
from .halves import half_gains, is_plain, needs_halves, places_hook
from .host_control import HostControl, hint_rows

log = logging.getLogger(__name__)

CACHE = FeatureCache()
"""Outlives nodes and runs: a queue run with another seed finds the features of the one before."""

ROWS_AT_ONCE = 8
"""Hints that the encoder takes in one pass; bounds its working memory for videos."""


@dataclass(frozen=True)
class LoadedControlNeXt:
    """An encoder in the host's hands."""

    patcher: ModelPatcher
    spec: Spec
    name: str
    uid: str
    """Content hash of the weights with what else changes the features: build and dtype."""
    scale: float | None
    """The learned gain of the file, for the variants that have one."""


class ControlNeXtControl(HostControl):
    """One ControlNeXt, for the stock Apply nodes and for ControlNeXtApply."""

    def __init__(self, net: LoadedControlNeXt) -> None:
        super().__init__()
        self.net = net
        self.name = net.name
        self.set_hooks()

    def set_hooks(self) -> None:
        """Bring the hook that tells the halves apart, where the gain depends on them."""
        wanted = needs_halves(self.options.apply_to, self.net.spec.fusion.gain)
        self.extra_hooks = places_hook() if wanted else None

    def copy(self) -> ControlNeXtControl:
        c = ControlNeXtControl(self.net)
        self.copy_to(c)
        return c

    def with_options(self, **changes: Any) -> HostControl:
        c = super().with_options(**changes)
        assert isinstance(c, ControlNeXtControl)
        c.set_hooks()
        return c

    def get_models(self) -> list[ModelPatcher]:
        return [*super().get_models(), self.net.patcher]

    def check(self, facts: BaseFacts) -> None:
        check_pair(facts, self.net.spec, self.net.patcher.model.config.out_channels, self.name)

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        super().pre_run(model, percent_to_timestep_function)
        CACHE.begin_run()

    def join(self, transformer_options: dict[str, Any], x: Tensor, sigma: float, strength: float) -> None:
        assert self.run is not None
        block = self.run.facts.blocks[self.net.spec.fusion.site]
        order = (self.net.uid, self.hint_id, strength, self.options.apply_to.value, self.options.mask_id)
        term = functools.partial(self.term, x=x, sigma=sigma, strength=strength)
        collect(transformer_options, Job(block, order, term))

    def term(
        self, h: Tensor, transformer_options: dict[str, Any], *, x: Tensor, sigma: float, strength: float
    ) -> Term | None:
        """What this control adds to h (rows, C, H, W) at its site, or None for nothing."""
        assert self.run is not None
        self.run.reached += 1
        warn_if_tiled(self.name, transformer_options, x)
        chunks = transformer_options.get("cond_or_uncond") or [0]
        if h.shape[0] % len(chunks):
            chunks = [0]
        gains = tuple(strength * gain for gain in self.chunk_gains(chunks, transformer_options))
        if not any(gains):
            return None
        self.run.added += 1
        latents = h.shape[0] // len(chunks)
        rows = hint_rows(latents, self.cond_hint_original.shape[0], transformer_options)
        return Term(
            self.features(rows, h, x, sigma),
            gains,
            self.net.spec.fusion,
            self.mask(latents, h, transformer_options),
        )

    def chunk_gains(self, chunks: list[int], transformer_options: dict[str, Any]) -> list[float]:
        """One gain per chunk of the guided batch, at strength 1."""
        gain, scale, apply_to = self.net.spec.fusion.gain, self.net.scale, self.options.apply_to
        positive, negative = half_gains(apply_to, gain, scale)
        if positive != negative and not is_plain(transformer_options):
            log_once(
                "%s: this guider does not number its halves as plain guidance does, so apply_to=%s cannot be followed; "
                "the control goes to both.",
                self.name,
                apply_to.value,
            )
            positive = negative = max(positive, negative)
        return [negative if chunk else positive for chunk in chunks]

    def mask(self, latents: int, h: Tensor, transformer_options: dict[str, Any]) -> Tensor | None:
        """The product of all masks at the site's size, (1 or latents, 1, H, W), or None."""
        product: Tensor | None = None
        for mask in self.options.masks:
            mask = mask[list(hint_rows(latents, mask.shape[0], transformer_options))].to(h.device)
            mask = torch.nn.functional.interpolate(mask, size=h.shape[-2:], mode="area")
            product = mask if product is None else product * mask
        return product

    def features(self, rows: tuple[int, ...], h: Tensor, x: Tensor, sigma: float) -> Tensor:
        """Encoder output of each row's hint, normalised and pooled: (len(rows), C, H, W) in h's dtype; cached."""
        assert self.run is not None
        size = (int(h.shape[-2]), int(h.shape[-1]))
        timestep = self.run.timestep(sigma)
        group = GroupKey(self.net.uid, self.hint_id)
        fusion = self.net.spec.fusion
        common = (
            round(timestep, 6),
            tuple(x.shape[-2:]),
            size,
            h.dtype,
            fusion.normalization,
            fusion.pool_first,
            fusion.eps,
        )
        found = {row: CACHE.get(group, (row, *common), h.device) for row in dict.fromkeys(rows)}
        missing = [row for row, value in found.items() if value is None]
        for start in range(0, len(missing), ROWS_AT_ONCE):
            batch = tuple(missing[start : start + ROWS_AT_ONCE])
            hint = self.sized_hint(batch, x, h.dtype)
            encoded = self.net.patcher.model(hint, torch.tensor([timestep], device=h.device))
            for row, value in zip(batch, prepare(encoded, size, fusion).to(h.dtype).split(1), strict=True):
                value = value.clone() if len(batch) > 1 else value
                CACHE.put(group, (row, *common), value)
                found[row] = value
        values = [value for row in rows if (value := found[row]) is not None]
        return values[0] if len(values) == 1 else torch.cat(values)


def drop_features(uid: str, patcher: ModelPatcher, unpatch_all: bool = True) -> None:
    """ON_DETACH callback of an encoder: the host takes it off the device, its features go too."""
    if unpatch_all:
        CACHE.drop(uid)


@functools.lru_cache(maxsize=256)
def log_once(message: str, *args: Any) -> None:
    """Log a line once per process."""
    log.info(message, *args)


def warn_if_tiled(name: str, transformer_options: dict[str, Any], x: Tensor) -> None:
    """A pack that cuts the latent behind our back gives every tile the whole hint: say so, once."""
    seen = transformer_options.get("original_shape")
    if seen is not None and tuple(seen[-2:]) != tuple(x.shape[-2:]):
        log_once(
            "%s: the latent is cut into tiles after the control was prepared; every tile gets the whole hint.",
            name,
        )
