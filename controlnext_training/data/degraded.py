"""Low-resolution hints for super-resolution: blur, resize, noise and JPEG, with random strengths for each picture.

The order and the kinds are the first-order model of Wang et al. 2021 (Real-ESRGAN), section 3.1: y = JPEG(shrink(x * k)
+ n). The ranges are this project's. Everything is a function of the picture's values, so that a picture has one hint in
every run, on every process and in the cache; JPEG's last bit depends on the version of its library.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np

from ...controlnext_core.hints import HINTS, Hint
from ...controlnext_core.hints.picture import as_bytes, as_rgb
from ...controlnext_core.opencv import require_opencv

LOW_RESOLUTION = "low_resolution"
BLUR = (0.2, 1.5)
"""Standard deviation of the Gaussian in pixels of the low-resolution picture."""
FACTOR = (2.0, 4.0)
"""Factor by which the sides shrink."""
NOISE = (0.0, 0.04)
"""Standard deviation of the Gaussian noise; a picture has values in 0..1."""
QUALITY = (50, 95)
"""JPEG quality, both ends included."""
VERSION = 1
"""Version of this pipeline, a part of the identity of cached samples: raise it when the pixels change."""


@dataclass(frozen=True, slots=True)
class Degradation:
    """Strengths of blur, shrinking, noise and compression for one picture."""

    blur: float
    """Standard deviation in pixels of the full picture."""
    factor: float
    noise: float
    quality: int
    seed: int
    """Seed of the noise."""


def degradation_of(picture: np.ndarray) -> Degradation:
    """Degradation strengths of an (H, W, C) picture, uniform in their ranges: a function of its values only."""
    content = hashlib.blake2b(as_bytes(as_rgb(picture)).tobytes(), digest_size=8).digest()
    random = np.random.default_rng(int.from_bytes(content, "little"))
    factor = float(random.uniform(*FACTOR))
    return Degradation(
        blur=float(random.uniform(*BLUR)) * factor,
        factor=factor,
        noise=float(random.uniform(*NOISE)),
        quality=int(random.integers(QUALITY[0], QUALITY[1] + 1)),
        seed=int(random.integers(2**63)),
    )


def low_resolution(picture: np.ndarray, version: int = VERSION) -> np.ndarray:
    """Degrade a picture (H, W), or (H, W, 1, 3 or 4), of floats in 0..1; returns (H, W, 3) float32 at the same size.

    version: of the pipeline; there is one. Raises ValueError for other pictures.
    """
    return degraded(picture, degradation_of(picture))


def degraded(picture: np.ndarray, how: Degradation) -> np.ndarray:
    """Degrade as `low_resolution`, at given strengths; enlarged by cubic interpolation, pixel
    centres on pixel centres.
    """
    cv2 = require_opencv()

    rgb = as_rgb(picture)
    height, width = rgb.shape[:2]
    size = max(round(width / how.factor), 1), max(round(height / how.factor), 1)
    small = cv2.resize(blurred(rgb, how.blur), size, interpolation=cv2.INTER_AREA)
    noise = np.random.default_rng(how.seed).standard_normal(small.shape, dtype=np.float32)
    small = compressed((small + how.noise * noise).clip(0, 1), how.quality)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)


def blurred(rgb: np.ndarray, deviation: float) -> np.ndarray:
    """Gaussian blur of (H, W, 3), `deviation` in pixels, cut at 4 standard deviations; edges are mirrored."""
    cv2 = require_opencv()

    side = 2 * int(np.ceil(4 * deviation)) + 1
    return cv2.GaussianBlur(rgb, (side, side), deviation, borderType=cv2.BORDER_REFLECT)


def compressed(rgb: np.ndarray, quality: int) -> np.ndarray:
    """Picture (H, W, 3) in floats after JPEG compression of this quality, with chroma at half the resolution."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(as_bytes(rgb)).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(np.float32) / np.float32(255)


COMPUTED: dict[str, Hint] = {**HINTS, LOW_RESOLUTION: low_resolution}
"""Kinds of hint that a dataset draws from its pictures: those of the hint nodes, and the low-resolution one."""
