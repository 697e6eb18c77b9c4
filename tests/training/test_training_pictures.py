"""Picture files: supported kinds, decoded values, and refusals."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from comfyui_controlnext.controlnext_training.data.pictures import PictureError, decode, luminance, size_of
from comfyui_controlnext.tests.fixtures.data_fixtures import coordinates, encoded
from PIL import Image

VALUES = coordinates(24, 40, 90)


def saved(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [("png", {}, 0), ("bmp", {}, 0), ("webp", {"lossless": True}, 0), ("jpeg", {"quality": 100}, 6)],
)
def test_every_kind_is_read(kind: str, options: dict[str, object], tolerance: float) -> None:
    picture = decode(encoded(VALUES, kind, **options))
    assert picture.size == (24, 40) and picture.alpha is None and picture.rgb.dtype == np.float32
    assert np.abs(picture.rgb * 255 - VALUES).max() <= tolerance + 1e-4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation: int) -> None:
    """Each stored form of one picture, with its tag, reads back as that picture."""
    undo = {
        1: lambda v: v,
        2: lambda v: v[:, ::-1],
        3: lambda v: v[::-1, ::-1],
        4: lambda v: v[::-1],
        5: lambda v: v.swapaxes(0, 1),
        6: lambda v: np.rot90(v, 1),
        7: lambda v: v[::-1, ::-1].swapaxes(0, 1),
        8: lambda v: np.rot90(v, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(Image.fromarray(np.ascontiguousarray(undo(VALUES))), "png", exif=exif)
    assert np.array_equal(np.rint(decode(content).rgb * 255), VALUES)
    assert size_of(content) == (24, 40)


@pytest.mark.parametrize("kind", ["png", "bmp", "webp", "jpeg"])
def test_a_size_is_read_from_the_header_unless_the_file_is_cut_off(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    noise = np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    content = encoded(noise, kind, exif=bytes(2000) if kind == "jpeg" else b"")
    reader = type(Image.open(io.BytesIO(content)))
    real = reader.load

    def load(image: Image.Image) -> object:
        loaded.append(kind)
        return real(image)

    monkeypatch.setattr(reader, "load", load)
    assert size_of(content) == (300, 200) and loaded == []
    for part in (0.5, 0.9):
        with pytest.raises(PictureError, match="is not a readable picture"):
            size_of(content[: int(len(content) * part)])
    assert size_of(content + bytes(4000)) == (300, 200), "data behind the picture"


def test_gray_of_16_bits_keeps_its_depth() -> None:
    depth = np.arange(24 * 40, dtype=np.uint16).reshape(24, 40) * 68
    picture = decode(saved(Image.fromarray(depth)))
    assert np.array_equal(np.rint(picture.rgb * 65535), np.repeat(depth[..., None], 3, 2))
    assert picture.rgb.min() == 0 and 0.99 < picture.rgb.max() <= 1


def test_palettes_one_channel_and_cmyk_become_rgb() -> None:
    palette = Image.fromarray(VALUES).quantize(64)
    assert np.array_equal(np.rint(decode(saved(palette)).rgb * 255), np.asarray(palette.convert("RGB")))
    gray = decode(saved(Image.fromarray(VALUES[..., 0])))
    assert np.array_equal(np.rint(gray.rgb * 255), np.repeat(VALUES[..., :1], 3, 2))
    bits = decode(saved(Image.fromarray(VALUES[..., 0] > 100)))
    assert set(np.unique(bits.rgb)) == {0.0, 1.0}
    cmyk = decode(saved(Image.fromarray(VALUES).convert("CMYK"), "jpeg", quality=100))
    assert np.abs(cmyk.rgb * 255 - VALUES).max() < 12


def test_alpha_lays_pictures_over_a_tone() -> None:
    alpha = np.zeros((24, 40), np.uint8)
    alpha[:, 20:], alpha[:, 10] = 255, 51
    picture = decode(encoded(np.dstack([VALUES, alpha])))
    assert picture.alpha is not None and np.array_equal(np.rint(picture.alpha * 255), alpha)
    white, black = picture.over(1.0), picture.over(0.0)
    assert (white[:, :10] == 1).all() and (black[:, :10] == 0).all()
    assert np.array_equal(np.rint(white[:, 20:] * 255), VALUES[:, 20:])
    assert np.allclose(white[:, 10], VALUES[:, 10] / 255 * 0.2 + 0.8, atol=1e-6)
    assert (luminance(picture)[:, :10] == 0).all()
    opaque = decode(encoded(np.dstack([VALUES, np.full_like(alpha, 255)])))
    assert opaque.alpha is None and np.array_equal(np.rint(opaque.rgb * 255), VALUES)


def test_a_transparent_colour_of_a_palette_is_alpha() -> None:
    image = Image.new("P", (40, 24), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(0, (0, 0, 20, 24))
    picture = decode(saved(image, transparency=0))
    assert picture.alpha is not None and (picture.alpha[:, :20] == 0).all() and (picture.alpha[:, 20:] == 1).all()


def bomb(width: int, height: int) -> bytes:
    """PNG of a few bytes that claims a size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(30000, 30000), (12000, 10000), (2**31 - 1, 2)])
def test_pictures_that_claim_too_many_pixels_are_refused(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PictureError, match="pixels"):
        decode(bomb(*size))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # other packs turn PIL's own guard off
    with pytest.raises(PictureError, match=r"pixels, more than 89,478,485. Make it smaller"):
        decode(bomb(*size))


PNG = encoded(VALUES)
JPEG = encoded(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8), "jpeg")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty .0 bytes"),
        (b"hello", "none of these kinds"),
        (b"\0" * 5000, "none of these kinds"),
        (saved(Image.fromarray(VALUES), "gif"), "none of these kinds"),
        (PNG[: len(PNG) // 2], "not a readable picture"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (PNG[:50] + b"\xff" * 20 + PNG[70:], "not a readable picture"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_reason(content: bytes, words: str) -> None:
    with pytest.raises(PictureError, match=words):
        decode(content)


def test_damage_anywhere_is_a_reason_and_never_another_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for whole in (PNG, JPEG, encoded(VALUES, "webp"), encoded(VALUES, "bmp")):
        for _ in range(60):
            damaged = bytearray(whole)
            for place in rng.integers(0, min(len(whole), 400), 4):
                damaged[place] = rng.integers(0, 256)
            for read in (decode, size_of):
                with contextlib.suppress(PictureError):
                    read(bytes(damaged))
