"""Names of blocks of a base in a recipe, to which training is limited."""

from __future__ import annotations

import re

from ..controlnext_core.encodable import cut
from .choices import BLOCK_GROUPS
from .settings import ConfigError


def parse_blocks(text: str) -> dict[str, range | None]:
    """`input.0-5, middle` -> {"input": range(0, 6), "middle": None}; None = every block of that side.

    Raises ConfigError.
    """
    found: dict[str, range | None] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(rf"({'|'.join(BLOCK_GROUPS)})(?:\.(\d{{1,4}})(?:-(\d{{1,4}}))?)?", part)
        if match is None or match[1] in found:
            raise ConfigError(
                f"blocks: {cut(repr(part))} is not understood. Write each of {', '.join(BLOCK_GROUPS)} at most once, "
                "with or without numbers: input.0-5, middle, output.3."
            )
        first = match[2]
        found[match[1]] = None if first is None else range(int(first), int(match[3] or first) + 1)
    return found
