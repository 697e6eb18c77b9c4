"""Hint images against the edges of drawings and of a photograph."""

import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from comfyui_controlnext.controlnext_core.hints import HINTS
from comfyui_controlnext.controlnext_core.hints.edges import canny, lines, soft_edge
from comfyui_controlnext.controlnext_core.hints.picture import luminance
from comfyui_controlnext.controlnext_core.hints.tones import blur, gray, mask

ASTRONAUT = Path(__file__).resolve().parents[2] / "demo" / "astronaut.jpg"
BINARY = ("canny", "lines", "mask")


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """Photograph (512, 512, 3)."""
    return cv2.imread(str(ASTRONAUT))[..., ::-1].astype(np.float32) / 255


def square(size: int = 96, inside: tuple[float, ...] = (1, 1, 1), outside: tuple[float, ...] = (0, 0, 0)) -> np.ndarray:
    """Square over the middle half of a picture (size, size, 3)."""
    picture = np.full((size, size, 3), outside, np.float32)
    picture[size // 4 : -size // 4, size // 4 : -size // 4] = inside
    return picture


def distance_to_outline(size: int = 96) -> np.ndarray:
    """Distance (size, size) in pixels from the border between the inner and the outer pixels of `square`."""
    y, x = np.abs(np.mgrid[:size, :size] - (size - 1) / 2) - size / 4
    outside = np.hypot(np.maximum(x, 0), np.maximum(y, 0))
    return np.where((x > 0) | (y > 0), outside, np.minimum(-x, -y))


@pytest.mark.parametrize("name", HINTS)
@pytest.mark.parametrize("shape", [(8, 8), (8, 200), (61, 47), (64, 64)])
@pytest.mark.parametrize("channels", [0, 1, 3, 4])
def test_any_size_and_kind_of_picture_gives_a_hint(name: str, shape: tuple[int, int], channels: int) -> None:
    full = shape if channels == 0 else (*shape, channels)
    image = np.random.default_rng(0).random(full)
    before = image.copy()
    hint = HINTS[name](image)
    assert hint.shape == (*shape, 3) and hint.dtype == np.float32
    assert 0 <= hint.min() and hint.max() <= 1
    assert np.array_equal(HINTS[name](image), hint)
    assert np.array_equal(image, before) and not np.shares_memory(image, hint)


@pytest.mark.parametrize("name", HINTS)
def test_hints_of_the_photograph_are_neither_empty_nor_full(name: str, photograph: np.ndarray) -> None:
    hint = HINTS[name](photograph)
    assert 0.01 < hint.mean() < 0.7 and hint.max() > 0.95
    assert (set(np.unique(hint)) == {0, 1}) == (name in BINARY)
    if name != "blur":
        assert np.array_equal(hint[..., 0], hint[..., 1]) and np.array_equal(hint[..., 0], hint[..., 2])


@pytest.mark.parametrize("name", HINTS)
def test_gray_pictures_and_repeated_gray_give_the_same_hint(name: str, photograph: np.ndarray) -> None:
    channel = photograph[:128, :128, 1]
    hint = HINTS[name](channel)
    for same in (channel[..., None], np.repeat(channel[..., None], 3, axis=2)):
        assert np.array_equal(HINTS[name](same), hint)
    opaque = np.dstack([photograph[:128, :128], np.ones((128, 128), np.float32)])
    assert np.array_equal(HINTS[name](opaque), HINTS[name](photograph[:128, :128]))


@pytest.mark.parametrize("name", ["canny", "soft_edge", "lines"])
@pytest.mark.parametrize("tone", [0.0, 0.4, 1.0])
def test_a_picture_of_one_tone_has_no_edges(name: str, tone: float) -> None:
    assert HINTS[name](np.full((40, 50, 3), tone)).max() < 1e-6


@pytest.mark.parametrize("name", ["canny", "soft_edge", "lines"])
def test_edges_lie_on_the_outline_all_around(name: str) -> None:
    found = HINTS[name](square())[..., 0] > 0.5
    distance = distance_to_outline()
    assert distance[found].max() <= (4 if name == "soft_edge" else 1.5)
    near = cv2.dilate(found.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert near[distance < 0.6].mean() > 0.98


@pytest.mark.parametrize("draw", [canny, soft_edge])
@pytest.mark.parametrize("colours", [((1, 0, 0), (0, 0.299 / 0.587, 0)), ((0, 0, 1), (0, 0.114 / 0.587, 0))])
def test_edges_between_colours_of_one_luminance_are_seen(
    draw: Callable[[np.ndarray], np.ndarray], colours: tuple[tuple[float, ...], tuple[float, ...]]
) -> None:
    picture = square(inside=colours[0], outside=colours[1])
    assert np.ptp(luminance(picture)) < 1e-6
    assert (draw(picture)[..., 0] > 0.5).sum() > 150


def test_canny_is_opencvs_and_thresholds_thin_it_out(photograph: np.ndarray) -> None:
    counts = []
    for low, high in ((50, 200), (100, 200), (100, 350), (400, 1000)):
        hint = canny(photograph, low, high)
        bytes_ = (photograph * 255).round().astype(np.uint8)
        assert np.array_equal(hint[..., 0] * 255, cv2.Canny(bytes_, low, high))
        counts.append(hint.sum())
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 4
    assert np.array_equal(canny(photograph), canny(photograph, 100, 200))


def test_soft_edges_rank_contrasts_and_suppress_grain() -> None:
    steps = [soft_edge(square(outside=(0.2,) * 3, inside=(0.2 + step,) * 3)).max() for step in (0.05, 0.15, 0.3, 0.8)]
    assert steps == sorted(steps) and steps[0] < 0.5 and steps[-1] > 0.95
    grain = np.random.default_rng(0).normal(0.5, 0.04, (96, 96, 3)).clip(0, 1)
    grainy = square(inside=(0.7,) * 3, outside=(0.3,) * 3) + grain - 0.5
    hint = soft_edge(grainy)[..., 0]
    distance = distance_to_outline()
    assert np.median(hint[distance < 1]) > 4 * np.median(hint[distance > 12])


def test_soft_edges_quieten_what_has_no_direction_and_what_is_crowded() -> None:
    dot, step, stripes = np.zeros((3, 65, 65), np.float32)
    dot[30:35, 30:35] = 1
    step[:, 32:] = 0.1
    stripes[:, np.arange(65) % 8 < 4] = 0.1
    assert soft_edge(dot)[32, 32, 0] < 0.05 < 0.5 < soft_edge(dot)[32, 29, 0]
    assert soft_edge(stripes)[8:-8, 8:-8].max() < 0.8 * soft_edge(step).max()


def test_soft_edges_widen_with_width_and_brighten_with_sensitivity(photograph: np.ndarray) -> None:
    widths = [(soft_edge(square(), width)[..., 0] > 0.5).sum() / 192 for width in (0.5, 1, 2, 4)]
    assert widths == sorted(widths) and 1 <= widths[0] < 4 and 3 <= widths[1] < 6 and widths[3] > 1.8 * widths[1]
    means = [soft_edge(photograph, 1, sensitivity).mean() for sensitivity in (0.3, 1, 3)]
    assert means[0] < 0.7 * means[1] < 0.5 * means[2]


def test_lines_are_the_drawn_ones_without_the_short_ones() -> None:
    picture = np.zeros((200, 300), np.float32)
    cv2.line(picture, (20, 20), (280, 60), 1, 5)
    cv2.line(picture, (50, 150), (62, 150), 1, 5)
    every, longer = (lines(picture, percent)[..., 0] for percent in (2, 20))
    assert every[:100].sum() >= longer[:100].sum() > 2 * 240  # both sides of the band
    assert every[130:].sum() > 10 and longer[130:].sum() == 0
    rows, columns = np.nonzero(longer)
    slope, offset = np.polyfit(columns, rows, 1)
    assert slope == pytest.approx(40 / 260, abs=0.01) and offset == pytest.approx(20 - 20 * 40 / 260, abs=1)
    assert lines(picture, 20, thickness=3).sum() > 1.8 * lines(picture, 20).sum()


def test_a_line_of_the_photograph_is_longer_than_asked_for(photograph: np.ndarray) -> None:
    kept = lines(photograph, 15)[..., 0].astype(np.uint8)
    _, _, boxes, _ = cv2.connectedComponentsWithStats(kept, connectivity=8)
    lengths = np.hypot(boxes[1:, cv2.CC_STAT_WIDTH], boxes[1:, cv2.CC_STAT_HEIGHT])
    assert len(lengths) >= 3 and lengths.min() >= 0.15 * 512 - 2


def test_blur_is_a_gaussian_and_tile_the_mean_over_areas() -> None:
    impulse = np.zeros((65, 65, 3), np.float32)
    impulse[32, 32] = 1
    row = blur(impulse, 8)[32, :, 0]
    gaussian = np.exp(-0.5 * ((np.arange(65) - 32) / 4) ** 2)
    assert np.allclose(row / row.max(), gaussian, atol=2e-3)
    blocks = np.kron(np.random.default_rng(0).random((6, 9, 3)), np.ones((8, 8, 1)))
    centres = blur(blocks, 8, "tile")[3:-3]
    means = blocks[::8, ::8]
    between = (centres[0::8, 3::8] + centres[1::8, 3::8] + centres[0::8, 4::8] + centres[1::8, 4::8]) / 4
    assert between.shape == means.shape and np.allclose(between, means, atol=0.09)
    assert np.allclose(blur(blocks, 1, "tile"), blocks, atol=1e-6)


@pytest.mark.parametrize("style", ["blur", "tile"])
def test_blurring_keeps_the_mean_and_takes_more_the_larger_it_is(style: str, photograph: np.ndarray) -> None:
    spreads = []
    for size in (1, 4, 16, 64, 1000):
        hint = blur(photograph, size, style)
        assert abs(hint.mean() - photograph.mean()) < 0.03
        spreads.append(np.diff(hint, axis=1).std())
    assert spreads == sorted(spreads, reverse=True) and spreads[-1] < 1e-3


def test_gray_is_luminance_as_pil_has_it(photograph: np.ndarray) -> None:
    from PIL import Image

    reference = np.asarray(Image.open(ASTRONAUT).convert("RGB").convert("L"))
    ours = gray(np.asarray(Image.open(ASTRONAUT)) / 255)[..., 2] * 255
    assert np.abs(ours - reference).max() <= 0.51  # PIL rounds
    assert gray(np.ones((8, 8, 3))).min() == pytest.approx(1)


def test_masks_come_from_what_is_given_then_from_alpha_then_from_light() -> None:
    picture = square(inside=(0.8, 0.7, 0.9), outside=(0.1, 0.2, 0.3))
    inside = square()
    given = np.zeros((96, 96))
    given[:, :30], given[:, 30:40] = 0.5, 0.49
    alpha = np.rot90(given)
    with_alpha = np.dstack([picture, alpha])
    assert np.array_equal(mask(picture), inside)
    assert np.array_equal(mask(with_alpha)[..., 0], alpha >= 0.5)
    assert np.array_equal(mask(with_alpha, given)[..., 0], given >= 0.5)
    for constant in (0.0, 1.0):
        assert np.array_equal(mask(np.dstack([picture, np.full((96, 96), constant)])), inside)
    for arguments in ((picture,), (with_alpha,), (with_alpha, given)):
        assert np.array_equal(mask(*arguments, invert=True), 1 - mask(*arguments))
    assert mask(np.full((9, 9), 0.7)).max() == 0


def test_light_is_split_where_the_variance_between_the_parts_is_largest(photograph: np.ndarray) -> None:
    tones = np.rint(luminance(photograph) * 255)

    def between(threshold: int) -> float:
        dark, bright = tones[tones <= threshold], tones[tones > threshold]
        return dark.size * bright.size * (bright.mean() - dark.mean()) ** 2

    best = max(range(int(tones.min()), int(tones.max())), key=between)
    assert np.array_equal(mask(photograph)[..., 0], tones > best)


def test_slight_overshoot_is_clipped() -> None:
    picture = square() * 1.3 - 0.1
    for draw in HINTS.values():
        assert np.array_equal(draw(picture), draw(picture.clip(0, 1)))


PICTURE = np.full((16, 16, 3), 0.5, np.float32)


@pytest.mark.parametrize("name", HINTS)
@pytest.mark.parametrize(
    ("image", "words"),
    [
        ((PICTURE * 255).astype(np.uint8), "image: has values of type uint8, not floats in 0..1. Divide by"),
        (PICTURE * 255, "image: has values from 127.5 to 127.5, not in 0..1. Scale them"),
        (PICTURE * 4 - 3, "image: has values from -1 to -1, not in 0..1"),
        (PICTURE * math.nan, "image: has values from nan to nan"),
        (PICTURE[None], r"image: has the shape \(1, 16, 16, 3\). Give one picture as .* a batch image by image"),
        (PICTURE[..., :2], r"image: has the shape \(16, 16, 2\)"),
        (PICTURE[:7], "image: 16x7 is smaller than 8x8 pixels. Enlarge it"),
    ],
    ids=["bytes", "0..255", "-1..1", "nan", "batch", "two channels", "small"],
)
def test_what_is_no_picture_is_refused(name: str, image: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HINTS[name](image)


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (
            lambda: canny(PICTURE, 200, 100),
            "low_threshold: 200 must be 0 or more and not above high_threshold, 100. Lower",
        ),
        (lambda: canny(PICTURE, -1, 100), "low_threshold: -1 must be 0 or more"),
        (lambda: soft_edge(PICTURE, 0), "width: 0 must be above 0. The default is 1"),
        (lambda: soft_edge(PICTURE, 1, math.nan), "sensitivity: nan must be above 0"),
        (lambda: lines(PICTURE, 101), r"min_length: 101 must be in 0..100, in percent"),
        (lambda: lines(PICTURE, 5, 0), "thickness: 0 must be 1 pixel or more"),
        (lambda: blur(PICTURE, 0), "size: 0 must be 1 pixel or more"),
        (lambda: blur(PICTURE, 8, "box"), "style: 'box' is not one of blur, tile"),
        (
            lambda: mask(PICTURE, np.zeros((64, 64))),
            r"mask: has the shape \(64, 64\), the picture \(16, 16\).*no alpha",
        ),
        (lambda: mask(PICTURE, np.full((16, 16), 255.0)), "mask: has values from 255 to 255"),
    ],
)
def test_wrong_settings_are_refused_with_the_value_and_what_to_do(draw: Callable[[], np.ndarray], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        draw()
