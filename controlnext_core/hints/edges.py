"""Edges of three kinds, white on black: thin, soft and straight. None needs a network."""

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
"""Soft edges: the scales that must agree, as multiples of the width."""
SURROUND = 8.0
"""Soft edges: how far around a point other edges dampen it, as a multiple of the width."""
FAINT = 0.012
"""Soft edges: response (contrast per pixel, times the scale) at which the surround counts no more than this."""
STEEPNESS = 45.0
"""Soft edges: how fast the response saturates. With FAINT chosen by eye: faces keep their features, walls are black."""
LINE_SMOOTHING = 1.0
"""Lines: Gaussian sigma in pixels before the search, so that grain does not break lines into pieces."""


def canny(image: np.ndarray, low_threshold: float = CANNY_LOW, high_threshold: float = CANNY_HIGH) -> np.ndarray:
    """Canny edges, one pixel wide, of the colour picture: at each pixel the channel with the strongest gradient counts.

    Thresholds on |dx| + |dy| of the 3x3 Sobel over 8-bit values: edges start at the high one and go on down to the low
    one. The ControlNet-XS authors drew low from 50..100 and high from 200..350 for each training picture.
    Raises ValueError if the low one is negative or above the high one.
    """
    cv2 = require_opencv()

    if not 0 <= low_threshold <= high_threshold:
        raise ValueError(
            f"low_threshold: {low_threshold} must be 0 or more and not above high_threshold, {high_threshold}. Lower "
            "the one or raise the other."
        )
    return as_hint(cv2.Canny(as_bytes(as_rgb(image)), low_threshold, high_threshold) > 0)


def soft_edge(image: np.ndarray, width: float = EDGE_WIDTH, sensitivity: float = EDGE_SENSITIVITY) -> np.ndarray:
    """Soft outlines in the manner of HED pictures: bright and a few pixels wide on the strong edges, faint on others.

    Method: the colour gradient at three scales (half, once and twice `width`, a Gaussian sigma in pixels), minus
    what has no direction, as their geometric mean, so that an edge must show at every scale; dampened by the edges
    around it, which quiets texture, and mapped to 0..1. No thinning. sensitivity: 2 shows edges of half the contrast.
    Limits: this is no network such as HED or PiDiNet, and knows no objects. Texture with a direction, such as hair,
    stays, and an outline without contrast is not seen. Controls trained on HED accept these hints; HED
    itself stays their reference.
    Raises ValueError unless width and sensitivity are above 0.
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
    """Excess of the gradient of (H, W, 3) across the local direction over that along it, scaled: (H, W), 0 or more.

    From the eigenvalues of the structure tensor, averaged over the channels. Source: Di Zenzo 1986 for several
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
    """Gaussian of `sigma` pixels over (H, W) or (H, W, C); the border is mirrored."""
    cv2 = require_opencv()

    return cv2.GaussianBlur(values, (0, 0), sigma)


def lines(image: np.ndarray, min_length: float = LINE_MIN_LENGTH, thickness: int = LINE_THICKNESS) -> np.ndarray:
    """Straight line segments, in the manner of M-LSD pictures, found in the luminance by OpenCV's LSD detector.

    min_length: percent of the shorter side; shorter segments are left out. thickness: in pixels.
    Unlike M-LSD it knows no scene: it finds every straight edge, curves as chains of short pieces.
    Raises ValueError if min_length is not in 0..100 or thickness below 1. Source: von Gioi et al., LSD, IPOL 2012.
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
