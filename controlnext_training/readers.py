"""Readers that prefetch samples in threads; `run.py train` uses readers in separate processes.

Threads are safe wherever the trainer runs: inside ComfyUI's server a spawned process would import, and so start, the
server once more. Decoders and OpenCV release the interpreter's lock while they work.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from torch import Tensor

from .data.samples import ControlDataset, Sample

Job = Callable[[], Sample]
"""Function that reads one sample; may raise BrokenSample."""


class Readers(Protocol):
    """Workers that read samples."""

    @property
    def count(self) -> int:
        """Number of samples that are read at the same time; 0: each is read when it is needed."""

    def submit(self, job: Job) -> Future[Sample]:
        """Start reading a sample, or queue it. Not allowed for a count of 0."""

    def close(self) -> None:
        """End all workers; unfinished jobs are dropped."""


class ThreadReaders:
    """Readers in threads of this process."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(max(1, count), "readers")

    def submit(self, job: Job) -> Future[Sample]:
        return self._pool.submit(job)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


MakeReaders = Callable[[int], Readers]


class PendingSample:
    """Sample at one position of the run whose files are being prefetched."""

    def __init__(self, data: ControlDataset, index: int, seed: int, position: int, variant: int = 0) -> None:
        """variant: number of the crop."""
        self.data, self.index, self.position, self.seed, self.variant = data, index, position, seed, variant
        self.frame_keys = data.frame_keys(index, seed, position, variant)
        self.caption = data.captions[index]
        self._coming: Future[Sample] | None = None
        self._read: Sample | None = None
        self._whole = False

    def start(self, readers: Readers, whole: bool) -> None:
        """Prefetch. whole: True reads also the frames; False only the hints and masks."""
        self._whole = whole
        if readers.count:
            self._coming = readers.submit(self._job(whole))

    @property
    def frames(self) -> Tensor:
        """Frames (F, H, W, 3), read now unless prefetched. Raises BrokenSample."""
        return self.sample(whole=True).frames

    def sample(self, whole: bool) -> Sample:
        """Sample, read now unless prefetched. whole: True includes its frames; False may not. Raises BrokenSample."""
        if self._coming is not None:
            self._read, self._coming = self._coming.result(), None
        if self._read is None or (whole and not len(self._read.frames)):
            self._read = self._job(whole or self._whole)()
        return self._read

    def _job(self, whole: bool) -> Job:
        return self.data.job(self.index, self.seed, self.position, whole, self.variant)
