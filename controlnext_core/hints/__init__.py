"""Hint images, drawn from a photograph or from keypoints: the input of a control."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .edges import canny, lines, soft_edge
from .tones import blur, gray, mask

Hint = Callable[..., np.ndarray]
"""(H, W), or (H, W, 1, 3 or 4) floats in 0..1 -> (H, W, 3) float32 RGB in 0..1; further arguments have defaults."""

HINTS: dict[str, Hint] = {
    "canny": canny,
    "soft_edge": soft_edge,
    "lines": lines,
    "blur": blur,
    "mask": mask,
    "gray": gray,
}
"""Name -> drawing with its defaults. The names are public: configurations of training runs and workflows hold them."""
