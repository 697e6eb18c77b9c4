"""Random numbers as a function of (seed, purpose, position): no generator carries state from step to step.

A run that is stopped and resumed, split over processes or accumulated in parts draws the same numbers, because each
sample's numbers depend only on its position in the run.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, position: int) -> torch.Generator:
    """CPU generator for one purpose ("noise", "timestep", ...) at one position of the run."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{position}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def uniform(seed: int, purpose: str, position: int) -> float:
    """Uniform random number in [0, 1)."""
    return float(torch.rand((), dtype=torch.float64, generator=generator(seed, purpose, position)))
