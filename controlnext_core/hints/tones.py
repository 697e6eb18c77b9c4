"""Hints of areas instead of outlines: blurred, gray, and foreground against background."""

from __future__ import annotations

import numpy as np

from ..opencv import require_opencv
from .picture import as_bytes, as_hint, as_rgb, checked, luminance

BLUR_SIZE = 8
BLUR_STYLES = ("blur", "tile")
INSIDE = 0.5
"""Smallest value of a mask that counts as inside."""


def blur(image: np.ndarray, size: int = BLUR_SIZE, style: str = BLUR_STYLES[0]) -> np.ndarray:
    """Picture without its detail.

    size: pixels, 1 or more; smaller detail is removed. style: `blur` is a Gaussian with a sigma of size / 2; `tile`
    scales down by `size` (mean over areas) and up again (linear), the hint of tile and upscaling controls. Raises
    ValueError for another style or a size below 1.
    """
    cv2 = require_opencv()

    if style not in BLUR_STYLES:
        raise ValueError(f"style: {style!r} is not one of {', '.join(BLUR_STYLES)}.")
    if size < 1:
        raise ValueError(f"size: {size} must be 1 pixel or more.")
    rgb = as_rgb(image)
    if style == "blur":
        return cv2.GaussianBlur(rgb, (0, 0), size / 2)
    height, width = rgb.shape[:2]
    small = (max(1, round(width / size)), max(1, round(height / size)))
    return cv2.resize(cv2.resize(rgb, small, interpolation=cv2.INTER_AREA), (width, height))


def gray(image: np.ndarray) -> np.ndarray:
    """Luminance of the picture, in three equal channels."""
    return as_hint(luminance(as_rgb(image)))


def mask(image: np.ndarray, given: np.ndarray | None = None, invert: bool = False) -> np.ndarray:
    """Foreground in white, background in black, without intermediate values.

    Source: `given` ((H, W) in 0..1, white from 0.5 on); else the alpha channel, if it is not constant; else the
    luminance, split at Otsu's threshold (a picture of one tone is all black). invert: True exchanges white and black;
    False does not. Raises ValueError if `given` and the picture differ in size.
    """
    channels = checked(image)
    if given is not None:
        if given.shape != channels.shape[:2]:
            raise ValueError(
                f"mask: has the shape {given.shape}, the picture {channels.shape[:2]}. Scale one to the other; Load "
                "Image gives a mask of 64x64 where the file has no alpha, leave the mask unconnected then."
            )
        inside = checked(given, "mask")[..., 0] >= INSIDE
    elif channels.shape[2] == 4 and np.ptp(channels[..., 3]) > 0:
        inside = channels[..., 3] >= INSIDE
    else:
        inside = brighter_part(luminance(as_rgb(image)))
    return as_hint(inside != invert)


def brighter_part(values: np.ndarray) -> np.ndarray:
    """Pixels of (H, W) in 0..1 above Otsu's threshold, as bool; none if all values are equal in 8 bits."""
    cv2 = require_opencv()

    tones = as_bytes(values)
    threshold, _ = cv2.threshold(tones, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return (tones > threshold) & (np.ptp(tones) > 0)
