"""Multiply-adds and launches of a transformer's control, beside those of other controls for the same base.

    python run.py bench transformer_counts [--cases Flux,..]

One picture of 1024 x 1024, batch 1 (CFG 1), published sizes, computed only from shapes. First step: the hint is new and
encoded for one timestep. Run of 20: the part that no timestep changes is spread over 20 steps. Second run: all features
of the hint are cached. Other controls run at every step of every run.
"""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.counting import Count, count  # noqa: E402
from comfyui_controlnext.benchmarks.host_start import begin  # noqa: E402
from comfyui_controlnext.benchmarks.other_controls import OTHERS  # noqa: E402
from comfyui_controlnext.benchmarks.real_transformers import (  # noqa: E402
    PUBLISHED,
    TransformerScene,
    make_control,
)
from comfyui_controlnext.benchmarks.recording import append_table  # noqa: E402

SIDE = 1024
STEPS = 20
HEAD = ("base", "control", "G multiply-adds", "first step", "run of 20", "second run", "launches", "more, second run")


@dataclass(frozen=True)
class Counts:
    """Counts of one forward: bare, with a control whose hint is new, with one whose hint is cached."""

    bare: Count
    first: Count
    second: Count
    once: float
    """Multiply-adds of the first forward that further timesteps of the hint do not repeat."""

    def ratios(self) -> tuple[float, float, float]:
        """Ratios of multiply-adds to the bare ones: first step, a step of a run of 20, a step of a second run."""
        run = self.first.macs - self.once * (STEPS - 1) / STEPS
        return (self.first.macs / self.bare.macs, run / self.bare.macs, self.second.macs / self.bare.macs)


def counts_of(scene: TransformerScene, folder: Path) -> Counts:
    """Count a forward with a ControlNeXt."""
    control = make_control(scene.row, folder, scene.dtype)
    scene.start(control)
    forward = scene.forward(control)
    bare, first = count(scene.forward()), count(forward)
    scene.begin_run(control)
    second = count(forward)
    network, picture = control.net.patcher.model, scene.tensor(3, *scene.size)
    return Counts(bare, first, second, float(scene.frames * count(lambda: network.begin(picture)).macs))


def row_of(name: str, control: str, counts: Counts) -> tuple[str, ...]:
    cells = (f"{ratio:.4f}" for ratio in counts.ratios())
    launches = counts.bare.launches.total()
    more = counts.second.launches.total() - launches
    return (name, control, f"{counts.first.macs / 1e9:,.0f}", *cells, str(launches), str(more))


def rows_of(name: str, folder: Path) -> list[tuple[str, ...]]:
    scene = TransformerScene(PUBLISHED[name], SIDE)
    ours = counts_of(scene, folder)
    bare = ours.bare
    rows = [row_of(name, "bare", Counts(bare, bare, bare, 0.0)), row_of(name, "ControlNeXt", ours)]
    for control, make in OTHERS.get(name, {}).items():
        try:
            other = count(make(scene))
        except (ImportError, AttributeError) as missing:
            print(f"{name}, {control}: left out, this ComfyUI does not have it ({missing})")
            continue
        rows.append(row_of(name, control, Counts(bare, other, other, 0.0)))
    return rows


def main() -> None:
    options = begin(__doc__ or "")
    import comfyui_version

    rows = [row for name in PUBLISHED if options.wants(name) for row in rows_of(name, options.scratch)]
    title = f"{SIDE}x{SIDE}, one row"
    settings = f"ComfyUI {comfyui_version.__version__}; counted, not timed"
    append_table("transformer_counts", title, HEAD, rows, settings, options.json, not options.quick)


if __name__ == "__main__":
    main()
