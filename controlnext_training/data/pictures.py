"""Decoding of png, jpg, webp and bmp files to floats, and resizing.

# H W height and width; arrays are float32 in [0, 1]
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...controlnext_core.opencv import require_opencv
from .buckets import Fit
from .samples import first_line

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PIXELS = 89_478_485
"""Largest number of pixels of a picture; a small file can claim any size. Source: PIL's limit (a quarter GiB of
RGB)."""
ENDS = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}
"""Bytes that end a picture; they do not occur in a JPEG's compressed data."""
LAST_BYTES = 1024
"""Length of the file's end that is searched for these bytes; a thumbnail inside a JPEG has an end marker as well."""
ORIENTATION = 0x0112
TURNED = (5, 6, 7, 8)
"""Values of the EXIF orientation tag that swap height and width."""
PNG_TAGS = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
"""Marks of a PNG's chunks that can hold an orientation; they may follow the pixels."""
WHITE, BLACK = 1.0, 0.0
SIXTEEN_BITS = 65535.0


class PictureError(ValueError):
    """Error for bytes that are not a picture. The message is the reason without the file's name."""


@dataclass(frozen=True, slots=True)
class Picture:
    """Decoded picture, rotated by its EXIF orientation."""

    rgb: np.ndarray
    """Colours (H, W, 3)."""
    alpha: np.ndarray | None = None
    """Alpha (H, W); None where everything is opaque."""

    @property
    def size(self) -> tuple[int, int]:
        """Size (H, W)."""
        return self.rgb.shape[0], self.rgb.shape[1]

    def over(self, background: float) -> np.ndarray:
        """Composite over a uniform gray of the value `background`: (H, W, 3)."""
        if self.alpha is None:
            return self.rgb
        alpha = self.alpha[..., None]
        return self.rgb * alpha + np.float32(background) * (1 - alpha)


def decode(content: bytes) -> Picture:
    """Decode a picture. Gray of 16 bits keeps its depth; palettes, CMYK and one channel become RGB.

    Raises PictureError.
    """
    with _opened(content) as image:
        return _to_floats(image)


def size_of(content: bytes) -> tuple[int, int]:
    """Size (H, W) of a picture from its header. Raises PictureError.

    A file without its format's last bytes is decoded, so that truncation is found. Damage inside a picture is found
    when it is decoded.
    """
    with _header(content) as image:
        if not _has_its_end(content, image.format):
            with DECODED.taking(image.width * image.height):
                image.load()
        return (image.width, image.height) if _is_turned(image, content) else (image.height, image.width)


def _is_turned(image: Any, content: bytes) -> bool:
    """True: shown with height and width swapped.

    False: not. A PNG without an orientation tag is not decoded for this.
    """
    if image.format == "PNG" and not any(mark in content for mark in PNG_TAGS):
        return False
    return image.getexif().get(ORIENTATION, 1) in TURNED


def _has_its_end(content: bytes, kind: str) -> bool:
    """True: the file ends as its format requires. False: it is truncated, or other data follow the picture."""
    if kind == "WEBP":
        return len(content) >= int.from_bytes(content[4:8], "little") + 8
    if kind == "BMP":
        return len(content) >= int.from_bytes(content[2:6], "little") > 0
    return ENDS[kind] in content[-LAST_BYTES:]


class Budget:
    """Limit on the number of pixels decoded at the same time; a picture above the limit is decoded by itself."""

    def __init__(self, pixels: int) -> None:
        self.pixels, self._used, self._changed = pixels, 0, threading.Condition()

    @contextmanager
    def taking(self, pixels: int) -> Iterator[None]:
        """Context that reserves `pixels` of the budget; entering waits until they are free."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + pixels <= self.pixels)
            self._used += pixels
        try:
            yield
        finally:
            with self._changed:
                self._used -= pixels
                self._changed.notify_all()


DECODED = Budget(MAX_PIXELS)
"""Budget of pixels that all threads decode at one time: 0.25 GiB of bytes, four times that as floats."""


@contextmanager
def _opened(content: bytes) -> Iterator[Any]:
    """Context with the decoded picture, rotated by its EXIF orientation; errors inside become PictureError."""
    from PIL import ImageOps

    with _header(content) as image, DECODED.taking(image.width * image.height):
        yield ImageOps.exif_transpose(image)


@contextmanager
def _header(content: bytes) -> Iterator[Any]:
    """Context with the picture after reading its header; errors inside become PictureError."""
    from PIL import Image

    if not content:
        raise PictureError("is empty (0 bytes). Copy or download it again")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise PictureError(
                    f"has {image.width}x{image.height} pixels, more than {MAX_PIXELS:,}. Make it smaller"
                )
            yield image
    except PictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(f"has too many pixels ({first_line(error)}). Make it smaller") from error
    except Exception as error:  # on damaged bytes the decoders raise whatever comes
        reason = first_line(error).replace(repr(type(error)), "")
        if "cannot identify image file" in reason:
            reason = "its content is of none of these kinds"
        raise PictureError(
            f"is not a readable picture ({reason}). Save it again as png, jpg, webp or bmp, or remove it"
        ) from error


def _to_floats(image: Any) -> Picture:
    """Picture from a PIL image."""
    if image.mode.startswith("I"):  # I;16, I;16B, and I, which older PIL makes of them
        gray = np.asarray(image).astype(np.float32).clip(0, SIXTEEN_BITS) / np.float32(SIXTEEN_BITS)
        return Picture(np.repeat(gray[..., None], 3, axis=2))
    transparent = "A" in image.getbands() or "transparency" in image.info
    values = np.asarray(image.convert("RGBA" if transparent else "RGB")).astype(np.float32)
    values /= np.float32(255)  # in place: a second array of a large picture is a GiB
    if not transparent or bool((values[..., 3] == 1).all()):
        return Picture(values[..., :3])
    return Picture(values[..., :3], values[..., 3])


def luminance(picture: Picture) -> np.ndarray:
    """Luminance (H, W), the values of a mask; transparent pixels are black."""
    from ...controlnext_core.hints.picture import luminance as weigh

    return weigh(picture.over(BLACK)).astype(np.float32)


def resize(values: np.ndarray, size: tuple[int, int], smooth: bool) -> np.ndarray:
    """Resize (H, W) or (H, W, C) to `size`, both axes by the same rule, pixel centres on pixel centres.

    Shrinking takes the mean over the area of each new pixel. Enlarging is cubic with smooth=True (pictures); with False
    it takes the nearest pixel (hints and masks: thin lines stay lines, and no values arise between two labels).
    """
    cv2 = require_opencv()

    enlarge = cv2.INTER_CUBIC if smooth else cv2.INTER_NEAREST_EXACT
    old = values.shape[:2]
    one_grows_one_shrinks = (size[0] - old[0]) * (size[1] - old[1]) < 0
    for height, width in ((size[0], old[1]), size) if one_grows_one_shrinks else (size,):
        if values.shape[:2] != (height, width):
            shrinks = height <= values.shape[0] and width <= values.shape[1]
            values = cv2.resize(values, (width, height), interpolation=cv2.INTER_AREA if shrinks else enlarge)
    return values.clip(0, 1) if smooth else values


def cut(values: np.ndarray, fit: Fit, smooth: bool) -> np.ndarray:
    """Resize, crop and mirror according to `fit`; a hint or mask of another size is thereby
    stretched over its picture.
    """
    resized = resize(values, fit.resized, smooth)
    (top, left), (height, width) = fit.crop, fit.size
    part = resized[top : top + height, left : left + width]
    return np.ascontiguousarray(part[:, ::-1] if fit.flipped else part)
