"""`python run.py train-demo STAGE`: make the demo's weights. Standard library only until a stage runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ..comfy_server import COMFY_BASE

STAGES = ("autoencoder", "decoder", "base", "ship-base", "controls", "ship-controls")
PICTUREBOOK = (
    "picture-autoencoder",
    "picture-decoder",
    "picture-base",
    "picture-dusk",
    "picture-print",
    "picture-controls",
    "ship-pictures",
)
"""Stages of the base of SD3's shape, those above being of the UNet; `all` leaves them out. LoRA, fine-tune and controls
are trained on the base that was shipped last."""
ALL = "all"
LONGEST = 100.0  # minutes


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "stage",
        choices=(*STAGES, *PICTUREBOOK, ALL),
        nargs="?",
        default=ALL,
        help="what to train or to keep; needs those before it",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=90.0,
        help=f"length of a slice of an autoencoder or a base, at most {LONGEST:g} (default 90)",
    )


def run_stage(options: argparse.Namespace, host: Path) -> int:
    """Train one stage, or all in order, to the end, resuming from the last state."""
    from ..train_command import bring_in_host

    bring_in_host(host, COMFY_BASE, cpu=True)
    seconds = 60 * min(options.minutes, LONGEST)
    if options.stage in PICTUREBOOK:
        print(_run_picturebook(options.stage, seconds))
        return 0
    from .autoencoder import train_autoencoder, train_decoder
    from .shipped import ship_base, ship_controls, train_controls
    from .unet_base import train_base

    work: tuple[Callable[[], Path], ...] = (
        lambda: train_autoencoder(seconds),
        lambda: train_decoder(seconds),
        lambda: train_base(seconds),
        ship_base,
        train_controls,
        ship_controls,
    )
    for name, stage in zip(STAGES, work, strict=True):
        if options.stage in (name, ALL):
            print(stage())
    return 0


def _run_picturebook(stage: str, seconds: float) -> Path:
    from .painter import train_decoder, train_painter
    from .picture_base import train_base
    from .picture_style import train_style
    from .shipped import PICTURE_RECIPES, ship_pictures, train_controls
    from .shipped import PICTUREBOOK as CHECKPOINT

    work: dict[str, Callable[[], Path]] = {
        "picture-autoencoder": lambda: train_painter(seconds=seconds),
        "picture-decoder": lambda: train_decoder(seconds=seconds),
        "picture-base": lambda: train_base(seconds),
        "picture-dusk": lambda: train_style("dusk"),
        "picture-print": lambda: train_style("print"),
        "picture-controls": lambda: train_controls(PICTURE_RECIPES.values(), CHECKPOINT),
        "ship-pictures": ship_pictures,
    }
    return work[stage]()
