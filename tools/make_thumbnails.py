"""Write the pictures of the template browser: `python tools/make_thumbnails.py [ADDRESS] [NAME]...`

ADDRESS is a running ComfyUI that `python run.py comfy` started (default 127.0.0.1:8188); NAMEs are workflows, default
all. Each picture shows a hint and what the demo's model draws without control, at half and at full strength; where the
demo has no control of that kind, it shows the sample inputs of the workflow.
"""

from __future__ import annotations

import io
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.controlnext_core.hints.sample_inputs import sample  # noqa: E402
from comfyui_controlnext.controlnext_training.drawn import SCHEMES  # noqa: E402
from comfyui_controlnext.tools import demo_sheet  # noqa: E402
from comfyui_controlnext.tools.comfy_client import ComfyClient, ComfyError  # noqa: E402
from comfyui_controlnext.tools.demo_boards import BOOK, SCENE_SEED, SHAPES, Column, Hint, draw_hint  # noqa: E402
from comfyui_controlnext.tools.make_workflows import FOLDER, WORKFLOWS  # noqa: E402

EDGES, XS, DEPTH, MASK = Column("", edges=1), Column("", xs=1), Column("", depth=1), Column("", mask=1)
TWO = Column("", edges=1, mask=1, split=True)
SHOWN: dict[str, tuple[Column, int]] = {
    "demo": (EDGES, 4),
    "demo_train": (EDGES, 12),
    "sd15_canny": (EDGES, 3),
    "sd15_depth": (DEPTH, 4),
    "sd15_depth_in_mask": (DEPTH, 12),
    "sd15_mask": (MASK, 3),
    "sdxl_canny": (EDGES, 23),
    "sdxl_second_pass": (EDGES, 12),
    "sdxl_depth": (DEPTH, 12),
    "sdxl_lora_two_controls": (TWO, 4),
    "xs_sd15_canny": (XS, 3),
    "xs_sdxl_canny": (XS, 4),
    "xs_sdxl_depth": (DEPTH, 23),
    "xs_sdxl_two": (XS, 23),
    "xs_controlnext_lora": (XS, 12),
    "train_sd15": (EDGES, 33),
    "sd35_canny": (EDGES, 33),
    "train_sd35": (EDGES, 3),
}
"""Workflow -> the demo's controls that stand for its own, and the number of a scene that no training saw."""
CLIP = ("photo", "pose_clip", "pose_clip", "pose_clip")
SAMPLES = {"sd15_pose": ("pose",), "sd15_pose_positive": ("pose",), "svd_short_clip": CLIP, "svd_long_clip": CLIP}
"""Workflow -> kinds of its sample inputs, where the demo has no control of the kind."""
STRENGTHS = (0.0, 0.5, 1.0)
SIDE, GAP, QUALITY = 238, 4, 60


def scaled(column: Column, strength: float) -> Column:
    """The column with its controls at this strength."""
    names = ("edges", "mask", "depth", "xs")
    return replace(column, **{name: strength * getattr(column, name) for name in names})


def given(hint: Hint, column: Column) -> Any:
    """Picture that the controls of the column see."""
    if column.mask and not column.split:
        return hint.other_mask
    return hint.edges if column.given(hint) is None else column.given(hint)


def drawn(client: ComfyClient, column: Column, scene: int) -> list[tuple[str, Any]]:
    """(words, picture) of the four parts, from the demo's model."""
    from PIL import Image

    board = BOOK if column == EDGES else SHAPES
    hint = draw_hint(board, scene)
    if column.mask and not column.split:  # of all shapes
        hint = replace(hint, other_mask=SCHEMES[board.scheme](SCENE_SEED, scene, board.side).hint("mask"))
    cells = demo_sheet.draw_cells(client, board, {0: hint}, tuple(scaled(column, strength) for strength in STRENGTHS))
    words = ("prompt alone", "strength 0.5", "strength 1")
    results = [Image.open(io.BytesIO(cells[0, place])).convert("RGB") for place in range(len(STRENGTHS))]
    return [("hint", Image.fromarray(given(hint, column))), *zip(words, results, strict=True)]


def samples(kinds: tuple[str, ...]) -> list[tuple[str, Any]]:
    """(words, picture) of the four parts, from the sample inputs."""
    from PIL import Image

    parts: list[tuple[str, Any]] = []
    for place, kind in enumerate(kinds):
        frame = 6 * (place - 1) if kind == "pose_clip" else 0
        picture = sample(kind, (2 * SIDE, 2 * SIDE), frames=frame + 1).images[-1]
        parts.append((f"sample {kind.replace('_', ' ')}", Image.fromarray((255 * picture).astype("uint8"))))
    return parts


def compose(parts: list[tuple[str, Any]]) -> Any:
    """One picture, or four in a square, each with its words in the corner."""
    from PIL import Image, ImageDraw, ImageFont

    side = SIDE if len(parts) > 1 else 2 * SIDE + GAP
    sheet = Image.new("RGB", (2 * SIDE + GAP, 2 * SIDE + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=18)
    for place, (words, picture) in enumerate(parts):
        left, top = (SIDE + GAP) * (place % 2), (SIDE + GAP) * (place // 2)
        sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left, top))
        box = pen.textbbox((left + 8, top + side - 28), words, font=font)
        pen.rectangle((box[0] - 6, box[1] - 4, box[2] + 6, box[3] + 4), fill="white")
        pen.text((left + 8, top + side - 28), words, fill="black", font=font)
    return sheet


def main(address: str = "127.0.0.1:8188", *names: str) -> None:
    """Draw on the server at `address` and write the pictures."""
    client = ComfyClient(address)
    for workflow in (describe() for describe in WORKFLOWS):
        if names and workflow.name not in names:
            continue
        known = SHOWN.get(workflow.name)
        parts = drawn(client, *known) if known else samples(SAMPLES[workflow.name])
        path = FOLDER / f"{workflow.title}.jpg"
        compose(parts).save(path, "JPEG", quality=QUALITY, optimize=True)
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ComfyError as error:
        sys.exit(str(error))
