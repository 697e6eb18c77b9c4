"""Training sizes: aspect buckets of one area, and the crop shared by picture, hint and mask.

Sizes are (height, width) in pixels. All arithmetic is on integers, so every system makes the same crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..seeding import uniform
from .samples import DatasetError

LATENT_STEP = 8
"""Pixels along a side of one latent cell."""
MAX_ASPECT = 4
"""Largest ratio of the longest to the shortest side of a bucket; longer pictures lose their ends."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Resize and crop with which a picture fills its bucket."""

    original: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int]
    """Offset (top, left) in the resized picture."""
    size: tuple[int, int]
    """Size of the bucket."""
    flipped: bool = False
    """True: mirrored left to right after the crop. False: not mirrored."""

    @property
    def seen_crop(self) -> tuple[int, int]:
        """Offset (top, left) of the crop in the resized picture, mirrored where the crop is."""
        top, left = self.crop
        return (top, self.resized[1] - self.size[1] - left) if self.flipped else (top, left)


def bucket_sizes(resolution: int, step: int = 64, buckets: bool = True) -> tuple[tuple[int, int], ...]:
    """Sizes in steps of `step` with an area of at most resolution^2, the widest for every height, from tall to wide.

    buckets: True gives these; False only the square of the resolution. Raises DatasetError for sizes that latents
    cannot have.
    """
    if resolution < LATENT_STEP or resolution % LATENT_STEP:
        raise DatasetError(f"resolution: {resolution} is not a multiple of {LATENT_STEP}. Take 512, 768 or 1024.")
    if not buckets:
        return ((resolution, resolution),)
    if step < LATENT_STEP or step % LATENT_STEP or step > resolution:
        raise DatasetError(
            f"bucket_step: {step} must be a multiple of {LATENT_STEP} and no more than the resolution, {resolution}."
        )
    sides = range(step, MAX_ASPECT * resolution + 1, step)
    widest = [(side, resolution * resolution // side // step * step) for side in sides]
    both = {size for a, b in widest for size in ((a, b), (b, a)) if min(size) > 0}
    return tuple(sorted((s for s in both if max(s) <= MAX_ASPECT * min(s)), key=lambda s: (-s[0] / s[1], s)))


def choose(original: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Bucket whose aspect ratio is nearest; of equals the largest, then the first."""

    def distance(size: tuple[int, int]) -> tuple[float, int]:
        one, other = original[0] * size[1], original[1] * size[0]
        return max(one, other) / min(one, other), -size[0] * size[1]

    return min(sizes, key=distance)


def fit(original: tuple[int, int], size: tuple[int, int]) -> Fit:
    """Cover `size` with a picture of `original` size, keeping its aspect ratio to the nearest pixel."""
    (height, width), (to_height, to_width) = original, size
    if height * to_width >= width * to_height:  # relatively taller than the bucket
        resized = (max(to_height, _rounded(height * to_width, width)), to_width)
    else:
        resized = (to_height, max(to_width, _rounded(width * to_height, height)))
    crop = ((resized[0] - to_height) // 2, (resized[1] - to_width) // 2)
    return Fit(original, resized, crop, size)


def variant_of(where: Fit, content: str, variant: int, flip: bool) -> Fit:
    """Variant of a crop: 0 is the centre crop, further crops depend on a hash of the picture's content, uniform over
    all offsets; with `flip` odd variants are the even ones before them, mirrored.
    """
    number, flipped = divmod(variant, 2) if flip else (variant, 0)
    room = [resized - size for resized, size in zip(where.resized, where.size, strict=True)]
    top, left = (int(uniform(0, f"crop {number} of {content}", axis) * (room[axis] + 1)) for axis in (0, 1))
    return replace(where, crop=(top, left) if number else where.crop, flipped=bool(flipped))


def _rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
