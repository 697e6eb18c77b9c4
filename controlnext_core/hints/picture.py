"""Pictures as arrays: input and output of the drawing functions.

H, W height and width in pixels, at least MIN_SIDE.
"""

from __future__ import annotations

import numpy as np

MIN_SIDE = 8
"""Smallest side in pixels: one latent cell."""
CLIPPED = (-0.5, 1.5)
"""Range of values that are clipped to 0..1, since enlarging overshoots; values outside come from another range and are
refused."""
LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue. Source: ITU-R BT.601, as OpenCV and PIL turn pictures gray."""


def checked(image: np.ndarray, name: str = "image") -> np.ndarray:
    """(H, W) or (H, W, C) floats in 0..1, C = 1, 3 or 4 -> (H, W, C) float32, clipped; never the caller's array.

    Raises ValueError, with `name`, for other shapes, integers, NaN and values that are not in 0..1.
    """
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise ValueError(
            f"{name}: has the shape {image.shape}. Give one picture as (height, width, channels) with 1, 3 or 4 "
            "channels, a batch image by image."
        )
    if min(image.shape[:2]) < MIN_SIDE:
        raise ValueError(
            f"{name}: {image.shape[1]}x{image.shape[0]} is smaller than {MIN_SIDE}x{MIN_SIDE} pixels. Enlarge it."
        )
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"{name}: has values of type {image.dtype}, not floats in 0..1. Divide by the largest value.")
    low, high = float(image.min()), float(image.max())
    if not (low >= CLIPPED[0] and high <= CLIPPED[1]):  # `not`: refuses NaN too
        raise ValueError(
            f"{name}: has values from {low:g} to {high:g}, not in 0..1. Scale them to 0..1; NaN come from a failed run."
        )
    channels = image if image.ndim == 3 else image[..., None]
    return channels.astype(np.float32).clip(0, 1)


def as_rgb(image: np.ndarray) -> np.ndarray:
    """Picture as (H, W, 3) float32: gray is repeated, alpha dropped as the Apply nodes do.

    Input and errors: see `checked`.
    """
    channels = checked(image)
    return np.repeat(channels, 3, axis=2) if channels.shape[2] == 1 else channels[..., :3]


def luminance(rgb: np.ndarray) -> np.ndarray:
    """Luminance of (H, W, 3) as (H, W), from the stored values without undoing gamma."""
    red, green, blue = LUMINANCE
    return red * rgb[..., 0] + green * rgb[..., 1] + blue * rgb[..., 2]


def as_bytes(values: np.ndarray) -> np.ndarray:
    """Values in 0..1 as the nearest of 0..255 in uint8, contiguous, as OpenCV needs them."""
    return np.ascontiguousarray(np.rint(values * 255).astype(np.uint8))


def as_hint(values: np.ndarray) -> np.ndarray:
    """Hint (H, W, 3) in float32 with three equal channels, from (H, W) in 0..1."""
    return np.repeat(values.astype(np.float32).clip(0, 1)[..., None], 3, axis=2)
