"""Controls of the demo in figures: every column of every board on scenes that no training saw, on a real server.

    python run.py bench demo_controls                                  # 12 scenes, 20 minutes on two cores
    python run.py bench demo_controls --scenes 4 --cases children      # some, of the board whose name has this word

Depth is a rank correlation and mask an intersection over union, both with what a small network reads from the picture
(tools/demo_weights/reader.py); edge F1 is within 2 pixels, that of dark strokes within 1. The rows `scene` are the true
pictures, and those encoded and decoded by the base's autoencoder, the best that the base can reach.
"""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.recording import append_table  # noqa: E402
from comfyui_controlnext.controlnext_training.drawn import SCHEMES  # noqa: E402
from comfyui_controlnext.tools.comfy_client import ComfyClient  # noqa: E402
from comfyui_controlnext.tools.comfy_server import ComfyServer, device_arguments, fresh_base  # noqa: E402
from comfyui_controlnext.tools.demo_boards import BOARDS, SCENE_SEED, Board  # noqa: E402
from comfyui_controlnext.tools.demo_figures import (  # noqa: E402
    Figures,
    encoded_and_decoded,
    figures_of,
    mean,
    measured,
    share_of_colors,
)
from comfyui_controlnext.tools.demo_weights import shipped  # noqa: E402
from comfyui_controlnext.tools.demo_weights.reader import trained_reader  # noqa: E402
from comfyui_controlnext.tools.environment import ROOT  # noqa: E402

FOLDER = ROOT / ".cache" / "demo_controls"
FIRST, SCENES = 100, 12
"""Number of the first scene, and of scenes."""
HEAD = ("board, column", "edge F1", "standard error", "strokes", "depth", "mask", "colours")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, metavar="PATH", help="the ComfyUI to draw with")
    parser.add_argument("--scenes", type=int, default=SCENES, metavar="N", help="how many are drawn")
    parser.add_argument("--cases", default="", metavar="WORD,..", help="only boards whose name has one of these words")
    parser.add_argument("--folder", type=Path, default=FOLDER, metavar="FOLDER", help="where the server's files are")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    parser.add_argument("--quick", action="store_true", help="two scenes: a look, not a result")
    options = parser.parse_args(arguments)
    options.scenes = min(options.scenes, 2) if options.quick else options.scenes
    if options.scenes < 1:
        parser.error(f"--scenes {options.scenes}: must be 1 or more")
    words = [word for word in options.cases.split(",") if word]
    options.boards = [board for board in BOARDS if not words or any(word in board.name for word in words)]
    if not options.boards:
        names = ", ".join(board.name for board in BOARDS)
        parser.error(f"--cases {options.cases}: no board has such a name. There are: {names}")
    return options


def rows_of(client: ComfyClient, board: Board, scenes: int) -> Iterator[tuple[str, ...]]:
    """Rows of the table for one board."""
    numbers = range(FIRST, FIRST + scenes)
    for column, found in measured(client, board, numbers, board.columns).items():
        yield row(f"{board.name}, {column.title}", found)
    reader, drawings = trained_reader(), [SCHEMES[board.scheme](SCENE_SEED, number, board.side) for number in numbers]
    yield row(f"{board.name}, scene", [figures_of(reader, scene.image, scene) for scene in drawings])
    decoded = encoded_and_decoded(client, board.checkpoint, [scene.image for scene in drawings])
    best = [figures_of(reader, picture, scene) for picture, scene in zip(decoded, drawings, strict=True)]
    yield row(f"{board.name}, scene, encoded and decoded", best)


def row(title: str, found: list[Figures]) -> tuple[str, ...]:
    f1 = [figures.f1 for figures in found]
    error = np.std(f1, ddof=1) / len(f1) ** 0.5 if len(f1) > 1 else float("nan")
    means = [mean(getattr(figures, name) for figures in found) for name in ("strokes", "depth", "mask")]
    return (
        title,
        f"{mean(f1):.3f}",
        f"{error:.3f}",
        *(f"{value:.3f}" for value in means),
        f"{share_of_colors(found):.2f}",
    )


def main() -> None:
    options = parse()
    base = fresh_base(options.folder.resolve())
    shipped.install(base)
    arguments = [*device_arguments(options.cpu), "--disable-api-nodes"]
    rows: list[tuple[str, ...]] = []
    with ComfyServer.start(options.comfyui.resolve(), base, arguments=arguments, log=base / "server.log") as server:
        for board in options.boards:
            rows += rows_of(server, board, options.scenes)
    settings = f"scenes {FIRST} to {FIRST + options.scenes - 1} of seed {SCENE_SEED}"
    append_table("demo_controls", "Controls of the demo", HEAD, rows, settings, keep=not options.quick)


if __name__ == "__main__":
    main()
