"""Readers of samples ahead of their use, in threads; `run.py train` brings readers in processes of their own.

Threads are safe wherever the trainer runs: inside of ComfyUI's server a process that is spawned would import, and so
start, the server once more. Decoders and OpenCV let other threads run while they work.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from torch import Tensor

from .data.samples import ControlDataset, Sample

Job = Callable[[], Sample]
"""Reads one sample; may raise BrokenSample."""


class Readers(Protocol):
    """Workers that read samples."""

    @property
    def count(self) -> int:
        """Number of samples that are read at the same time; 0 = each is read where it is needed."""

    def submit(self, job: Job) -> Future[Sample]:
        """Start on a sample, or queue it. Not for a count of 0."""

    def close(self) -> None:
        """End all workers; what they had not finished is lost."""


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


class Begun:
    """Sample at one position of the run, whose files are being read where their content is needed."""

    def __init__(self, data: ControlDataset, index: int, seed: int, position: int, variant: int = 0) -> None:
        """variant: number of the cut."""
        self.data, self.index, self.position, self.seed, self.variant = data, index, position, seed, variant
        self.frame_keys = data.frame_keys(index, seed, position, variant)
        self.caption = data.captions[index]
        self._coming: Future[Sample] | None = None
        self._read: Sample | None = None
        self._whole = False

    def start(self, readers: Readers, whole: bool) -> None:
        """Read ahead; whole: also the frames, else the hints and masks alone."""
        self._whole = whole
        if readers.count:
            self._coming = readers.submit(self._job(whole))

    @property
    def frames(self) -> Tensor:
        """(F, H, W, 3), read now unless they are there or coming. Raises BrokenSample."""
        return self.sample(whole=True).frames

    def sample(self, whole: bool) -> Sample:
        """The sample, read now unless it is there or coming; whole: with its frames. Raises BrokenSample."""
        if self._coming is not None:
            self._read, self._coming = self._coming.result(), None
        if self._read is None or (whole and not len(self._read.frames)):
            self._read = self._job(whole or self._whole)()
        return self._read

    def _job(self, whole: bool) -> Job:
        return self.data.job(self.index, self.seed, self.position, whole, self.variant)
