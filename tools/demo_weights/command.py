"""`python run.py train-demo STAGE`: make the demo's weights. Standard library only until a stage runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ..comfy_server import COMFY_BASE

STAGES = ("autoencoder", "decoder", "base", "ship-base", "style", "controls", "ship-controls")
ALL = "all"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "stage", choices=(*STAGES, ALL), nargs="?", default=ALL, help="what to train or to keep; needs those before it"
    )


def run_stage(options: argparse.Namespace, host: Path) -> int:
    """Train one stage, or one after the other, to its end, going on from the last state."""
    from ..train import bring_in_host

    bring_in_host(host, COMFY_BASE, cpu=True)
    from .autoencoder import train_autoencoder, train_decoder
    from .base import train_base
    from .shipped import ship_base, ship_controls, train_controls
    from .style import train_style

    work: tuple[Callable[[], Path], ...] = (
        train_autoencoder,
        train_decoder,
        train_base,
        ship_base,
        train_style,
        train_controls,
        ship_controls,
    )
    for name, stage in zip(STAGES, work, strict=True):
        if options.stage in (name, ALL):
            print(stage())
    return 0
