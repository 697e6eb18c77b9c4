"""Candidates with a second stream:

ControlNet-XS's block beside the base's next block, features prefetched by a step.
"""

from __future__ import annotations

import functools
import unittest.mock
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Side:
    """Second stream of a device; on a CPU all work runs in place."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """Run work on the second stream, after all work queued so far. Call `join` before the result is used."""
        if self.stream is None:
            return work()
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            return work()

    def join(self, result: Tensor) -> Tensor:
        """Make the current stream wait for the result."""
        if self.stream is not None:
            current = torch.cuda.current_stream(self.stream.device)
            current.wait_stream(self.stream)
            result.record_stream(current)
        return result


@contextmanager
def beside_the_base(device: torch.device) -> Iterator[None]:
    """Context in which an encoder block of a ControlNet-XS starts when its input is ready, beside the base's next
    block.
    """
    from ...controlnext_core.comfy_adapter.bases.forward_options import TransformerOptions
    from ...controlnext_core.comfy_adapter.sampling.xs_forward import Lockstep
    from ...models.controlnet_xs import Walk

    side, take_base, encode = Side(device), Lockstep.take_base, Walk.encode

    def take_and_start(lockstep: Any, h: Tensor, options: TransformerOptions) -> Tensor:
        result, number = take_base(lockstep, h, options), lockstep.encoded
        if number < lockstep.blocks:
            for companion, emb in zip(lockstep.companions, lockstep.embs, strict=True):
                walk = companion.walk
                block, c, context = walk.net.encoder[number], walk.c, companion.context
                walk.started = side.run(functools.partial(block, c, emb, context))
        return result

    def take(walk: Any, i: int, emb: Tensor, context: Tensor) -> Tensor | None:
        started = walk.__dict__.pop("started", None)
        if started is None:
            return encode(walk, i, emb, context)
        walk.c = side.join(started)
        walk.skips.append(walk.c)
        return walk.net.control_to_base[i](walk.c) if walk.net.config.adds_in_encoder else None

    patch = unittest.mock.patch.object
    with patch(Lockstep, "take_base", take_and_start), patch(Walk, "encode", take):
        yield


@contextmanager
def fetched_ahead(device: torch.device) -> Iterator[None]:
    """Context in which a ControlNeXt's features for the next step are copied from host memory during this step."""
    from ...controlnext_core.comfy_adapter.sampling import next_control
    from ...controlnext_core.comfy_adapter.sampling.features import CACHE

    side, rows_of = Side(device), next_control.cached_rows
    ready: dict[Any, Tensor] = {}

    def cached_rows(group: Any, rows: Any, encoder: Any, timestep: float, later: Any, *rest: Any) -> Tensor:
        key = (group, rows, encoder.key(timestep))
        found = side.join(ready.pop(key)) if key in ready else rows_of(group, rows, encoder, timestep, later, *rest)
        ready.clear()
        following = next(iter(later()), None)
        if following is not None and all(CACHE.holds(group, (row, *encoder.key(following))) for row in rows):
            fetch = functools.partial(rows_of, group, rows, encoder, following, list, *rest)
            ready[(group, rows, encoder.key(following))] = side.run(fetch)
        return found

    with unittest.mock.patch.object(next_control, "cached_rows", cached_rows):
        yield
