"""The papers' claims at a small size, on the demo's own base: how soon each way of control is heard, and what it costs.

    python run.py bench convergence                               # all runs, tables and plots: most of an hour
    python run.py bench convergence --parts runs --cases released:0,xs
    python run.py bench convergence --parts report                # tables and plots from the runs that are done

Runs are kept in .cache/convergence and skipped when they are done; docs/evidence.md says what came of them.
"""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks import evidence_runs as runs  # noqa: E402
from comfyui_controlnext.benchmarks import evidence_tables  # noqa: E402
from comfyui_controlnext.benchmarks.evidence_tables import PAGE  # noqa: E402
from comfyui_controlnext.benchmarks.host_start import bring_in  # noqa: E402
from comfyui_controlnext.tools.environment import ROOT, SetupError  # noqa: E402

FOLDER = ROOT / ".cache" / "convergence"
PARTS = ("runs", "pairs", "parameters", "report")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, metavar="PATH", help="the ComfyUI to train in")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="WORD,..", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--cases", default="", metavar="CASE[:SEED],..", help=f"runs, of {', '.join(runs.CASES)}")
    parser.add_argument("--base", type=Path, metavar="FILE", help="checkpoint to train on; default the demo's")
    parser.add_argument("--steps", type=int, default=runs.STEPS, metavar="N", help="of each run")
    parser.add_argument("--batch", type=int, default=runs.BATCH, metavar="N", help="pictures of a step")
    parser.add_argument("--scenes", type=int, default=runs.SCENES, metavar="N", help="how many scenes train")
    parser.add_argument("--looks", type=int, default=runs.LOOKS, metavar="N", help="validations of each run")
    parser.add_argument("--folder", type=Path, default=FOLDER, metavar="FOLDER", help="where the runs are kept")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the CPU; default all")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    parser.add_argument("--quick", action="store_true", help="a few steps: that it runs, not what comes of it")
    options = parser.parse_args(arguments)
    options.parts = tuple(filter(None, options.parts.split(",")))
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"--parts {unknown[0]}: there are {', '.join(PARTS)}")
    return options


def plan_of(options: argparse.Namespace) -> runs.Plan:
    folder = options.folder.resolve() / "quick" if options.quick else options.folder.resolve()
    if options.base is None:
        from comfyui_controlnext.tools.demo_weights.shipped import CHECKPOINT, FOLDERS, install

        options.base = install(folder, (CHECKPOINT,)) / FOLDERS[CHECKPOINT] / CHECKPOINT
    plan = runs.Plan(folder, options.base.resolve(), options.steps, options.batch, options.scenes, looks=options.looks)
    return runs.quick(plan) if options.quick else plan


def train_all(plan: runs.Plan, cases: list[tuple[str, int]]) -> None:
    """Every case, on one loaded base. Ends the process after a Ctrl-C, when the state is saved."""
    from comfyui_controlnext.controlnext_training.base_model.base_files import load_base
    from comfyui_controlnext.controlnext_training.command import Console
    from comfyui_controlnext.controlnext_training.config import TrainConfig
    from comfyui_controlnext.controlnext_training.train import Stopped

    base, console = load_base(TrainConfig(base=str(plan.base)), plan.folder), Console()
    with console.listening():
        for name, seed in cases:
            try:
                result = runs.run_case(name, seed, plan, base, console)
            except Stopped as stopped:
                raise SystemExit(str(stopped)) from stopped
            console.say(_last(name, seed, result))


def _last(name: str, seed: int, result: dict[str, Any]) -> str:
    ends = {figure: list(values.values())[-1] for figure, values in result["figures"].items() if values}
    told = ", ".join(f"{figure} {value:.4f}" for figure, value in ends.items())
    return f"{name}:{seed}: {result['seconds_per_step']:.2f} s per step; {told}"


def main() -> None:
    options = parse()
    cases = list(runs.chosen([word for word in options.cases.split(",") if word]))
    if options.threads:
        torch.set_num_threads(options.threads)
    plan = plan_of(options)
    plan.folder.mkdir(parents=True, exist_ok=True)
    bring_in(options.comfyui.resolve(), options.cpu or not torch.cuda.is_available(), plan.folder)
    keep = not options.quick and plan.folder == FOLDER
    if "runs" in options.parts:
        train_all(plan, cases)
    if "pairs" in options.parts:
        from comfyui_controlnext.benchmarks import evidence_pairs

        evidence_pairs.run(plan.folder, PAGE.parent if keep else None, options.quick)
    if "parameters" in options.parts:
        from comfyui_controlnext.benchmarks import evidence_parameters

        evidence_parameters.write(plan.folder, PAGE, keep)
    if "report" in options.parts:
        for path in evidence_tables.write(plan, PAGE, keep):
            print(path)


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        raise SystemExit(str(error)) from error
