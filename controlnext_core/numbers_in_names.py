"""Numbers in the names of tensors, counted in one pass over the names, and bounded."""

from __future__ import annotations

from collections.abc import Iterable

from .checkpoint import CheckpointError

MOST = 64
"""Largest number of blocks of one kind; no network of the tables has half as many."""
MOST_LAYERS = 256
"""Largest number of residual blocks and transformer layers of one network; SDXL's UNet has 87."""


class Numbered:
    """Counts of distinct numbers after each start of the names, as 2 for `down_blocks.0.x`, `down_blocks.1.x`.

    Building it takes time in proportion to the number of names.
    """

    def __init__(self, names: Iterable[str], source: str) -> None:
        self.source = source
        self._found: dict[str, set[str]] = {}
        for name in names:
            parts = name.split(".")
            for place, part in enumerate(parts[:-1]):
                if part.isascii() and part.isdigit():
                    self._found.setdefault(".".join(parts[:place]), set()).add(part)

    def count(self, start: str) -> int:
        """Count the distinct numbers after `start` and a dot. Raises CheckpointError for more than MOST."""
        number = len(self._found.get(start, ()))
        if number > MOST:
            raise self.too_many(f"{number:,} parts of {start}", MOST)
        return number

    def check_layers(self, number: int) -> None:
        """Raise CheckpointError for more layers in total than MOST_LAYERS."""
        if number > MOST_LAYERS:
            raise self.too_many(f"{number:,} layers", MOST_LAYERS)

    def too_many(self, what: str, most: int) -> CheckpointError:
        """Error for a file with more parts than any known network has."""
        return CheckpointError(
            f"{self.source}: has {what}, and no network that is known has more than {most}. The file is damaged or of "
            "an unknown kind: download it again."
        )
