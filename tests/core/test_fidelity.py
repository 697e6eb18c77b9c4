"""Fidelity metrics against independent references: distances in loops, ranks and pixels counted one by one."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from comfyui_controlnext.controlnext_core.fidelity import (
    METRICS,
    boundary_f1,
    edge_f1,
    mask_iou,
    rank_correlation,
)
from comfyui_controlnext.controlnext_core.hints import HINTS

ASTRONAUT = Path(__file__).resolve().parents[2] / "demo" / "astronaut.jpg"


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """Photograph (256, 256, 3)."""
    half = cv2.imread(str(ASTRONAUT), cv2.IMREAD_REDUCED_COLOR_2)
    return half[..., ::-1].astype(np.float32) / 255


def f1_by_distances(found: np.ndarray, wanted: np.ndarray, tolerance: float) -> float:
    """F1 by the stated formula, with the distance of every pair of pixels."""

    def share_near(points: list[tuple[int, int]], others: list[tuple[int, int]]) -> float:
        return sum(any(math.dist(p, q) <= tolerance for q in others) for p in points) / len(points)

    a, b = ([tuple(p) for p in np.argwhere(edges >= 0.5).tolist()] for edges in (found, wanted))
    precision, recall = share_near(a, b), share_near(b, a)
    return 2 / (1 / precision + 1 / recall) if precision and recall else 0.0


@pytest.mark.parametrize("tolerance", [0, 1, 1.5, 2, 3.7, 5])
@pytest.mark.parametrize("density", [0.01, 0.05, 0.3])
def test_f1_is_that_of_distances_between_all_pairs(tolerance: float, density: float) -> None:
    rng = np.random.default_rng(int(100 * density))
    found, wanted = (rng.random((23, 31)) < density * factor for factor in (1, 0.5))
    wanted[0, 0] = found[-1, -1] = True  # at corners the disc is cut off
    expected = f1_by_distances(found.astype(float), wanted.astype(float), tolerance)
    assert boundary_f1(found.astype(np.float32), wanted.astype(np.float32), tolerance) == pytest.approx(expected, 1e-12)


def test_one_edge_beside_the_other_counts_from_its_distance_on() -> None:
    found, wanted = np.zeros((2, 32, 32), np.float32)
    found[4:28, 10] = wanted[4:28, 13] = 1
    assert [boundary_f1(found, wanted, tolerance) for tolerance in (2, 2.9, 3, 5)] == [0, 0, 1, 1]


def test_f1_tells_a_missing_half_from_a_wrong_half() -> None:
    half, whole = np.zeros((2, 32, 64), np.float32)
    whole[16], half[16, :32] = 1, 1
    assert boundary_f1(half, whole, 0) == boundary_f1(whole, half, 0) == pytest.approx(2 / 3)
    assert boundary_f1(half, np.roll(half, 32, axis=1), 0) == 0


def test_empty_maps_agree_with_each_other_and_with_nothing_else() -> None:
    empty, full = np.zeros((16, 16), np.float32), np.ones((16, 16), np.float32)
    assert boundary_f1(empty, empty) == mask_iou(empty, empty) == 1
    assert boundary_f1(empty, full) == boundary_f1(full, empty) == mask_iou(full, empty) == 0
    assert boundary_f1(full, full) == mask_iou(full, full) == 1


def test_edges_of_an_image_are_compared_with_the_hint() -> None:
    image, hint = np.zeros((32, 32, 3), np.float32), np.zeros((32, 32), np.float32)
    image[:, 16:] = 1
    hint[:, 18] = 1
    assert edge_f1(image, hint, tolerance_px=4) == 1
    assert edge_f1(image, hint, tolerance_px=0) == 0
    assert edge_f1(np.zeros_like(image), hint) == 0
    assert edge_f1(image, hint, 4, draw=lambda picture: np.zeros_like(picture)) == 0


def ranks(values: np.ndarray) -> list[float]:
    """Ranks from 1 on, by counting the smaller and the equal values; equal ones share the mean of their ranks."""
    flat = values.ravel()
    return [float((flat < value).sum() + ((flat == value).sum() + 1) / 2) for value in flat]


@pytest.mark.parametrize("levels", [2, 5, 256, 10**6])
def test_rank_correlation_is_spearmans_with_ties(levels: int) -> None:
    rng = np.random.default_rng(levels)
    a = rng.integers(0, levels, (40, 30)).astype(np.float32)
    b = np.floor((a + rng.normal(0, levels / 3, a.shape)).clip(0)).astype(np.float32)
    assert rank_correlation(a, b) == pytest.approx(statistics.correlation(ranks(a), ranks(b)), abs=1e-9)


def test_rank_correlation_sees_order_and_nothing_else() -> None:
    a = np.random.default_rng(0).random((16, 16))
    assert rank_correlation(a, np.exp(9 * a) - 100) == pytest.approx(1)
    assert rank_correlation(a, 1 / (1 + a)) == pytest.approx(-1)
    flat = np.full_like(a, 0.3)
    assert rank_correlation(flat, a) == rank_correlation(a, flat) == 0
    assert rank_correlation(flat, 2 * flat) == 1


def test_pictures_count_by_their_luminance() -> None:
    rgb = np.random.default_rng(1).random((16, 16, 3)).astype(np.float32)
    weighed = rgb.astype(np.float64) @ [0.299, 0.587, 0.114]
    assert rank_correlation(rgb, weighed) == pytest.approx(1, abs=1e-6)
    assert rank_correlation(weighed[..., None], weighed) == pytest.approx(1)
    assert mask_iou(rgb, (weighed >= 0.5).astype(np.float32)) == 1


def test_iou_counts_pixels() -> None:
    a, b = np.zeros((2, 10, 10), np.float32)
    a[:, :6], b[:, 4:] = 1, 0.5
    assert mask_iou(a, b) == 20 / 100
    assert mask_iou(a, a * 0.49) == 0


@pytest.mark.parametrize("kind", HINTS)
def test_every_kind_of_hint_has_a_metric_that_an_image_meets_with_its_own_hint(
    kind: str, photograph: np.ndarray
) -> None:
    assert METRICS[kind](photograph, HINTS[kind](photograph)) == pytest.approx(1)


def test_hints_from_elsewhere_have_metrics_too(photograph: np.ndarray) -> None:
    assert METRICS.keys() == HINTS.keys() | {"depth", "low_resolution", "outpaint", "paired"}
    assert METRICS["depth"](photograph, HINTS["gray"](photograph) ** 3) == pytest.approx(1, abs=1e-3)
    assert METRICS["paired"](photograph, photograph) == 1


@pytest.mark.parametrize("kind", METRICS)
def test_metrics_fall_from_a_little_noise_to_a_shift_to_another_picture(kind: str, photograph: np.ndarray) -> None:
    hint = HINTS.get(kind, HINTS["gray"])(photograph)
    noise = np.random.default_rng(0).normal(0, 0.02, photograph.shape)
    noisy = (photograph + noise).clip(0, 1).astype(np.float32)
    scores = [METRICS[kind](image, hint) for image in (noisy, np.roll(photograph, 8, axis=1), photograph[::-1])]
    assert scores[0] > 0.85 and scores[0] > scores[1] + 0.15 and scores[1] > scores[2] + 0.02, scores


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a, b: edge_f1(a, b), "sizes differ: 16x16 and 24x16 pixels. Scale the hint to the image"),
        (lambda a, b: boundary_f1(a[..., 0], b[..., 0]), "sizes differ"),
        (lambda a, b: rank_correlation(a, b), "sizes differ"),
        (lambda a, b: mask_iou(a, b), "sizes differ"),
        (lambda a, b: METRICS["blur"](a, b), "sizes differ"),
        (lambda a, b: edge_f1(a, a, -1), "tolerance_px: -1 must be 0 or more"),
        (lambda a, b: edge_f1(a, a, math.nan), "tolerance_px: nan must be 0 or more"),
        (lambda a, b: rank_correlation(a, a + np.inf), "NaN or infinite values. Replace or crop"),
    ],
)
def test_what_cannot_be_compared_is_refused(call: Callable[..., float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(np.zeros((16, 16, 3), np.float32), np.zeros((16, 24, 3), np.float32))


def test_outpainting_is_measured_where_the_hint_shows_the_picture() -> None:
    hint = np.full((8, 8, 3), 0.5, np.float32)
    hint[:, :4] = 0.2
    image = hint.copy()
    image[:, 4:] = 0.9
    assert METRICS["outpaint"](image, hint) == 1
    image[:, :4] = 0.3
    assert METRICS["outpaint"](image, hint) == pytest.approx(0.9)
    assert METRICS["outpaint"](image, np.full((8, 8, 3), 0.5, np.float32)) == 1
