"""Fidelity of a generated image to its hint: one number per pair, 1 for a perfect match.

Each metric draws from the image a hint of the kind that controlled it, and compares the two. Numbers of different
metrics are not comparable, and chance does not give 0: beside the mean over true pairs, report the mean over mismatched
pairs (each image with another image's hint).

H, W height and width in pixels; images and hints as for the functions of `hints`: floats in 0..1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from .hints import HINTS, Hint
from .hints.picture import as_rgb, luminance
from .opencv import require_opencv

TOLERANCE_PX = 2.0
"""Largest distance, in pixels, at which two edges still match. BSDS allows 0.0075 of the diagonal (5.4 pixels at
512x512), but matches one to one; here one edge may match many, and among dense edges chance would match that many."""
ON = 0.5
"""Smallest value at which a pixel of an edge map or mask counts as set."""

OUTPAINT_GRAY = 0.5
"""Value of every channel, in hints for outpainting, of the area to be painted. Source: the host's
ImagePadForOutpaint."""

Metric = Callable[[np.ndarray, np.ndarray], float]
"""(image, hint) -> up to 1. Both (H, W, 3), gray or with alpha; ValueError if they differ in size."""


def edge_f1(
    image: np.ndarray, hint_edges: np.ndarray, tolerance_px: float = TOLERANCE_PX, draw: Hint = HINTS["canny"]
) -> float:
    """F1 of the edges of an image, drawn by `draw`, against the edges of its hint; see `boundary_f1`."""
    _check_sizes(image, hint_edges)
    return boundary_f1(luminance(draw(image)), luminance(as_rgb(hint_edges)), tolerance_px)


def boundary_f1(found: np.ndarray, wanted: np.ndarray, tolerance_px: float = TOLERANCE_PX) -> float:
    """F1 = 2 P R / (P + R) of two (H, W) edge maps; values >= ON are edges. 1 if both are empty, 0 if only one is.

    P (precision): share of the found pixels within tolerance_px (Euclidean) of a wanted one; R (recall): share of the
    wanted pixels within tolerance_px of a found one. Computed by dilation with a disc. Source: Martin et al., PAMI 2004
    (BSDS), without the one-to-one matching, as in the boundary measure of DAVIS (Perazzi et al., CVPR 2016).
    Raises ValueError if the tolerance is negative or the sizes differ.
    """
    if not tolerance_px >= 0:
        raise ValueError(f"tolerance_px: {tolerance_px} must be 0 or more pixels.")
    _check_sizes(found, wanted)
    found, wanted = found >= ON, wanted >= ON
    if not (found.any() and wanted.any()):
        return float(found.any() == wanted.any())
    precision = float(dilated(wanted, tolerance_px)[found].mean())
    recall = float(dilated(found, tolerance_px)[wanted].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def dilated(region: np.ndarray, radius: float) -> np.ndarray:
    """Mask (H, W) of the pixels at most `radius` pixels from a set pixel of `region` (H, W) bool."""
    cv2 = require_opencv()

    reach = np.arange(-int(radius), int(radius) + 1)
    disc = (reach[:, None] ** 2 + reach**2 <= radius**2).astype(np.uint8)
    return cv2.dilate(region.astype(np.uint8), disc) > 0


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation over pixels, -1..1; equal values share the mean of their ranks.

    a, b: (H, W) in any units, such as depth, or (H, W, C) pictures, whose luminance is compared. Not defined for a
    constant map; here 1 if both maps are constant, 0 if one is. Raises ValueError for different sizes and for NaN.
    """
    from scipy.stats import spearmanr  # ComfyUI requires scipy; importing it takes a second

    _check_sizes(a, b)
    maps = [_one_channel(values).ravel() for values in (a, b)]
    if not all(np.isfinite(values).all() for values in maps):
        raise ValueError("rank correlation: a map has NaN or infinite values. Replace or crop them first.")
    flat = [bool((values == values[0]).all()) for values in maps]
    return float(all(flat)) if any(flat) else float(spearmanr(*maps).statistic)


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks, set from ON on; 1 if both are empty.

    a, b: (H, W), or pictures, whose luminance is compared. Raises ValueError if the sizes differ.
    """
    _check_sizes(a, b)
    inside, other = (luminance(as_rgb(values)) >= ON for values in (a, b))
    union = int((inside | other).sum())
    return int((inside & other).sum()) / union if union else 1.0


def tone_correlation(image: np.ndarray, hint: np.ndarray, draw: Hint = HINTS["gray"]) -> float:
    """Rank correlation of brightness between the hint that `draw` makes of the image and the given hint.

    For depth this is a weak approximation: near is bright in the hint, not always in the image. For a figure to
    publish, estimate the image's depth with the estimator that made the hint, and call `rank_correlation`.
    """
    return rank_correlation(draw(image), as_rgb(hint))


def mask_agreement(image: np.ndarray, hint: np.ndarray) -> float:
    """Intersection over union of the image's bright part (Otsu) and the hint.

    Meant for hints drawn that way; for masks of objects segment the image with a model and call `mask_iou`.
    """
    return mask_iou(HINTS["mask"](image), hint)


def picture_edge_f1(image: np.ndarray, hint: np.ndarray) -> float:
    """F1 of the image's Canny edges against the Canny edges of the hint, for hints of unknown kind."""
    return edge_f1(image, HINTS["canny"](hint))


def kept_agreement(image: np.ndarray, hint: np.ndarray) -> float:
    """Agreement of the known area of an outpainting hint: 1 minus the root mean square difference outside of its gray.

    1 where the hint is gray everywhere. Raises ValueError if the sizes differ.
    """
    _check_sizes(image, hint)
    shown = (np.abs(as_rgb(hint) - OUTPAINT_GRAY) > 1 / 255).any(axis=-1)
    difference = (as_rgb(image) - as_rgb(hint))[shown]
    return 1 - float(np.sqrt(np.mean(difference**2))) if shown.any() else 1.0


METRICS: dict[str, Metric] = {
    "canny": edge_f1,
    "soft_edge": partial(edge_f1, draw=HINTS["soft_edge"]),
    "lines": partial(edge_f1, draw=HINTS["lines"]),
    "blur": partial(tone_correlation, draw=HINTS["blur"]),
    "mask": mask_agreement,
    "gray": tone_correlation,
    "depth": tone_correlation,
    "low_resolution": tone_correlation,
    "outpaint": kept_agreement,
    "paired": picture_edge_f1,
}
"""Kind of hint -> metric. Each name in HINTS is included, with the defaults of its drawing: an image scores 1 against a
hint drawn from itself. `depth` and `paired` are for hints from elsewhere, `low_resolution` for degraded pictures,
`outpaint` for pictures that continue the hint."""


def _one_channel(values: np.ndarray) -> np.ndarray:
    if values.ndim == 2:
        return values
    return values[..., 0] if values.shape[2] < 3 else luminance(values)


def _check_sizes(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape[:2] != b.shape[:2]:
        raise ValueError(
            f"sizes differ: {a.shape[1]}x{a.shape[0]} and {b.shape[1]}x{b.shape[0]} pixels. Scale the hint to the "
            "image as it was scaled for the control."
        )
