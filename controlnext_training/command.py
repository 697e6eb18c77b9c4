"""Training from a configuration only: the run of `python run.py train`, once the host can be imported."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..controlnext_core.encodable import escaped
from .base_model.base_files import control_folder, load_base, runs_folder
from .choices import reference_of
from .config import ConfigError, TrainConfig
from .data.dataset import open_dataset
from .data.index import Progress
from .data.report import report
from .data.samples import ControlDataset, Share
from .distributed import ProcessGroup, join_group, together
from .drawn import is_drawn, open_drawn
from .readers import MakeReaders, ThreadReaders
from .results import RunFiles
from .train import train
from .validation import VALIDATING

if TYPE_CHECKING:
    from PIL.Image import Image

    from .base_model.encode import BaseWithEncoders

INDEX = "cache/index.json"
"""Path below the folder of runs of the file that caches facts about datasets."""


SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
"""Signals that ask a run to save and end: Ctrl-C, a request of the system, a closed terminal, Ctrl-Break."""

TOGETHER = 2.0
"""Seconds within which a second signal counts as the first: `torchrun` forwards another one to that of the terminal."""


class Console:
    """Observer that prints lines to standard output; Ctrl-C makes the run save and end."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.asked = threading.Event()
        self.asked_at = 0.0

    def say(self, text: str) -> None:
        if self.quiet:
            return
        with contextlib.suppress(OSError):  # the terminal or the pipe is gone: no reason to lose the run
            sys.stdout.write(f"{escaped(text)}\n")
            sys.stdout.flush()

    def progress(self, step: int, steps: int, text: str) -> None:
        rare = step in (1, steps) or step % 100 == 0
        if text.startswith("step") or (rare and not text.startswith(VALIDATING)):
            self.say(text)

    def picture(self, image: Image) -> None:
        """No operation: the picture is also written to a file."""

    def curve(self, draw: Callable[[], Image]) -> None:
        """No operation: the curve is written to a file at each validation and at the end."""

    def stopping(self) -> bool:
        return self.asked.is_set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Context in which the first signal of SIGNALS makes the run save and end, and the second Ctrl-C ends it at
        once.

        Signals that are ignored (by `nohup`, say) stay ignored.
        """

        def ask(number: int, frame: object) -> None:
            if not self.asked.is_set():
                self.asked_at = time.monotonic()
                self.asked.set()
                if not self.quiet:
                    with contextlib.suppress(OSError, ValueError):  # not `say`: its print may be the interrupted code
                        os.write(sys.stdout.fileno(), b"stopping after this step, to save; once more to stop at once\n")
            elif number == signal.SIGINT and time.monotonic() - self.asked_at > TOGETHER:
                raise KeyboardInterrupt

        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, ask) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def open_data(
    sources: tuple[str, ...],
    config: TrainConfig,
    frames: int = 1,
    index: Path | None = None,
    roots: Sequence[Path] | None = None,
    progress: Progress | None = None,
) -> ControlDataset:
    """Open the dataset of a configuration. Raises ConfigError where there is no source, DatasetError.

    frames: of one sample, 1 for pictures; index: file that caches facts about files; roots: folders that files must be
    in, None: anywhere; progress: called with (files read, files in total), and may raise to stop.
    """
    if not sources:
        raise ConfigError("data: is empty. Name a folder of pictures, a metadata.jsonl or a tar shard.")
    trains = sources == config.data
    if any(is_drawn(source) for source in sources):
        if trains and any(share != Share() for share in _shares(config)):
            raise ConfigError("repeats, weights, crops, flip: are for files. Leave them out for a drawn source.")
        if len(sources) > 1:
            raise ConfigError("data: a drawn source cannot be combined with other sources. Keep one.")
        return open_drawn(sources[0], config.resolution, config.hint)
    return open_dataset(
        sources,
        hint=config.hint,
        resolution=config.resolution,
        buckets=config.buckets,
        bucket_step=config.bucket_step,
        caption_extension=config.caption_extension,
        clip_frames=frames,
        clip_stride=config.clip_stride,
        reference=reference_of(config.variant),
        shares=_shares(config) if trains else (),
        roots=roots,
        index=index,
        progress=progress,
    )


def _shares(config: TrainConfig) -> list[Share]:
    """Share of each source of the data."""
    count = len(config.data)
    given = (config.repeats, config.weights, config.crops, config.flip)
    columns = [(values or (usual,)) for values, usual in zip(given, Share(), strict=True)]
    return [Share(*row) for row in zip(*(c * count if len(c) == 1 else c for c in columns), strict=True)]


def seen_from(folder: Path, config: TrainConfig) -> TrainConfig:
    """Configuration with relative paths of its inputs resolved from `folder`."""

    def absolute(sources: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(source if is_drawn(source) else str(folder / source) for source in sources)

    start = str(folder / config.init_control) if config.init_control else ""
    return replace(
        config,
        data=absolute(config.data),
        validation_data=absolute(config.validation_data),
        init_control=start,
    )


def run_of(config: TrainConfig, base: BaseWithEncoders, folder: Path | None = None) -> RunFiles:
    """Paths of a run. folder: where relative paths start."""
    start = folder or Path()
    runs = start / config.runs_folder if config.runs_folder else runs_folder()
    target = start / config.output_folder if config.output_folder else control_folder()
    return RunFiles(
        folder=runs / config.output_name,
        cache=start / config.cache_folder if config.cache_folder else runs / "cache",
        target=target / config.output_name,
        base=base.identity("model"),
        base_name=Path(config.base).name,
    )


def run_config(config: TrainConfig, folder: Path, make_readers: MakeReaders = ThreadReaders) -> Path:
    """Train as configured; returns the path of the trained file.

    folder: where relative paths of the configuration start; make_readers: factory of the readers that prefetch files.
    Raises the errors of `train`; Stopped after a Ctrl-C, when the state is saved.
    """
    with join_group() as group:
        console = Console(quiet=not group.is_main)
        with console.listening():
            return _run(seen_from(folder, config), folder, console, group, make_readers)


def _run(config: TrainConfig, folder: Path, console: Console, group: ProcessGroup, make_readers: MakeReaders) -> Path:
    base = load_base(config, folder)
    run = run_of(config, base, folder)
    frames, index = base.family.frames(config), run.folder.parent / INDEX
    data = together(group, lambda: open_data(config.data, config, frames, index))
    held_out = None
    if config.validation_data:
        held_out = together(group, lambda: open_data(config.validation_data, config, frames, index))
    console.say(f"the run is kept in {run.folder}")
    console.say(report(data).text)
    return train(base, data, held_out, config, run, console, group, make_readers=make_readers)
