"""Encoded samples: latents, conditions and hints as the base takes them, each encoded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .base_model.encode import BaseWithEncoders
from .config import TrainConfig
from .data.samples import Broken, BrokenSample, ControlDataset, DatasetError, Sample
from .distributed import ProcessGroup
from .journal import Observer
from .seeding import uniform


class TensorCache(Protocol):
    """Encoded tensors by key: `data.cache.Cache` on disk, or MemoryCache."""

    def __contains__(self, key: str) -> bool: ...
    def get(self, key: str) -> dict[str, Tensor] | None: ...
    def put(self, key: str, tensors: Mapping[str, Tensor]) -> bool: ...


class MemoryCache:
    """TensorCache in this process."""

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
    """One sample, on the CPU. F frames, 1 for a picture."""

    latent: Tensor
    """(F, C, H/8, W/8), as the UNet takes latents."""
    given: dict[str, Tensor]
    """Encoded conditions by name; see `base_model.conditioning`."""
    hint: Tensor
    """(F, 3, H, W) in [0, 1]."""
    mask: Tensor | None
    """(F, H, W) in [0, 1]."""
    original_size: tuple[int, int]
    crop: tuple[int, int]
    caption: str

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return int(self.hint.shape[-2]), int(self.hint.shape[-1])


class Store:
    """A dataset with the encoders of a base, and a cache of what they gave."""

    def __init__(self, base: BaseWithEncoders, data: ControlDataset, config: TrainConfig, cache: TensorCache) -> None:
        self.base, self.data, self.config, self.cache = base, data, config, cache

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
        for done, index in enumerate(mine):
            if observer.stopping():
                break
            try:
                self._encode(index)
            except BrokenSample as error:
                broken.append(Broken(error.path, error.why))
                bad.append(index)
            observer.progress(done + 1, len(mine), f"encoding {done + 1} of {len(mine)}")
        out = {index for part in group.gather(bad) for index in part}
        usable = [index for index in indices if index not in out]
        if not usable:
            first = f" The first: {broken[0].path}: {broken[0].why}." if broken else ""
            raise DatasetError(f"None of the {len(indices)} samples can be read.{first} Check the files.")
        return usable, [item for part in group.gather(broken) for item in part]

    def _encode(self, index: int) -> None:
        """Encode everything of a sample that is known before its step."""
        self.base.family.conditioning.prepare(self.base, self.cached, self.data.captions[index])
        keys = [self._latent_key(key) for key in self.data.frame_keys(index, self.config.seed, index)]
        if not all(key in self.cache for key in keys):
            self.latent(self.data.load(index, self.config.seed, index))

    def _latent_key(self, frame_key: str) -> str:
        return f"latent-{self.base.identity('vae')}-{frame_key}"

    def latent(self, sample: Sample) -> Tensor:
        """Latents (F, C, H/8, W/8) of a sample; frames that are kept are not encoded again."""
        keys = [self._latent_key(key) for key in sample.frame_keys]
        found = {key: kept["latent"] for key in keys if (kept := self.cache.get(key)) is not None}
        for place, key in enumerate(keys):
            if key not in found:
                found[key] = self.base.latent(sample.frames[place : place + 1])
                self.cache.put(key, {"latent": found[key]})
        return torch.cat([found[key] for key in keys])

    def cached(self, key: str, encode: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors kept under a key; `encode` makes them where there are none."""
        found = self.cache.get(key)
        if found is None:
            found = encode()
            self.cache.put(key, found)
        return found

    def sample(self, index: int, position: int, dropout: bool = True) -> Encoded:
        """The sample at one position of the run; dropout: let caption and hint drop out. Raises BrokenSample."""
        sample = self.data.load(index, self.config.seed, position)
        hint = sample.hints.movedim(-1, 1).contiguous()
        if dropout and uniform(self.config.seed, "hint dropout", position) < self.config.hint_dropout:
            hint = torch.zeros_like(hint)
        drop = uniform(self.config.seed, "caption dropout", position) if dropout else 1.0
        return Encoded(
            latent=self.latent(sample),
            given=self.base.family.conditioning.encode(
                self.base, self.cached, sample, drop, self.config.caption_dropout
            ),
            hint=hint,
            mask=sample.mask,
            original_size=sample.original_size,
            crop=sample.crop,
            caption=sample.caption,
        )

    def empty(self, like: Encoded) -> dict[str, Tensor]:
        """Conditions of the unconditional side of guidance, for a sample like this one."""
        return self.base.family.conditioning.empty(self.base, self.cached, like.given)


SampleRequests = tuple[tuple[int, int], ...]
"""(index, position) of each sample."""


class Prefetcher:
    """Reads the samples of the next step in a thread while this one computes; not where reading also encodes."""

    def __init__(self, store: Store, usable: Sequence[int], say: Callable[[str], None]) -> None:
        """usable: indices that train, from which an unreadable sample is replaced; say: is told of each replacement."""
        self.store, self.usable, self.say = store, usable, say
        self.pool = ThreadPoolExecutor(1, "samples")
        self.coming: tuple[SampleRequests, Future[list[Encoded]]] | None = None
        self.gone: set[int] = set()

    def get(self, wanted: SampleRequests, upcoming: SampleRequests) -> list[Encoded]:
        """The samples of this step; starts on those of the next."""
        ready = self.coming is not None and self.coming[0] == wanted
        found = self.coming[1].result() if ready and self.coming else self._read(wanted)
        threaded = upcoming and not self.store.base.family.conditioning.encoded_while_training
        self.coming = (upcoming, self.pool.submit(self._read, upcoming)) if threaded else None
        return found

    def _read(self, wanted: SampleRequests) -> list[Encoded]:
        return [self._sample(index, position) for index, position in wanted]

    def _sample(self, index: int, position: int) -> Encoded:
        """The sample, or the next one of its size that can be read. Raises DatasetError where there is none."""
        sizes = self.store.data.sizes
        start = self.usable.index(index)
        for candidate in (*self.usable[start:], *self.usable[:start]):
            if candidate in self.gone or sizes[candidate] != sizes[index]:
                continue
            try:
                return self.store.sample(candidate, position)
            except BrokenSample as error:
                self.gone.add(candidate)
                self.say(f"from now on left out: {error}")
        height, width = sizes[index]
        raise DatasetError(f"None of the samples of {width}x{height} can be read any more. Check the files.")

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
