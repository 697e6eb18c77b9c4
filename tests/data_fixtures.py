"""Files for tests of training data: pictures whose pixels tell where they are, and files that are broken."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

NAMES = ("a b", "\u00fcmlaut", "\u4e2d\u6587")
"""Names with a space, an umlaut and Chinese."""


def coordinates(height: int, width: int, mark: int = 0) -> np.ndarray:
    """(H, W, 3) uint8: red grows to the right, green downwards, over the whole picture; blue is `mark`."""
    y, x = np.mgrid[0:height, 0:width]
    red = (x + 0.5) / width * 255
    green = (y + 0.5) / height * 255
    return np.rint(np.stack([red, green, np.full_like(red, mark)], axis=-1)).astype(np.uint8)


def encoded(values: np.ndarray, kind: str = "png", **options: Any) -> bytes:
    """A picture file in memory."""
    out = io.BytesIO()
    Image.fromarray(values).save(out, kind, **options)
    return out.getvalue()


def write(path: Path, content: bytes | str | np.ndarray) -> Path:
    """Write bytes, text, or a picture in the format of the suffix, with the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        kind = path.suffix.lower().removeprefix(".")
        content = encoded(content, {"jpg": "jpeg"}.get(kind, kind))
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pairs(root: Path, names: Sequence[str] = NAMES, size: tuple[int, int] = (64, 64)) -> Path:
    """images/NAME.png, hints/NAME.png and images/NAME.txt for each name; all pictures differ."""
    for number, name in enumerate(names):
        write(root / "images" / f"{name}.png", coordinates(*size, mark=number))
        write(root / "hints" / f"{name}.png", coordinates(*size, mark=100 + number))
        write(root / "images" / f"{name}.txt", f"caption of {name}\n")
    return root


def lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def shard(path: Path, members: Mapping[str, bytes], **options: Any) -> Path:
    """An uncompressed tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def broken_files(root: Path) -> dict[str, str]:
    """Files that cannot be read, in `root`: name -> part of the reason."""
    jpg = encoded(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8), "jpeg")
    write(root / "cut off.jpg", jpg[: len(jpg) // 2])
    write(root / "text \u00e4.png", "not a picture at all")
    write(root / "nothing.PNG", b"")
    return {"cut off.jpg": "truncated", "text \u00e4.png": "none of these kinds", "nothing.PNG": "0 bytes"}


def marks(pictures: Tensor) -> list[int]:
    """The blue mark of each of (F, H, W, 3)."""
    return [round(float(picture[..., 2].mean()) * 255) for picture in pictures]
