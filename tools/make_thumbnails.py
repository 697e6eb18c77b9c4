"""Write the pictures of the template browser: `python tools/make_thumbnails.py [ADDRESS] [NAME]...`

ADDRESS is a running ComfyUI started by `python run.py comfy` (default 127.0.0.1:8188); NAMEs are workflows, default
all. Each picture shows a hint and drawings of the demo's model without control, at half and at full strength; those for
video show two frames. `demo_tiles` is run unchanged, with the trained control of docs/super_resolution.md.
"""

from __future__ import annotations

import io
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.controlnext_core.fidelity import OUTPAINT_GRAY  # noqa: E402
from comfyui_controlnext.controlnext_core.hints.pose_drawing import draw_sticks  # noqa: E402
from comfyui_controlnext.controlnext_core.hints.sample_inputs import SCENES, sample  # noqa: E402
from comfyui_controlnext.controlnext_core.picturebook import draw, draw_children  # noqa: E402
from comfyui_controlnext.controlnext_training.drawn import SCHEMES  # noqa: E402
from comfyui_controlnext.tools import demo_sheet  # noqa: E402
from comfyui_controlnext.tools.comfy_client import ComfyClient, ComfyError  # noqa: E402
from comfyui_controlnext.tools.demo_boards import (  # noqa: E402
    BOOK,
    CHILDREN,
    SCENE_SEED,
    UNET_BOOK,
    Board,
    Column,
    Hint,
    draw_hint,
)
from comfyui_controlnext.tools.make_workflows import FOLDER, WORKFLOWS  # noqa: E402
from comfyui_controlnext.tools.workflow_graph import api_format  # noqa: E402
from comfyui_controlnext.tools.workflows import demo_graphs  # noqa: E402

EDGES, XS, DEPTH, MASK = Column("", edges=1), Column("", xs=1), Column("", depth=1), Column("", mask=1)
POSE, TWO = Column("", pose=1), Column("", edges=0.6, depth=0.6, lora=1)
SHOWN: dict[str, tuple[Board, Column, int]] = {
    "demo": (BOOK, EDGES, 4),
    "demo_train": (UNET_BOOK, XS, 12),
    "sd15_canny": (BOOK, EDGES, 3),
    "sd15_depth": (BOOK, DEPTH, 4),
    "sd15_depth_in_mask": (BOOK, DEPTH, 12),
    "sd15_mask": (BOOK, MASK, 13),
    "sd15_pose": (CHILDREN, POSE, 9),
    "sd15_pose_positive": (CHILDREN, POSE, 3),
    "sdxl_canny": (BOOK, EDGES, 23),
    "sdxl_second_pass": (BOOK, EDGES, 12),
    "sdxl_depth": (BOOK, DEPTH, 13),
    "sdxl_lora_two_controls": (BOOK, TWO, 101),
    "xs_sd15_canny": (UNET_BOOK, XS, 3),
    "xs_sdxl_canny": (UNET_BOOK, XS, 4),
    "xs_sdxl_depth": (BOOK, DEPTH, 33),
    "xs_sdxl_two": (UNET_BOOK, XS, 23),
    "xs_controlnext_lora": (UNET_BOOK, XS, 12),
    "train_sd15": (BOOK, EDGES, 33),
    "sd35_canny": (BOOK, EDGES, 33),
    "train_sd35": (BOOK, EDGES, 3),
}
"""Workflow -> base and controls of the demo that stand for its own, and the number of a scene that no training saw."""
CLIPS = {"svd_short_clip": 3, "svd_long_clip": 9, "wan_pose": 5}
"""Workflow -> number of the scene in which a child of the demo moves from one pose to another."""
DEPTH_CLIPS = {"wan_depth": "boat"}
"""Workflow -> scene along which the camera moves in the sample's clip of depth maps."""
PADDED = {"wan_outpaint": (2, 7)}
"""Workflow -> illustrations that stand for frames of a video; no control draws here, so hints are shown."""
STRENGTHS = (0.0, 0.5, 1.0)
SIDE, GAP, QUALITY = 238, 4, 55


def scaled(column: Column, strength: float) -> Column:
    """Column with its controls at this strength; at 0 without its LoRA too."""
    names = ("edges", "mask", "depth", "pose", "xs")
    strengths = {name: strength * getattr(column, name) for name in names}
    return replace(column, **strengths, lora=column.lora if strength else 0.0)


def shown(hint: Hint, board: Board, column: Column) -> Any:
    """Picture given to the controls of the column."""
    given = column.given(hint)
    return getattr(hint, board.shown) if given is None else given


def drawn(client: ComfyClient, board: Board, column: Column, scene: int) -> list[tuple[str, Any]]:
    """Four parts (text, picture): a hint, and drawings of the demo's model with increasing strength."""
    from PIL import Image

    hint = draw_hint(board, scene)
    columns = tuple(scaled(column, strength) for strength in STRENGTHS)
    words = ("prompt alone", "strength 0.5", "strength 1")
    results = pictures(client, board, {0: hint}, columns)
    return [("hint", Image.fromarray(shown(hint, board, column))), *zip(words, results, strict=True)]


def moving(client: ComfyClient, scene: int) -> list[tuple[str, Any]]:
    """Four parts (text, picture): two frames of a child who moves both arms, each a hint and a result."""
    import numpy as np
    from PIL import Image

    hint, points = draw_hint(CHILDREN, scene), draw_children(SCENE_SEED, scene, CHILDREN.side).people[0]
    moved = points.copy()
    for shoulder, parts, angle in ((2, (3, 4), -50), (5, (6, 7), -50)):
        cosine, sine = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
        turn = np.asarray([[cosine, sine], [-sine, cosine]])
        moved[list(parts)] = (points[list(parts)] - points[shoulder]) @ turn + points[shoulder]
    poses = [draw_sticks([frame], (CHILDREN.side, CHILDREN.side)) for frame in (points, moved)]
    results = [pictures(client, CHILDREN, {0: replace(hint, pose=pose)}, (POSE,))[0] for pose in poses]
    named = zip(("pose, first", "pose, last"), poses, ("first frame", "last frame"), results, strict=True)
    return [part for said, pose, words, result in named for part in ((said, Image.fromarray(pose)), (words, result))]


def along(client: ComfyClient, scene: str) -> list[tuple[str, Any]]:
    """(words, picture) of the four parts: two frames of the sample's clip of depth maps, each a hint and a result."""
    from PIL import Image

    frames = (255 * sample("depth_clip", (BOOK.side, BOOK.side), scene).images).round().astype("uint8")
    named = zip(("first", "last"), (frames[0], frames[len(frames) // 2]), strict=True)
    hint, found = replace(draw_hint(BOOK, 0), caption=draw(*SCENES[scene], BOOK.side).caption), []
    for words, depth in named:
        (result,) = pictures(client, BOOK, {0: replace(hint, depth=depth)}, (DEPTH,))
        found += [(f"depth, {words}", Image.fromarray(depth)), (f"{words} frame", result)]
    return found


def padded(scenes: tuple[int, ...]) -> list[tuple[str, Any]]:
    """Four parts (text, picture): two pictures, each with gray in place of its sides behind it."""
    from PIL import Image

    parts = []
    for scene in scenes:
        image = SCHEMES["picturebook"](SCENE_SEED, scene, SIDE).image
        wide, hint = SIDE // 4, np.full_like(image, round(255 * OUTPAINT_GRAY))
        video = np.full_like(image, 255)
        video[:, wide:-wide] = hint[:, wide:-wide] = image[:, wide:-wide]
        parts += [("video", Image.fromarray(video)), ("to be painted", Image.fromarray(hint))]
    return parts


def enlarged(client: ComfyClient) -> list[tuple[str, Any]]:
    """Four parts (text, picture): small, enlarged by interpolation, one tile drawn, and all tiles merged."""
    from PIL import Image

    workflow = demo_graphs.demo_tiles()
    graph = api_format(workflow, client.object_info())
    nodes = {node["class_type"]: number for number, node in graph.items()}
    kinds = {"small picture": "ControlNeXtSampleInputs", "bicubic": "ImageScaleBy", "a tile": "VAEDecode"}
    parts = {words: nodes[kind] for words, kind in kinds.items()} | {"in tiles": nodes["ControlNeXtMergeTiles"]}
    for words, number in parts.items():
        saver = {"images": [number, 0], "filename_prefix": "ControlNeXt/thumbnail"}
        graph[words] = {"class_type": "SaveImage", "inputs": saver}
    outputs = client.run(graph).outputs
    files = {words: outputs[words]["images"] for words in parts}
    middle = {words: client.image(found[len(found) // 2]) for words, found in files.items()}
    drawn = {words: Image.open(io.BytesIO(content)).convert("RGB") for words, content in middle.items()}
    drawn["small picture"] = drawn["small picture"].resize(drawn["bicubic"].size, Image.Resampling.NEAREST)
    return list(drawn.items())


def pictures(client: ComfyClient, board: Board, hints: dict[int, Hint], columns: tuple[Column, ...]) -> list[Any]:
    """Pictures of the demo's model, row by row."""
    from PIL import Image

    cells = demo_sheet.draw_cells(client, board, hints, columns)
    return [Image.open(io.BytesIO(cells[place])).convert("RGB") for place in sorted(cells)]


def parts_of(client: ComfyClient, name: str) -> list[tuple[str, Any]]:
    """Four parts (text, picture) of a workflow's thumbnail."""
    if name == "demo_tiles":
        return enlarged(client)
    if name in PADDED:
        return padded(PADDED[name])
    if name in DEPTH_CLIPS:
        return along(client, DEPTH_CLIPS[name])
    return moving(client, CLIPS[name]) if name in CLIPS else drawn(client, *SHOWN[name])


def compose(parts: list[tuple[str, Any]]) -> Any:
    """Compose four pictures in a square, each with its text in the corner."""
    from PIL import Image, ImageDraw, ImageFont

    sheet = Image.new("RGB", (2 * SIDE + GAP, 2 * SIDE + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=18)
    for place, (words, picture) in enumerate(parts):
        left, top = (SIDE + GAP) * (place % 2), (SIDE + GAP) * (place // 2)
        sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top))
        box = pen.textbbox((left + 8, top + SIDE - 28), words, font=font)
        pen.rectangle((box[0] - 6, box[1] - 4, box[2] + 6, box[3] + 4), fill="white")
        pen.text((left + 8, top + SIDE - 28), words, fill="black", font=font)
    return sheet


def main(address: str = "127.0.0.1:8188", *names: str) -> None:
    """Draw on the server at `address` and write the pictures."""
    client = ComfyClient(address)
    for workflow in (describe() for describe in WORKFLOWS):
        if names and workflow.name not in names:
            continue
        parts = parts_of(client, workflow.name)
        path = FOLDER / f"{workflow.title}.jpg"
        compose(parts).save(path, "JPEG", quality=QUALITY, optimize=True)
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ComfyError as error:
        sys.exit(str(error))
