"""Hints of edges, white on black, in three kinds: thin, soft and straight. None needs a network."""

from __future__ import annotations

import numpy as np

from ..opencv import require_opencv
from .picture import as_bytes, as_hint, as_rgb, luminance

CANNY_LOW = 100
CANNY_HIGH = 200
EDGE_WIDTH = 1.0
EDGE_SENSITIVITY = 1.0
LINE_MIN_LENGTH = 5.0
LINE_THICKNESS = 1

SCALES = (0.5, 1.0, 2.0)
"""Scales at which a soft edge must show, as multiples of the width."""
SURROUND = 8.0
"""Distance at which other edges dampen a soft edge, as a multiple of the width."""
FAINT = 0.012
"""Constant added to the denominator of soft edges (contrast per pixel, times the scale): weaker surrounds have little
effect."""
STEEPNESS = 45.0
"""Steepness with which the response of soft edges saturates. Chosen by eye together with FAINT: faces keep their
features, walls are black."""
LINE_SMOOTHING = 1.0
"""Gaussian sigma in pixels applied before the search for lines, so that grain does not break lines into pieces."""


def canny(image: np.ndarray, low_threshold: float = CANNY_LOW, high_threshold: float = CANNY_HIGH) -> np.ndarray:
    """Canny edges, one pixel wide, of the colour picture: at each pixel the channel with the strongest gradient is
    used.

    Thresholds on |dx| + |dy| of the 3x3 Sobel over 8-bit values: edges start at the high one and continue down to the
    low one. The ControlNet-XS authors drew low from 50..100 and high from 200..350 for each training picture. Raises
    ValueError if the low one is negative or above the high one.
    """
    cv2 = require_opencv()

    if not 0 <= low_threshold <= high_threshold:
        raise ValueError(
            f"low_threshold: {low_threshold} must be 0 or more and not above high_threshold, {high_threshold}. Lower "
            "the one or raise the other."
        )
    return as_hint(cv2.Canny(as_bytes(as_rgb(image)), low_threshold, high_threshold) > 0)


def soft_edge(image: np.ndarray, width: float = EDGE_WIDTH, sensitivity: float = EDGE_SENSITIVITY) -> np.ndarray:
    """Soft outlines in the manner of HED pictures: bright and a few pixels wide on strong edges, faint on others.

    Method: the colour gradient at three scales (half, once and twice `width`, a Gaussian sigma in pixels), minus its
    undirected part, as their geometric mean, so that an edge must show at every scale; dampened by the edges around it,
    which suppresses texture, and mapped to 0..1. No thinning. sensitivity: 2 shows edges of half the contrast. Limits:
    this is not a network such as HED or PiDiNet, and does not recognise objects. Texture with a direction, such as
    hair, stays, and an outline without contrast is not seen. Controls trained on HED accept these hints; HED itself
    stays their reference. Raises ValueError unless width and sensitivity are above 0.
    """
    for name, value in (("width", width), ("sensitivity", sensitivity)):
        if not value > 0:
            raise ValueError(f"{name}: {value} must be above 0. The default is 1.")
    rgb = as_rgb(image)
    responses = [directed_gradient(rgb, width * scale) for scale in SCALES]
    response = np.cbrt(np.prod(responses, axis=0)) * np.float32(sensitivity)
    dampened = response**2 / (response + smoothed(response, width * SURROUND) + FAINT)
    return as_hint(1 - np.exp(-STEEPNESS * dampened))


def directed_gradient(rgb: np.ndarray, sigma: float) -> np.ndarray:
    """Gradient of (H, W, 3) across the local direction minus that along it, times sigma: (H, W), 0 or more.

    Computed from the eigenvalues of the structure tensor, averaged over the channels. Source: Di Zenzo 1986 for several
    channels; Lindeberg 1998 for the product of gradient and scale.
    """
    cv2 = require_opencv()

    image = smoothed(rgb, sigma)
    dx, dy = (cv2.Sobel(image, cv2.CV_32F, *order, ksize=3, scale=1 / 8) for order in ((1, 0), (0, 1)))
    xx, xy, yy = (smoothed(product.mean(axis=2), sigma) for product in (dx * dx, dx * dy, dy * dy))
    root = np.sqrt((xx - yy) ** 2 + 4 * xy**2)
    across, along = (np.sqrt(np.maximum(xx + yy + sign * root, 0) / 2) for sign in (1, -1))
    return sigma * (across - along)


def smoothed(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of `sigma` pixels over (H, W) or (H, W, C); the border is mirrored."""
    cv2 = require_opencv()

    return cv2.GaussianBlur(values, (0, 0), sigma)


def lines(image: np.ndarray, min_length: float = LINE_MIN_LENGTH, thickness: int = LINE_THICKNESS) -> np.ndarray:
    """Straight line segments, in the manner of M-LSD pictures, found in the luminance by OpenCV's LSD detector.

    min_length: percent of the shorter side; shorter segments are left out. thickness: in pixels. Unlike M-LSD it does
    not recognise scenes: it finds every straight edge, and curves as chains of short pieces. Raises ValueError if
    min_length is not in 0..100 or thickness below 1. Source: von Gioi et al., LSD, IPOL 2012.
    """
    cv2 = require_opencv()

    if not 0 <= min_length <= 100:
        raise ValueError(f"min_length: {min_length} must be in 0..100, in percent of the shorter side.")
    if thickness < 1:
        raise ValueError(f"thickness: {thickness} must be 1 pixel or more.")
    gray = as_bytes(smoothed(luminance(as_rgb(image)), LINE_SMOOTHING))
    found = cv2.createLineSegmentDetector().detect(gray)[0]
    canvas = np.zeros_like(gray)
    if found is not None:
        ends = found.reshape(-1, 2, 2)  # OpenCV 4 gives (n, 1, 4), 5 gives (n, 4)
        lengths = np.hypot(*(ends[:, 1] - ends[:, 0]).T)
        kept = ends[lengths >= min_length / 100 * min(gray.shape)]
        for start, end in np.rint(kept).astype(int).tolist():
            cv2.line(canvas, start, end, 255, int(thickness))
    return as_hint(canvas > 0)
