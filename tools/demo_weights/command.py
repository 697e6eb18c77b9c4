"""`python run.py train-demo STAGE`: make the demo's weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..environment import ROOT

STAGES = ("autoencoder", "decoder", "base", "style", "assemble")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", choices=STAGES, help="what to train; each needs those before it")


def run_stage(options: argparse.Namespace, host: Path) -> int:
    """Train one stage to its end, going on from its last state."""
    from ..train import bring_in_host

    bring_in_host(host, ROOT / ".host" / "base-demo", cpu=True)
    if options.stage == "autoencoder":
        from .autoencoder import train_autoencoder

        print(train_autoencoder())
    elif options.stage == "decoder":
        from .autoencoder import train_decoder

        print(train_decoder())
    elif options.stage == "base":
        from .base import train_base

        print(train_base())
    elif options.stage == "style":
        from .style import train_style

        print(train_style())
    else:
        from .assembling import assemble

        print(assemble())
    return 0
