"""Encoded samples: latents, conditions and hints as inputs of the base, each encoded once."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .base_model.encode import BaseWithEncoders
from .config import TrainConfig
from .data.samples import Broken, BrokenSample, ControlDataset, DatasetError, digest
from .distributed import ProcessGroup
from .journal import Observer
from .packed import bytes_of, floats_of, pack, unpack
from .readers import PendingSample, Readers, ThreadReaders
from .seeding import uniform


class TensorCache(Protocol):
    """Encoded tensors by key: `data.cache.Cache` on disk, or MemoryCache."""

    def __contains__(self, key: str) -> bool: ...
    def get(self, key: str) -> dict[str, Tensor] | None: ...
    def put(self, key: str, tensors: Mapping[str, Tensor]) -> bool: ...


class MemoryCache:
    """TensorCache in the memory of this process."""

    def __init__(self) -> None:
        self.held: dict[str, dict[str, Tensor]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.held

    def get(self, key: str) -> dict[str, Tensor] | None:
        return self.held.get(key)

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        self.held[key] = dict(tensors)
        return True


@dataclass(frozen=True, slots=True)
class Encoded:
    """Encoded sample, on the CPU. F frames, 1 for a picture."""

    latent: Tensor
    """Latents (F, C, H/8, W/8), or (1, C, T, H/8, W/8) of a clip in one latent, scaled for the network."""
    given: dict[str, Tensor]
    """Encoded conditions by name; see `base_model.conditioning`."""
    hint: Tensor
    """Hints (F, 3, H, W) in [0, 1]."""
    mask: Tensor | None
    """Mask (F, H, W) in [0, 1]; None without one."""
    original_size: tuple[int, int]
    crop: tuple[int, int]
    caption: str
    weight: float = 1.0
    """Factor on the sample's loss."""

    @property
    def size(self) -> tuple[int, int]:
        """Size (height, width) in pixels."""
        return int(self.hint.shape[-2]), int(self.hint.shape[-1])


class Store:
    """Dataset with the encoders of a base, and a cache of their results."""

    def __init__(
        self,
        base: BaseWithEncoders,
        data: ControlDataset,
        config: TrainConfig,
        cache: TensorCache,
        readers: Readers | None = None,
    ) -> None:
        """readers: prefetch files; None: each file is read when it is needed."""
        self.base, self.data, self.config, self.cache = base, data, config, cache
        self.readers = readers or ThreadReaders(0)

    def prepare(
        self, indices: Sequence[int], group: ProcessGroup, observer: Observer
    ) -> tuple[list[int], list[Broken]]:
        """Encode the samples that the cache lacks, each process its share; returns (readable samples, broken samples).

        Raises DatasetError where none can.
        """
        mine = list(indices[group.rank :: group.size])
        broken: list[Broken] = []
        bad: list[int] = []
        conditioning = self.base.family.conditioning
        conditioning.prepare(self.base, self.cached, "")  # for dropped captions and for guidance
        total = sum(self.data.share(index).variants for index in mine)
        for done, begun in enumerate(self._ahead(mine)):
            if observer.stopping():
                break
            try:
                self._encode(begun)
            except BrokenSample as error:
                broken.append(Broken(error.path, error.why))
                bad.append(begun.index)
            observer.progress(done + 1, total, f"encoding {done + 1} of {total}")
        out = {index for part in group.gather(bad) for index in part}
        usable = [index for index in indices if index not in out]
        if not usable:
            first = f" The first: {broken[0].path}: {broken[0].why}." if broken else ""
            raise DatasetError(f"None of the {len(indices)} samples can be read.{first} Check the files.")
        return usable, [item for part in group.gather(broken) for item in part]

    def _ahead(self, indices: Sequence[int]) -> Iterator[PendingSample]:
        """Variants of the samples, all in order; twice as many as there are readers are prefetched."""
        coming: deque[PendingSample] = deque()
        cuts = ((index, cut) for index in indices for cut in range(self.data.share(index).variants))
        for index, variant in cuts:
            coming.append(self.begin(index, index, variant))
            if len(coming) > 2 * self.readers.count:
                yield coming.popleft()
        yield from coming

    def _encode(self, begun: PendingSample) -> None:
        """Encode everything of a sample that is known before its step."""
        conditioning = self.base.family.conditioning
        if not conditioning.encoded_while_training:
            conditioning.encode(self.base, self.cached, begun, 1.0, 0.0)
        if not self._has_latents(begun):
            self._latent(begun)
        if self.config.cache and not self._has_hints(begun):
            self._hint(begun)

    def variant(self, index: int, position: int) -> int:
        """Number of the variant of a sample that a position of the run draws."""
        count = self.data.share(index).variants
        return int(uniform(self.config.seed, "cut", position) * count) if count > 1 else 0

    def begin(self, index: int, position: int, variant: int) -> PendingSample:
        """One cut of the sample at one position of the run; its files are read ahead where it is not cached."""
        begun = PendingSample(self.data, index, self.config.seed, position, variant)
        first = self.base.family.conditioning.frame_key(self.base, begun.frame_keys)
        whole = not self._has_latents(begun) or (first is not None and first not in self.cache)
        if whole or not self._has_hints(begun):
            begun.start(self.readers, whole)
        return begun

    def _has_latents(self, begun: PendingSample) -> bool:
        return all(key in self.cache for key in self._latent_keys(begun.frame_keys))

    def _has_hints(self, begun: PendingSample) -> bool:
        return self.config.cache and all(key in self.cache for key in _hint_keys(begun))

    def _latent_keys(self, frame_keys: Sequence[str]) -> list[str]:
        """Keys of a sample's latents: one per frame, or one for the clip as a whole."""
        whole = self.base.family.one_latent and len(frame_keys) > 1
        return [f"latent-{self.base.identity('vae')}-{key}" for key in ([digest(*frame_keys)] if whole else frame_keys)]

    def _latent(self, begun: PendingSample) -> Tensor:
        """Latents of a sample, see `Encoded`; cached ones are not encoded again. Raises BrokenSample."""
        keys = self._latent_keys(begun.frame_keys)
        each = len(begun.frame_keys) // len(keys)
        found = {key: kept["latent"] for key in keys if (kept := self.cache.get(key)) is not None}
        for place, key in enumerate(keys):
            if key not in found:
                found[key] = self.base.latent(begun.frames[place * each : (place + 1) * each])
                self.cache.put(key, {"latent": found[key]})
        return torch.cat([found[key] for key in keys])

    def _hint(self, begun: PendingSample) -> tuple[Tensor, Tensor | None]:
        """Hints (F, 3, H, W) and masks (F, H, W) or None, in steps of 1/255, cached on disk. Raises BrokenSample."""
        size = self.data.sizes[begun.index]
        if self.config.cache and (kept := self._kept_hint(begun, size)) is not None:
            return kept
        sample = begun.sample(whole=False)
        hints = bytes_of(sample.hints.movedim(-1, 1))
        masks = None if sample.mask is None else bytes_of(sample.mask)
        for place, key in enumerate(_hint_keys(begun) if self.config.cache else ()):
            mask = {} if masks is None else {"mask": pack(masks[place, None])}
            self.cache.put(key, {"hint": pack(hints[place]), **mask})
        return floats_of(hints).contiguous(), None if masks is None else floats_of(masks)

    def _kept_hint(self, begun: PendingSample, size: tuple[int, int]) -> tuple[Tensor, Tensor | None] | None:
        """Hints and masks from the cache; None where one is missing."""
        kept = [self.cache.get(key) for key in _hint_keys(begun)]
        found = [row for row in kept if row is not None]
        if len(found) < len(kept):
            return None
        hints = torch.stack([unpack(row["hint"], 3, size) for row in found])
        masks = [unpack(row["mask"], 1, size)[0] for row in found if "mask" in row]
        return floats_of(hints), floats_of(torch.stack(masks)) if masks else None

    def cached(self, key: str, encode: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors cached under a key; `encode` makes them where they are missing."""
        found = self.cache.get(key)
        if found is None:
            found = encode()
            self.cache.put(key, found)
        return found

    def sample(self, index: int, position: int, dropout: bool = True) -> Encoded:
        """Encoded sample at one position of the run. Raises BrokenSample.

        dropout: True lets caption and hint drop out, draws a variant and weights the loss; False does none of these.
        """
        return self.finish(self.begin(index, position, self.variant(index, position) if dropout else 0), dropout)

    def finish(self, begun: PendingSample, dropout: bool = True) -> Encoded:
        """Encode the sample that `begin` returned. Raises BrokenSample."""
        seed, position = self.config.seed, begun.position
        hint, mask = self._hint(begun)
        if dropout and uniform(seed, "hint dropout", position) < self.config.hint_dropout:
            hint = torch.zeros_like(hint)
        drop = uniform(seed, "caption dropout", position) if dropout else 1.0
        place = self.data.place(begun.index, begun.variant)
        return Encoded(
            latent=self._latent(begun),
            given=self.base.family.conditioning.encode(
                self.base, self.cached, begun, drop, self.config.caption_dropout
            ),
            hint=hint,
            mask=mask,
            original_size=place.original,
            crop=place.seen_crop,
            caption=begun.caption,
            weight=self.data.share(begun.index).weight if dropout else 1.0,
        )

    def empty(self, like: Encoded) -> dict[str, Tensor]:
        """Conditions for the unconditional side of guidance, for a sample such as this one."""
        return self.base.family.conditioning.empty(self.base, self.cached, like.given)


SampleRequests = tuple[tuple[int, int], ...]
"""Pairs (index, position), one per sample."""


class Prefetcher:
    """Prefetcher of the samples of coming steps. Of samples that are not encoded yet it reads the files only."""

    def __init__(self, store: Store, usable: Sequence[int], say: Callable[[str], None]) -> None:
        """usable: ascending indices of training samples, which replace unreadable ones; say: called with a line for
        each.
        """
        self.store, self.usable, self.say = store, usable, say
        self.pool = ThreadPoolExecutor(1, "samples")
        self.begun: dict[SampleRequests, Future[list[PendingSample]]] = {}
        self.finished: dict[SampleRequests, Future[list[Encoded]]] = {}
        self.gone: set[int] = set()

    def steps_ahead(self, batch: int) -> int:
        """Number of coming steps to prefetch; batch: samples of one step."""
        return 1 + self.store.readers.count // batch

    def get(self, wanted: SampleRequests, coming: Sequence[SampleRequests]) -> list[Encoded]:
        """Samples of this step; prefetching of the coming ones is started."""
        begun, ready = self.begun.pop(wanted, None), self.finished.pop(wanted, None)
        found = ready.result() if ready else self._finish(begun.result() if begun else self._begin(wanted))
        self.begun = {step: self.begun.get(step) or self.pool.submit(self._begin, step) for step in coming}
        first = coming[0] if coming else ()
        if first and not self.store.base.family.conditioning.encoded_while_training:
            self.finished = {first: self.pool.submit(self._finish_later, self.begun[first])}
        return found

    def _begin(self, wanted: SampleRequests) -> list[PendingSample]:
        return [self.store.begin(index, position, self.store.variant(index, position)) for index, position in wanted]

    def _finish_later(self, begun: Future[list[PendingSample]]) -> list[Encoded]:
        return self._finish(begun.result())

    def _finish(self, step: list[PendingSample]) -> list[Encoded]:
        return [self._sample(begun) for begun in step]

    def _sample(self, begun: PendingSample) -> Encoded:
        """Encoded sample, or the next one of its size that can be read. Raises DatasetError where there is none."""
        sizes = self.store.data.sizes
        start = bisect_left(self.usable, begun.index)
        for offset in range(len(self.usable)):
            candidate = self.usable[(start + offset) % len(self.usable)]
            if candidate in self.gone or sizes[candidate] != sizes[begun.index]:
                continue
            try:
                place = begun.position
                other = self.store.begin(candidate, place, self.store.variant(candidate, place)) if offset else begun
                return self.store.finish(other)
            except BrokenSample as error:
                self.gone.add(candidate)
                self.say(f"from now on left out: {error}")
        height, width = sizes[begun.index]
        raise DatasetError(f"None of the samples of {width}x{height} can be read any more. Check the files.")

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def _hint_keys(begun: PendingSample) -> list[str]:
    """Keys of the cached hints, one per frame. A clip's first frame has no mask, and so another key."""
    kinds = ["hint"] * len(begun.frame_keys)
    if len(kinds) > 1:
        kinds[0] = "first-hint"
    return [f"{kind}-{key}" for kind, key in zip(kinds, begun.frame_keys, strict=True)]
