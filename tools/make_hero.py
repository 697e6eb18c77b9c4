"""Write the README's moving picture, `docs/strength.webp`: `python tools/make_hero.py [ADDRESS]`

ADDRESS is a running ComfyUI started by `python run.py comfy` (default 127.0.0.1:8188). Unseen drawings of the demo turn
into pictures as the strength of their control rises; prompt and seed stay.
"""

from __future__ import annotations

import io
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.tools.comfy_client import ComfyClient, ComfyError  # noqa: E402
from comfyui_controlnext.tools.demo_boards import BOOK, Column, Hint, hints_of  # noqa: E402
from comfyui_controlnext.tools.demo_sheet import draw_cells  # noqa: E402
from comfyui_controlnext.tools.environment import ROOT  # noqa: E402

if TYPE_CHECKING:
    from PIL.Image import Image

FILE = ROOT / "docs" / "strength.webp"
STRENGTHS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.8, 1.0)
GAP, WORDS = 8, 26  # pixels between pictures, and height of the line of text
SHORT, LONG = 350, 1800  # duration of a frame in milliseconds, and of the first and last


def frame(hints: dict[int, Hint], pictures: list[Image], strength: float) -> Image:
    """Draw one frame: each drawing above its picture, and the strength below."""
    from PIL import Image, ImageDraw, ImageFont

    side = BOOK.side
    sheet = Image.new("RGB", (len(hints) * (side + GAP) + GAP, 2 * (side + GAP) + WORDS), "white")
    for place, (hint, picture) in enumerate(zip(hints.values(), pictures, strict=True)):
        left = GAP + place * (side + GAP)
        sheet.paste(Image.fromarray(255 - hint.edges), (left, GAP))
        sheet.paste(picture, (left, side + 2 * GAP))
    words = f"strength {strength:.2f}" if strength else "the prompt alone"
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    pen.text((GAP, sheet.height - WORDS + 2), words, fill="black", font=font)
    full = sheet.width - 180 - GAP
    pen.rectangle((180, sheet.height - 16, 180 + full, sheet.height - 10), outline="black")
    pen.rectangle((180, sheet.height - 16, 180 + int(full * strength), sheet.height - 10), fill="black")
    return sheet


def main(address: str = "127.0.0.1:8188") -> None:
    """Draw on the server at `address` and write FILE."""
    from PIL import Image

    hints = hints_of(BOOK)
    columns = tuple(Column(str(strength), edges=strength) for strength in STRENGTHS)
    cells = draw_cells(ComfyClient(address), BOOK, hints, columns)
    frames = [
        frame(hints, [Image.open(io.BytesIO(cells[row, place])).convert("RGB") for row in hints], strength)
        for place, strength in enumerate(STRENGTHS)
    ]
    lengths = [LONG, *[SHORT] * (len(frames) - 2), LONG]
    frames[0].save(FILE, save_all=True, append_images=frames[1:], duration=lengths, loop=0, quality=80, method=6)
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ComfyError as error:
        sys.exit(str(error))
