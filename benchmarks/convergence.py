"""Convergence of edges controls on the demo's base of SD3's shape: fusions, ranks and places, step by step.

    python run.py bench convergence                         # half an hour; finished runs are not repeated
    python run.py bench convergence --cases released,add    # cases whose names contain one of these words

Every run has the recipe `picture_edges` at 128 pixels with a constant rate and no average of weights, and differs from
the first case only as its name says. F1 (1 pixel) is that of the edges of pictures with the control against the drawn
ones, over unseen scenes. Two places that the product does not offer are added here, for the run: at the patch embedding
(before block 0), and one map after each of the first four blocks.
"""

from __future__ import annotations

import functools
import json
import runpy
import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.host_start import begin  # noqa: E402
from comfyui_controlnext.benchmarks.recording import append_table, facts, result_path  # noqa: E402
from comfyui_controlnext.controlnext_core.fidelity import METRICS, edge_f1  # noqa: E402
from comfyui_controlnext.tools.demo_weights import shipped  # noqa: E402
from comfyui_controlnext.tools.environment import ROOT  # noqa: E402

FOLDER = ROOT / ".cache" / "convergence"
RECIPE = ROOT / "controlnext_training" / "recipes" / "picture_edges.toml"
STEPS, LOOKS, SCENES, HINTS = 240, 4, 240, 12
COMMON = {
    **{"data": (f"picturebook:edges:{SCENES}:41",), "validation_data": (f"picturebook:edges:{HINTS}:43",)},
    **{"resolution": 128, "rank": 16, "batch_size": 2, "schedule": "constant", "warmup_steps": 20, "ema_decay": 0.0},
    **{"validation_samples": HINTS, "validation_steps": 8, "validation_cfg": 1.0, "save_every": 1000},
}


class Case(NamedTuple):
    """Case: one control. place: (door, number of blocks) of `joined`, None for the product's."""

    title: str
    color: tuple[int, int, int]
    settings: dict[str, Any] = {}  # noqa: RUF012
    place: tuple[Any, int] | None = None


def before_block(options: Any, block: tuple[str, int], add: Any) -> None:
    """Door before a block that the host lets packs replace."""

    def run(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        return extra["original_block"]({**args, "img": add(args["img"], args["transformer_options"])})

    replaced = options.get("patches_replace", {})
    options["patches_replace"] = {**replaced, "dit": {**replaced.get("dit", {}), block: run}}


def joined(own: Any, door: Any, blocks: int) -> Any:
    """Join function of a control in training at the first blocks, with one map of the encoder; own: the product's, at
    block 0.
    """

    def join(self: Any, *given: Any) -> None:
        kept: list[Any] = []

        def encoded_once(*hint: Any) -> Any:
            kept.extend(() if kept else (type(self)._encode(self, *hint),))
            return kept[0]

        self._encode, first = encoded_once, self.place
        for number in range(blocks):
            self.place = replace(first, block=(first.block[0], number), door=door or first.door)
            own(self, *given)
        self.place = first

    return join


CASES = {
    "released": Case("released, rank 16, after block 0", (31, 94, 170)),
    "zero_conv": Case("zero convolution", (214, 92, 20), {"fusion": "zero_conv"}),
    "add": Case("plain addition", (150, 70, 160), {"fusion": "add"}),
    "rank_4": Case("rank 4", (120, 180, 230), {"rank": 4}),
    "full": Case("whole differences", (20, 40, 90), {"rank": 0}),
    "patches": Case("at the patch embedding", (200, 40, 60), place=(before_block, 1)),
    "four": Case("after four blocks", (60, 150, 70), place=(None, 4)),
}


def run_case(name: str, folder: Path, base: Path, steps: int) -> dict[str, Any]:
    """Train one control; returns its figures."""
    from comfyui_controlnext.controlnext_training import journal
    from comfyui_controlnext.controlnext_training.base_model.controls import _NeXt
    from comfyui_controlnext.controlnext_training.command import run_config
    from comfyui_controlnext.controlnext_training.config_files import make_config, read_recipe

    own: dict[str, Any] = {"base": str(base), "output_name": name, "steps": steps, "validate_every": steps // LOOKS}
    own |= dict.fromkeys(("runs_folder", "output_folder"), str(folder))
    config = make_config({**COMMON, **own, **CASES[name].settings}, read_recipe(RECIPE))
    with ExitStack() as stack:
        stack.enter_context(patch.dict(METRICS, paired=functools.partial(edge_f1, tolerance_px=1)))
        if place := CASES[name].place:
            stack.enter_context(patch.object(_NeXt, "join", joined(_NeXt.join, *place)))
        path = run_config(config, folder)
    (trained,) = set(journal.read(folder / name, "dry_run", "trained").values())
    pace = statistics.median(journal.read(folder / name, "step", "seconds_per_step").values())
    figures = {key: journal.read(folder / name, "validation", key) for key in ("fidelity", "fidelity_without", "loss")}
    sizes = {"trained": int(trained), "bytes": path.stat().st_size, "seconds_per_step": pace}
    return {"title": CASES[name].title, "steps": steps, **sizes, **figures, "facts": facts()}


def write(found: Mapping[str, dict[str, Any]], folder: Path) -> None:
    """Print the table of the results, and draw their plot."""
    from comfyui_controlnext.controlnext_training.figure import as_picture, curve_figure
    from comfyui_controlnext.controlnext_training.plots import Names

    lines, rows = [], []
    for name, one in found.items():
        points = [(float(step), float(f1)) for step, f1 in one["fidelity"].items()]
        lines.append((CASES[name].title, points, CASES[name].color))
        ends = (list(one["fidelity_without"].values())[-1], one["trained"] / 1e6, one["bytes"] / 1e6)
        figures = (*(f1 for _, f1 in points), *ends, one["seconds_per_step"])
        rows.append((CASES[name].title, *(f"{value:.2f}" for value in figures)))
    looks = (f"step {step:.0f}" for step, _ in lines[0][1])
    head = ("control", *looks, "strength 0", "trains, M", "file, MB", "s/step")
    append_table("convergence", "Edge F1", head, rows, "fp32", keep=False)
    names, titles = Names("Edge F1 (1 pixel) over the steps", "step", "F1"), [title for title, _, _ in lines]
    plot = as_picture(curve_figure(lines, (0, 0.7), (760, 520), titles, titles, names))
    plot.save(folder / "evidence_transformer.png")


def main() -> None:
    options = begin(__doc__ or "")
    folder = options.scratch if options.quick else options.folder or FOLDER
    base = shipped.install(folder, (shipped.PICTUREBOOK,)) / "checkpoints" / shipped.PICTUREBOOK
    kept = folder / "figures.json"
    found: dict[str, Any] = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
    for name in (name for name in CASES if options.wants(name) and name not in found):
        found[name] = run_case(name, folder, base, LOOKS if options.quick else STEPS)
        kept.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    write({name: found[name] for name in CASES if name in found}, folder)
    if folder == FOLDER:
        result_path("convergence_transformer").with_suffix(".json").write_text(kept.read_text("utf-8"), "utf-8")


if __name__ == "__main__":
    main()
