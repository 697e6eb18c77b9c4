"""Training of the picturebook's networks for a given time; --folder has their packed weights, before and after.

    python benchmarks/bench_pictures.py --comfyui PATH --seconds 300 --folder DIR --cases painter,base

Without weights in the folder, the shipped ones are the start. States for resuming are in .cache/demo_weights.
"""

from __future__ import annotations

import json
import runpy
import time
import unittest.mock
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors.torch import load_file

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.host_start import Options, begin  # noqa: E402
from comfyui_controlnext.benchmarks.recording import append_table  # noqa: E402

HEAD = ("network", "s in all", "steps", "loss or error at first", "at the end", "MiB")
LONGEST = 3600.0
AFTER = 20.0
"""Seconds reserved for pictures and for packing."""
SMALL = {"side": 32, "pictures": 4, "batch": 2}
"""Arguments of the base's training in a dry run."""


@contextmanager
def small(options: Options) -> Iterator[None]:
    """Context in which a dry run uses few pictures, and a separate folder of states."""
    from comfyui_controlnext.tools.demo_weights import painter, picture_base, running

    with ExitStack() as stack:
        if options.small:
            changes = ((running, "FOLDER", options.scratch), (painter, "PICTURES", 4), (picture_base, "PART", 4))
            for module, name, value in changes:
                stack.enter_context(unittest.mock.patch.object(module, name, value))
        yield


def train_painter(options: Options, start: Path) -> tuple[Path, str]:
    """Train the autoencoder; returns (the trained file, its name when packed)."""
    from comfyui_controlnext.tools.demo_weights import painter
    from comfyui_controlnext.tools.demo_weights.shipped import PAINTER

    seconds = min(options.left, LONGEST) - AFTER
    return painter.train_painter(2 if options.small else painter.STEPS, seconds, start), PAINTER


def train_base(options: Options, start: Path) -> tuple[Path, str]:
    """Train the base; returns (the trained file, its name when packed).

    The autoencoder is the last one trained here, else that of `start`.
    """
    from comfyui_controlnext.tools.demo_weights import painter, picture_base, running
    from comfyui_controlnext.tools.demo_weights.packing import unpack
    from comfyui_controlnext.tools.demo_weights.shipped import MMDIT, PAINTER
    from comfyui_controlnext.tools.tiny_models.storage import save

    made = running.FOLDER / "painter" / painter.FILE
    if not made.is_file() and (start / PAINTER).is_file():
        save(made, unpack(load_file(start / PAINTER)))
    seconds = 0.5 if options.small else LONGEST
    sizes = SMALL if options.small else {}
    return picture_base.train_base(seconds, start=start, end=options.deadline - AFTER, **sizes), MMDIT


def row(name: str, options: Options) -> tuple[str, ...]:
    """Train one network and pack it into the folder; returns its row."""
    from comfyui_controlnext.tools.demo_weights.shipped import SHIPPED, ship_one

    folder = options.folder or options.scratch
    started = time.monotonic()
    train = {"painter": train_painter, "base": train_base}[name]
    made, packed = train(options, folder if any(folder.glob("picturebook_*")) else SHIPPED)
    path = ship_one(made, folder / packed)
    told = journal_of(made.parent / "journal.jsonl")
    return (name, f"{time.monotonic() - started:.0f}", *told, f"{path.stat().st_size / 2**20:.1f}")


def journal_of(path: Path) -> tuple[str, str, str]:
    """Last step, first figure and last figure in a stage's journal."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    steps = [line for line in lines if "step" in line and "event" not in line]
    if not steps:
        return ("none that was told", "", "")
    figure = "loss" if "loss" in steps[0] else "error"
    return (str(steps[-1]["step"]), str(steps[0][figure]), str(steps[-1][figure]))


def main() -> None:
    options = begin(__doc__ or "")
    with small(options):
        rows = [row(name, options) for name in ("painter", "base") if options.wants(name)]
    append_table("pictures", "networks of the picturebook", HEAD, rows, "trained on", options.json, False)


if __name__ == "__main__":
    main()
