"""Low-resolution hints against references in NumPy: a convolution, means of areas, the JPEG standard's transform."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from comfyui_controlnext.controlnext_training.data.degraded import (
    BLUR,
    COMPUTED,
    FACTOR,
    LOW_RESOLUTION,
    NOISE,
    QUALITY,
    Degradation,
    blurred,
    compressed,
    degradation_of,
    degraded,
    low_resolution,
)

EXACT = 1e-5
BYTE = 1 / 255
"""Tolerance for JPEG, which rounds to bytes twice, and whose library has an integer transform."""
LUMINANCE_STEPS = """
16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99
"""
"""Quantisation of luminance at quality 50. Source: ITU-T T.81, table K.1."""


def photograph(seed: int = 0, side: int = 64, gray: bool = False) -> np.ndarray:
    """Waves and some noise, (side, side, 3)."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(2 * np.pi * (random.uniform(1, 4) * x + random.uniform(1, 4) * y)) for _ in range(3)]
    picture = 0.5 + 0.3 * np.stack(waves, axis=-1) + 0.05 * random.standard_normal((side, side, 3))
    picture = picture.clip(0, 1).astype(np.float32)
    return np.repeat(picture[..., :1], 3, axis=2) if gray else picture


def convolved(rgb: np.ndarray, deviation: float) -> np.ndarray:
    """Gaussian blur out to 4 standard deviations, as the sum over cells in two dimensions."""
    reach = int(np.ceil(4 * deviation))
    at = np.arange(-reach, reach + 1)
    kernel = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * deviation**2))
    kernel /= kernel.sum()
    padded = np.pad(rgb.astype(np.float64), ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    height, width = rgb.shape[:2]
    terms = [
        kernel[i, j] * padded[i : i + height, j : j + width] for i in range(2 * reach + 1) for j in range(2 * reach + 1)
    ]
    return np.sum(terms, axis=0)


def transform() -> np.ndarray:
    """Discrete cosine transform of 8 numbers as a matrix (T.81, A.3.3)."""
    k, n = np.mgrid[:8, :8]
    return np.where(k == 0, np.sqrt(1 / 8), 0.5) * np.cos((2 * n + 1) * k * np.pi / 16)


def coded(tones: np.ndarray, quality: int) -> np.ndarray:
    """Picture (H, W) in 0..1, sides multiples of 8, after a JPEG's quantisation; steps scaled as in libjpeg."""
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    table = np.array(LUMINANCE_STEPS.split(), dtype=float).reshape(8, 8)
    steps = np.floor((table * scale + 50) / 100).clip(1, 255)
    values, dct, out = np.rint(tones * 255) - 128, transform(), np.empty_like(tones)
    for i in range(0, tones.shape[0], 8):
        for j in range(0, tones.shape[1], 8):
            block = dct @ values[i : i + 8, j : j + 8] @ dct.T
            out[i : i + 8, j : j + 8] = dct.T @ (np.rint(block / steps) * steps) @ dct
    return np.rint(out + 128).clip(0, 255) / 255


def cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Weight of a sample. Source: Keys 1981, equation 4; a as in OpenCV."""
    d = np.abs(distance)
    near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def enlarged(tones: np.ndarray, factor: int) -> np.ndarray:
    """Picture (H, W) enlarged to (factor H, factor W), pixel centres on pixel centres, the border repeated."""
    for axis in (0, 1):
        count = tones.shape[axis]
        at = (np.arange(count * factor) + 0.5) / factor - 0.5
        cells = np.floor(at).astype(int)[:, None] + np.arange(-1, 3)
        weights = cubic(at[:, None] - cells)
        parts = np.take(tones, cells.clip(0, count - 1), axis=axis)
        tones = (parts * np.expand_dims(weights, 1 - axis if axis else 2)).sum(axis=axis + 1)
    return tones


@pytest.mark.parametrize("deviation", [0.4, 1.0, 2.7, 6.0])
def test_the_blur_is_a_gaussian(deviation: float) -> None:
    picture = photograph()
    np.testing.assert_allclose(blurred(picture, deviation), convolved(picture, deviation), atol=EXACT)


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_the_compression_is_that_of_the_standard(quality: int) -> None:
    """Compression of gray, which has no chroma to subsample."""
    picture = photograph(1, gray=True)
    found, expected = compressed(picture, quality), coded(picture[..., 0], quality)
    errors = np.abs(found - expected[..., None])
    assert float(errors.mean()) < 0.5 * BYTE and float(errors.max()) <= 16 * BYTE, "a tie may round either way"
    assert float(np.abs(found - picture).max()) > 3 * BYTE, "something is lost"


@pytest.mark.parametrize("factor", [2, 4])
def test_the_parts_come_in_their_order(factor: int) -> None:
    """Blur, means of areas, noise, JPEG, cubic enlargement; on gray in the end, as the noise has a number a colour."""
    picture = photograph(2, gray=True)
    how = Degradation(blur=1.3, factor=factor, noise=0.0, quality=80, seed=5)
    height, width = picture.shape[:2]
    small = convolved(picture, 1.3)[..., 0].reshape(height // factor, factor, width // factor, factor).mean(axis=(1, 3))
    expected = enlarged(coded(small, 80), factor).clip(0, 1)
    errors = np.abs(degraded(picture, how)[..., 0] - expected)
    assert float(errors.mean()) < 0.5 * BYTE and float(errors.max()) <= 8 * BYTE, "a step of JPEG may round either way"


def test_the_noise_is_gaussian_seeded_and_before_the_compression() -> None:
    flat = np.full((256, 256, 3), 0.5, np.float32)
    how = Degradation(blur=0.3, factor=2.0, noise=0.04, quality=100, seed=5)
    found = degraded(flat, how)[::2, ::2] - 0.5
    assert np.array_equal(degraded(flat, how), degraded(flat, how))
    assert not np.array_equal(degraded(flat, how), degraded(flat, replace(how, seed=6)))
    assert float(np.abs(found).mean()) > 0.01 and abs(float(found.mean())) < 2 * BYTE
    blocks = [float(degraded(flat, replace(how, noise=noise)).std()) for noise in (0.01, 0.02, 0.04)]
    assert blocks[2] == pytest.approx(2 * blocks[1], rel=0.1) and blocks[1] == pytest.approx(2 * blocks[0], rel=0.15)


def test_the_strengths_are_a_function_of_the_picture_and_fill_their_ranges() -> None:
    pictures = [photograph(seed, side=8) for seed in range(400)]
    found = [degradation_of(picture) for picture in pictures]
    assert found == [degradation_of(picture.copy()) for picture in pictures] and len(set(found)) == len(found)
    for values, (low, high) in (
        ([how.blur / how.factor for how in found], BLUR),
        ([how.factor for how in found], FACTOR),
        ([how.noise for how in found], NOISE),
        ([how.quality for how in found], QUALITY),
    ):
        reach = high - low
        assert low <= min(values) < low + 0.05 * reach and high - 0.05 * reach < max(values) <= high
        assert float(np.mean(values)) == pytest.approx((low + high) / 2, abs=0.06 * reach)


@pytest.mark.parametrize("shape", [(40, 24, 3), (40, 24, 4), (40, 24, 1), (40, 24), (9, 8, 3)])
def test_a_hint_has_the_size_of_its_picture(shape: tuple[int, ...]) -> None:
    picture = np.random.default_rng(0).random(shape, dtype=np.float32)
    before = picture.copy()
    hint = low_resolution(picture)
    assert hint.shape == (*shape[:2], 3) and hint.dtype == np.float32 and np.array_equal(picture, before)
    assert hint.min() >= 0 and hint.max() <= 1 and np.array_equal(hint, low_resolution(picture))


def test_a_dataset_draws_it_and_keeps_it_apart_from_other_kinds(tmp_path: Path) -> None:
    from comfyui_controlnext.controlnext_training.data import open_dataset
    from PIL import Image

    for number in range(2):
        image = Image.fromarray((photograph(number, side=64) * 255).astype(np.uint8))
        image.save(tmp_path / f"{number}.png")
    one, other = (
        open_dataset([tmp_path], hint=kind, resolution=64, bucket_step=64) for kind in (LOW_RESOLUTION, "gray")
    )
    sample = one.load(0)
    assert np.array_equal(sample.hints[0].numpy(), COMPUTED[LOW_RESOLUTION](sample.frames[0].numpy()))
    assert np.array_equal(one.load(0, 3, 7).hints.numpy(), sample.hints.numpy()), "whatever the place in the run"
    assert sample.key != other.load(0).key
