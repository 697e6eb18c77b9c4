"""`python run.py demo`: drawn hints, and what stock nodes and ours make of them with the weights in `demo/weights`.

One row per hint; columns as COLUMNS. Under every picture stands the F1 of its edges against the drawn ones; where a
control was given something else than the row's outlines, a small picture in the corner shows it. All hints are of
scenes that no training saw.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .demo_weights.shipped import CHECKPOINT, DEPTH, EDGES, LORA, MASK, XS, install
from .environment import ROOT

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image as Pictures

    from .comfy_client import ComfyClient

SIDE, STEPS, CFG, SEED = 128, 14, 3.0, 5
SCENE_SEED, SCENES = 99, (4, 12, 3)
"""Of scenes that no training saw, and which of them."""
INSET = 4
"""Side of a picture, as a multiple of the inset in its corner."""
OUTPUT = ROOT / "demo_output"
AFTERWARDS = """
Done in {seconds:.0f} s. Open {sheet}
  Each row has one drawing and one seed. The second picture is the prompt alone; in the following ones things stand
  where the drawing has them, the more the higher the strength. F1 says how well the edges agree, 1 is perfect. A small
  picture in a corner is what a control was given in place of the outlines.
Next:
  python run.py comfy   ComfyUI in your browser with these models: Templates, {pack} under Extensions, 'Demo, runs now'
  README.md             controls for SD1.5, SDXL and video, and how to train your own"""
Graph = dict[str, dict[str, Any]]
Link = list[Any]


@dataclass(frozen=True)
class Column:
    """One way to use the hint. title: over its pictures; edges, mask, depth, xs: strengths, 0 = not used."""

    title: str
    edges: float = 0.0
    mask: float = 0.0
    depth: float = 0.0
    xs: float = 0.0
    lora: float = 0.0
    split: bool = False
    """The edges show some of the shapes and the mask the others."""

    @property
    def file_name(self) -> str:
        return self.title.lower().replace(" + ", "_and_").replace(" ", "_").replace(".", "_")

    @property
    def words(self) -> str:
        """Controls and strength: "edges and mask, strength 1"."""
        used = {"edges": self.edges, "ControlNet-XS edges": self.xs, "mask": self.mask, "depth": self.depth}
        names = [name for name, strength in used.items() if strength]
        if not names:
            return "without control"
        return f"{' and '.join(names)}, strength {max(used.values()):g}{' and a LoRA' if self.lora else ''}"

    def given(self, hint: Hint) -> np.ndarray | None:
        """Picture that the controls see, (H, W, 3) bytes, if other than the row's outlines; a mask shows in gray."""
        if self.split:
            return hint.some_edges | hint.other_mask // 2
        return hint.depth if self.depth else None


COLUMNS = (
    Column("without control"),
    Column("ControlNeXt 0.5", edges=0.5),
    Column("ControlNeXt 1.0", edges=1.0),
    Column("ControlNet-XS", xs=1.0),
    Column("depth", depth=1.0),
    Column("edges + mask", edges=1.0, mask=1.0, split=True),
    Column("with a LoRA", edges=1.0, lora=1.0),
)


@dataclass(frozen=True)
class Hint:
    """Inputs of a row. Pictures are (H, W, 3) bytes."""

    caption: str
    edges: np.ndarray
    """Outlines of all shapes: what the F1 counts."""
    some_edges: np.ndarray
    """Outlines of one shape."""
    other_mask: np.ndarray
    """The other shapes, white on black."""
    depth: np.ndarray
    """Of all shapes and the floor, bright is near."""


def draw_hint(index: int) -> Hint:
    """The hints of an unseen scene; its shapes are told apart as the connected parts of its mask."""
    import cv2
    import numpy as np

    from ..controlnext_training.synthetic import draw

    scene = draw(SCENE_SEED, index, SIDE)
    _, parts = cv2.connectedComponents((scene.mask > 127).astype(np.uint8))
    near_first = cv2.dilate((parts == 1).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0

    def rgb(plane: np.ndarray) -> np.ndarray:
        return np.repeat(plane[..., None], 3, axis=2)

    return Hint(
        scene.caption,
        scene.hint("edges"),
        rgb(scene.edges * near_first),
        rgb(scene.mask * ~near_first),
        scene.hint("depth"),
    )


def demo_hints() -> dict[int, Hint]:
    """The rows of the sheet."""
    return {row: draw_hint(index) for row, index in enumerate(SCENES)}


def png(picture: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


class _Graph:
    """Nodes in the API's format; equal nodes are made once."""

    def __init__(self) -> None:
        self.nodes: Graph = {}

    def add(self, kind: str, **inputs: Any) -> str:
        """The id of the node with these inputs."""
        node = {"class_type": kind, "inputs": inputs}
        for name, known in self.nodes.items():
            if known == node:
                return name
        name = str(len(self.nodes) + 1)
        self.nodes[name] = node
        return name


def workflow(hints: Mapping[int, Hint], columns: tuple[Column, ...]) -> Graph:
    """Every cell of the sheet; SaveImage prefixes are `sheet/ROW_COLUMN`. Pictures of hints are those of `uploads`."""
    graph = _Graph()
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    latent = graph.add("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1)
    for row, hint in hints.items():
        for place, column in enumerate(columns):
            model, positive, negative = _conditions(graph, checkpoint, row, hint.caption, column)
            sampled = graph.add(
                "KSampler",
                model=model,
                positive=positive,
                negative=negative,
                latent_image=[latent, 0],
                seed=SEED + row,
                steps=STEPS,
                cfg=CFG,
                sampler_name="euler",
                scheduler="normal",
                denoise=1.0,
            )
            decoded = graph.add("VAEDecode", samples=[sampled, 0], vae=[checkpoint, 2])
            graph.add("SaveImage", images=[decoded, 0], filename_prefix=f"sheet/{row}_{place}")
    return graph.nodes


def _conditions(graph: _Graph, checkpoint: str, row: int, caption: str, column: Column) -> tuple[Link, Link, Link]:
    """(model, positive, negative) of one cell."""
    model: Link = [checkpoint, 0]
    positive: Link = [graph.add("CLIPTextEncode", clip=[checkpoint, 1], text=caption), 0]
    negative: Link = [graph.add("CLIPTextEncode", clip=[checkpoint, 1], text=""), 0]
    if column.lora:
        lora = graph.add("LoraLoaderModelOnly", model=model, lora_name=LORA, strength_model=column.lora)
        model = [lora, 0]
    which = "some_edges" if column.split else "edges"
    edges = ((EDGES, column.edges, which), (XS, column.xs, which))
    used = (*edges, (MASK, column.mask, "other_mask"), (DEPTH, column.depth, "depth"))
    for name, strength, picture in used:
        if not strength:
            continue
        if name == XS:
            control: Link = [graph.add("ControlNetXSLoader", control_name=name), 0]
        else:
            loaded = graph.add(
                "ControlNeXtLoader", model=model, control_name=name, weights_name="auto", weights_strength=1.0
            )
            model, control = [loaded, 0], [loaded, 1]
        applied = graph.add(
            "ControlNetApplyAdvanced",
            positive=positive,
            negative=negative,
            control_net=control,
            image=[graph.add("LoadImage", image=f"{row}_{picture}.png"), 0],
            strength=strength,
            start_percent=0.0,
            end_percent=1.0,
        )
        positive, negative = [applied, 0], [applied, 1]
    return model, positive, negative


def uploads(hints: Mapping[int, Hint]) -> dict[str, bytes]:
    """Name in the host's input folder -> PNG."""
    kinds = ("edges", "some_edges", "other_mask", "depth")
    return {f"{row}_{kind}.png": png(getattr(hint, kind)) for row, hint in hints.items() for kind in kinds}


def scores(hints: Mapping[int, Hint], cells: Mapping[tuple[int, int], bytes]) -> dict[tuple[int, int], float]:
    """F1 of each cell's edges (row, column) against its row's drawn ones."""
    import numpy as np
    from PIL import Image

    from ..controlnext_core.fidelity import edge_f1

    found = {}
    for (row, place), content in cells.items():
        picture = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.float32) / 255
        found[row, place] = edge_f1(picture, hints[row].edges.astype(np.float32) / 255)
    return found


def compose(
    hints: Mapping[int, Hint],
    columns: tuple[Column, ...],
    cells: Mapping[tuple[int, int], bytes],
    f1: Mapping[tuple[int, int], float],
    zoom: int = 1,
) -> Pictures.Image:
    """The sheet: titles, a row per hint, F1 under every picture, the caption under every row."""
    from PIL import Image, ImageDraw, ImageFont

    cell, gap, title, line = SIDE * zoom, 10, 26, 18
    inset = cell // INSET
    font, small = ImageFont.load_default(size=13), ImageFont.load_default(size=12)
    width = (cell + gap) * (len(columns) + 1) + gap
    height = title + len(hints) * (cell + 2 * line + gap)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for place, text in enumerate(("hint", *(column.title for column in columns))):
        draw.text((gap + place * (cell + gap), 6), text, fill="black", font=font)
    for number, (row, hint) in enumerate(hints.items()):
        top = title + number * (cell + 2 * line + gap)
        sheet.paste(Image.fromarray(hint.edges).resize((cell, cell)), (gap, top))
        draw.text((gap, top + cell + line), hint.caption, fill="black", font=small)
        for place, column in enumerate(columns):
            left = gap + (place + 1) * (cell + gap)
            picture = Image.open(io.BytesIO(cells[row, place])).convert("RGB").resize((cell, cell))
            sheet.paste(picture, (left, top))
            given = column.given(hint)
            if given is not None:
                corner = (left + cell - inset, top + cell - inset)
                draw.rectangle((corner[0] - 1, corner[1] - 1, left + cell - 1, top + cell - 1), fill="white")
                sheet.paste(Image.fromarray(given).resize((inset, inset)), corner)
            draw.text((left, top + cell + 2), f"F1 {f1[row, place]:.2f}", fill="black", font=small)
    return sheet


def draw_cells(
    server: ComfyClient, hints: Mapping[int, Hint], columns: tuple[Column, ...]
) -> dict[tuple[int, int], bytes]:
    """PNG of every cell (row, column), drawn by a running server that has the demo's models."""
    from .comfy_client import Progress

    for name, content in uploads(hints).items():
        server.upload_image(content, name)
    graph = workflow(hints, columns)
    progress = Progress(pictures(graph, columns))
    try:
        run = server.run(graph, progress)
    finally:
        progress.end()
    return {place: server.image(entry) for place, entry in _saved(graph, run.outputs)}


def pictures(graph: Graph, columns: tuple[Column, ...]) -> dict[str, str]:
    """Id of each sampler -> what its picture shows, as words of a column."""
    names = {}
    for node in graph.values():
        if node["class_type"] == "SaveImage":
            _, place = node["inputs"]["filename_prefix"].removeprefix("sheet/").split("_")
            sampler = graph[node["inputs"]["images"][0]]["inputs"]["samples"][0]
            names[sampler] = columns[int(place)].words
    return names


def run_demo(host: Path, cpu: bool, output: Path = OUTPUT) -> Path:
    """Queue the sheet in `host`; save its pictures, its graph and the sheet in `output`; return the sheet's path."""
    from .comfy_server import DEMO_BASE, ComfyServer, device_arguments, fresh_base

    started = time.monotonic()
    base = fresh_base(DEMO_BASE)
    print("Unpacking the demo's models.", flush=True)
    install(base)
    hints = demo_hints()
    print(f"Starting ComfyUI of {host}.", flush=True)
    arguments = [*device_arguments(cpu), "--disable-api-nodes"]
    with ComfyServer.start(host, base, arguments=arguments, log=base / "server.log") as server:
        print(f"  {time.monotonic() - started:6.1f} s  it answers at http://{server.address}", flush=True)
        cells = draw_cells(server, hints, COLUMNS)
    f1 = scores(hints, cells)
    output.mkdir(parents=True, exist_ok=True)
    for (row, place), content in cells.items():
        (output / f"{row + 1}_{COLUMNS[place].file_name}.png").write_bytes(content)
    sheet = output / "contact_sheet.png"
    compose(hints, COLUMNS, cells, f1).save(sheet)
    for place, column in enumerate(COLUMNS):
        mean = sum(f1[row, place] for row in hints) / len(hints)
        print(f"  edge F1 {mean:.2f}  {column.title}")
    print(AFTERWARDS.format(seconds=time.monotonic() - started, sheet=sheet, pack=ROOT.name))
    return sheet


def _saved(graph: Graph, outputs: Mapping[str, Any]) -> Iterator[tuple[tuple[int, int], dict[str, str]]]:
    """((row, column), what the host says of the picture) of every SaveImage node."""
    for name, node in graph.items():
        if node["class_type"] == "SaveImage":
            row, column = node["inputs"]["filename_prefix"].removeprefix("sheet/").split("_")
            yield (int(row), int(column)), outputs[name]["images"][0]
