"""Reader processes that prefetch samples of a training run, for `run.py train`.

They are spawned, on Linux as on Windows and macOS: a fork of a process that uses CUDA or threads is not safe. A spawned
process imports the main module again. run.py does nothing then; the server of ComfyUI would start once more, and uses
threads instead (controlnext_training/readers.py). Each process has a separate pipe whose other end closes with the run,
killed or not, and ends then.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import runpy
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..controlnext_core import encodable
from ..controlnext_training.data.reading import Request
from ..controlnext_training.data.samples import BrokenSample, Sample
from ..controlnext_training.readers import Job, Readers, ThreadReaders

logger = encodable.logger(__name__)

SCRIPT = Path(__file__).with_name("reader_process.py")
HELD_BACK = ("SIGINT", "SIGHUP")
"""Signals that a terminal sends to every process in it; readers start with them blocked."""


class ProcessReaders:
    """Readers in processes, started when the first file is requested. Samples without files are made in threads.

    A process that ends unexpectedly only costs speed: its samples are then read in this process.
    """

    def __init__(self, count: int) -> None:
        """count: largest number of processes; `began` counts those that were started."""
        self.count = count
        self._threads = ThreadPoolExecutor(max(1, count), "readers")
        self._mine = threading.local()
        self.began = 0
        self._started: list[tuple[Any, Any]] = []
        self._lock, self._closed = threading.Lock(), False

    def submit(self, job: Job) -> Future[Sample]:
        """Implementation of `Readers.submit`: a process reads the sample."""
        return self._threads.submit(self._read if isinstance(job, Request) else _call, job)

    def close(self) -> None:
        """Implementation of `Readers.close`: ends every process."""
        with self._lock:
            self._closed = True
            for process, _ in self._started:
                process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process, connection in self._started:
            process.join()
            connection.close()
        self._started.clear()

    def _read(self, request: Job) -> Sample:
        """Sample read by this thread's process, or by this thread where that has ended."""
        if not hasattr(self._mine, "connection"):
            self._mine.connection = self._start()
        answer = self._ask(pickle.dumps(request, pickle.HIGHEST_PROTOCOL))
        if answer is None:
            return request()
        sample, error = answer
        if isinstance(error, BrokenSample):
            raise error
        return request() if error is not None else sample

    def _ask(self, request: bytes) -> tuple[Sample, Exception | None] | None:
        """Answer of the process; None where it has ended."""
        connection = self._mine.connection
        if connection is None:
            return None
        try:
            connection.send_bytes(request)
            return pickle.loads(connection.recv_bytes())  # noqa: S301 - the other end is this project  # nosec B301
        except (EOFError, OSError) as error:
            self._mine.connection = None
            if self._closed:
                raise RuntimeError("the readers were closed") from error
            logger.warning("a process that reads pictures has ended; the run continues and reads more slowly")
            return None

    def _start(self) -> Any:
        """Connection to a new process; None where the system refuses one."""
        context = multiprocessing.get_context("spawn")
        with self._lock:
            if self._closed:
                raise RuntimeError("the readers were closed")
            ours, theirs = context.Pipe()
            given = (str(SCRIPT), {"CONNECTION": theirs}, "controlnext_reader")
            process = context.Process(target=runpy.run_path, args=given, daemon=True, name="controlnext reader")
            try:
                with _blocked():
                    process.start()
            except OSError as error:
                logger.warning("no process to read pictures could be started (%s)", error)
                return None
            finally:
                theirs.close()
            self._started.append((process, ours))
            self.began += 1
            return ours


def readers_of(count: int) -> Readers:
    """Readers for this count. One is a thread, which needs no memory; more are processes, which decode in parallel."""
    return ProcessReaders(count) if count > 1 else ThreadReaders(count)


def _call(job: Job) -> Sample:
    return job()


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """Context in which a started process inherits HELD_BACK as blocked, where the system supports it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {getattr(signal, name) for name in HELD_BACK})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
