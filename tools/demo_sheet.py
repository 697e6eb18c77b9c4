"""`python run.py demo`: drawn hints and the pictures that stock nodes and this pack make of them, with the weights in
`demo/weights`.

The sheet has a part for each board, with one row per hint. Under every picture is the F1 of its edges against the drawn
ones; where a control got another picture than the row's outlines, a small picture in the corner shows it. All hints are
of scenes that were not used in training.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .demo_boards import BOARDS, HINTS, Board, Column, Hint, hints_of
from .demo_weights.shipped import install
from .environment import ROOT

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image as Pictures

    from .comfy_client import ComfyClient

CFG = 3.0
INSET = 4
"""Ratio of a picture's side to that of the inset in its corner."""
OUTPUT = ROOT / "demo_output"
AFTERWARDS = """
Done in {seconds:.0f} s. Open {sheet}
  Each row has one hint and one seed. The second picture is the prompt alone; in the following ones things stand where
  the hint has them, the more the higher the strength. F1 says how well the edges agree with the drawn ones, 1 is
  perfect. A small picture in a corner is what a control was given in place of the row's hint.
Next:
  python run.py comfy   ComfyUI in your browser with these models: Templates, {pack} under Extensions, 'Demo, runs now'
  README.md             controls for SD1.5, SDXL and video, and how to train your own"""
Graph = dict[str, dict[str, Any]]
Link = list[Any]


def png(picture: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


class GraphBuilder:
    """Graph in the API's format; equal nodes are added once."""

    def __init__(self) -> None:
        self.nodes: Graph = {}

    def add(self, kind: str, **inputs: Any) -> str:
        """Id of the node with these inputs, added where it is missing."""
        node = {"class_type": kind, "inputs": inputs}
        for name, known in self.nodes.items():
            if known == node:
                return name
        name = str(len(self.nodes) + 1)
        self.nodes[name] = node
        return name


def workflow(board: Board, hints: Mapping[int, Hint], columns: tuple[Column, ...]) -> Graph:
    """Graph with every cell of a board; SaveImage prefixes are `sheet/ROW_COLUMN`.

    Pictures of hints are those of `uploads`.
    """
    graph = GraphBuilder()
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=board.checkpoint)
    latent = graph.add("EmptyLatentImage", width=board.side, height=board.side, batch_size=1)
    for row, hint in hints.items():
        for place, column in enumerate(columns):
            model, positive, negative = _conditions(graph, board, checkpoint, row, hint.caption, column)
            sampled = graph.add(
                "KSampler",
                model=model,
                positive=positive,
                negative=negative,
                latent_image=[latent, 0],
                seed=board.seed + row,
                steps=board.steps,
                cfg=CFG,
                sampler_name="euler",
                scheduler="normal",
                denoise=1.0,
            )
            decoded = graph.add("VAEDecode", samples=[sampled, 0], vae=[checkpoint, 2])
            graph.add("SaveImage", images=[decoded, 0], filename_prefix=f"sheet/{row}_{place}")
    return graph.nodes


def _conditions(
    graph: GraphBuilder, board: Board, checkpoint: str, row: int, caption: str, column: Column
) -> tuple[Link, Link, Link]:
    """Model, positive and negative conditioning of one cell."""
    model: Link = [checkpoint, 0]
    positive: Link = [graph.add("CLIPTextEncode", clip=[checkpoint, 1], text=caption), 0]
    negative: Link = [graph.add("CLIPTextEncode", clip=[checkpoint, 1], text=""), 0]
    if column.lora:
        lora = graph.add("LoraLoaderModelOnly", model=model, lora_name=board.files["lora"], strength_model=column.lora)
        model = [lora, 0]
    for kind, (strength, picture) in column.inputs().items():
        name = board.files[kind]
        if kind == "xs":
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
    """Files for the host's input folder: name -> PNG."""
    return {f"{row}_{kind}.png": png(getattr(hint, kind)) for row, hint in hints.items() for kind in HINTS}


def scores(hints: Mapping[int, Hint], cells: Mapping[tuple[int, int], bytes]) -> dict[tuple[int, int], float]:
    """Scores of all cells (row, column): F1 of the cell's edges against the row's drawn ones."""
    import numpy as np
    from PIL import Image

    from ..controlnext_core.fidelity import edge_f1

    found = {}
    for (row, place), content in cells.items():
        picture = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.float32) / 255
        found[row, place] = edge_f1(picture, hints[row].edges.astype(np.float32) / 255)
    return found


def compose(
    board: Board,
    hints: Mapping[int, Hint],
    columns: tuple[Column, ...],
    cells: Mapping[tuple[int, int], bytes],
    f1: Mapping[tuple[int, int], float],
    zoom: int = 1,
) -> Pictures.Image:
    """Draw a board's part of the sheet: titles, a row per hint, F1 under every picture, the caption under every row."""
    from PIL import Image, ImageDraw, ImageFont

    cell, gap, title, line = board.side * zoom, 10, 26, 18
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
        sheet.paste(Image.fromarray(getattr(hint, board.shown)).resize((cell, cell)), (gap, top))
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


def stacked(parts: Sequence[tuple[str, Pictures.Image]]) -> Pictures.Image:
    """Sheet of (title, part), stacked vertically."""
    from PIL import Image, ImageDraw, ImageFont

    line, gap = 34, 10
    sheet = Image.new(
        "RGB", (max(part.width for _, part in parts), sum(part.height + line for _, part in parts)), "white"
    )
    pen, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(size=16), 0
    for title, part in parts:
        pen.text((gap, top + gap), title, fill="black", font=font)
        sheet.paste(part, (0, top + line))
        top += line + part.height
    return sheet


def draw_cells(
    server: ComfyClient, board: Board, hints: Mapping[int, Hint], columns: tuple[Column, ...]
) -> dict[tuple[int, int], bytes]:
    """Draw every cell (row, column) as PNG on a running server that has the demo's models."""
    from .comfy_client import Progress

    for name, content in uploads(hints).items():
        server.upload_image(content, name)
    graph = workflow(board, hints, columns)
    progress = Progress(pictures(graph, columns))
    try:
        run = server.run(graph, progress)
    finally:
        progress.end()
    return {place: server.image(entry) for place, entry in _saved(graph, run.outputs)}


def pictures(graph: Graph, columns: tuple[Column, ...]) -> dict[str, str]:
    """Id of each sampler -> description of its picture, from its column."""
    names = {}
    for node in graph.values():
        if node["class_type"] == "SaveImage":
            _, place = node["inputs"]["filename_prefix"].removeprefix("sheet/").split("_")
            sampler = graph[node["inputs"]["images"][0]]["inputs"]["samples"][0]
            names[sampler] = columns[int(place)].words
    return names


def run_demo(host: Path, cpu: bool, output: Path = OUTPUT) -> Path:
    """Queue the sheet in `host`; save its pictures, its graph and the sheet in `output`; returns the sheet's path."""
    from .comfy_server import DEMO_BASE, ComfyServer, device_arguments, fresh_base

    started = time.monotonic()
    base = fresh_base(DEMO_BASE)
    print("Unpacking the demo's models.", flush=True)
    install(base)
    print(f"Starting ComfyUI of {host}.", flush=True)
    arguments = [*device_arguments(cpu), "--disable-api-nodes"]
    output.mkdir(parents=True, exist_ok=True)
    with ComfyServer.start(host, base, arguments=arguments, log=base / "server.log") as server:
        print(f"  {time.monotonic() - started:6.1f} s  it answers at http://{server.address}", flush=True)
        parts = [(board.title, _drawn(server, board, output)) for board in BOARDS]
    sheet = output / "contact_sheet.png"
    stacked(parts).save(sheet)
    print(AFTERWARDS.format(seconds=time.monotonic() - started, sheet=sheet, pack=ROOT.name))
    return sheet


def _drawn(server: ComfyClient, board: Board, output: Path) -> Pictures.Image:
    """Draw a board, save its pictures in `output` and print its F1s; returns its part of the sheet."""
    hints = hints_of(board)
    cells = draw_cells(server, board, hints, board.columns)
    f1 = scores(hints, cells)
    for (row, place), content in cells.items():
        name = f"{board.name}_{row + 1}_{board.columns[place].file_name}.png"
        (output / name).write_bytes(content)
    for place, column in enumerate(board.columns):
        mean = sum(f1[row, place] for row in hints) / len(hints)
        print(f"  edge F1 {mean:.2f}  {column.title}")
    return compose(board, hints, board.columns, cells, f1)


def _saved(graph: Graph, outputs: Mapping[str, Any]) -> Iterator[tuple[tuple[int, int], dict[str, str]]]:
    """Pairs ((row, column), the host's entry for the picture) of every SaveImage node."""
    for name, node in graph.items():
        if node["class_type"] == "SaveImage":
            row, column = node["inputs"]["filename_prefix"].removeprefix("sheet/").split("_")
            yield (int(row), int(column)), outputs[name]["images"][0]
