"""Processor time of this pack's code in a forward of a transformer, as a share of the same forward, on a CPU.

    python run.py bench transformer_own [--quick] [--cases Flux,..]

Narrow models of the published kinds, batch 1, a second run: all features of the hint are cached. `own` is the time of a
forward over its time without this pack: an upper bound, as a published model is many times wider and deeper.
"""

from __future__ import annotations

import runpy
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.host_start import Options, begin  # noqa: E402
from comfyui_controlnext.benchmarks.real_transformers import (  # noqa: E402
    PUBLISHED,
    Published,
    TransformerScene,
    make_control,
    sd3,
)
from comfyui_controlnext.benchmarks.recording import append_table, spread  # noqa: E402
from comfyui_controlnext.benchmarks.sampling import WATCH, watching  # noqa: E402

HEAD = ("base", "width", "own, second run", "s/forward")
WIDTH = 384
_FLUX = {"hidden_size": WIDTH, "num_heads": 3, "depth": 4, "depth_single_blocks": 8}
_JOINT = {"dim": WIDTH, "n_layers": 8}
NARROW: dict[str, dict[str, Any]] = {
    "Flux.1": _FLUX,
    "Chroma": _FLUX | {"out_dim": WIDTH},
    "Qwen-Image": {"num_attention_heads": 3, "num_layers": 8},
    "Lumina2": _JOINT | {"n_heads": 4, "n_kv_heads": 2},
    "Z-Image": _JOINT | {"n_heads": 3, "n_kv_heads": 3},
    **dict.fromkeys(
        ("Wan 2.1 1.3B", "Wan 2.1 14B", "Wan 2.2 5B"), {"dim": WIDTH, "ffn_dim": 4 * WIDTH, "num_heads": 3}
    ),
}
"""Published size -> smaller values in its configuration."""


def narrow(name: str) -> Published:
    """Narrow model of that kind; SD3's width and depth are one number."""
    if name == "SD3-medium":
        return sd3(WIDTH // 64)
    row = PUBLISHED[name]
    return replace(row, config=row.config | NARROW[name], width=WIDTH)


def own_of(scene: TransformerScene, control: Any) -> tuple[float, float]:
    """Pair: ratio of a run's first forward to its time without this pack, and its processor time."""
    scene.begin_run(control)
    started, before = time.process_time(), WATCH.own
    scene.forward(control)()
    total = time.process_time() - started
    return total / (total - (WATCH.own - before)), total


def row_of(name: str, options: Options, side: int) -> tuple[str, ...]:
    device = torch.device("cpu")
    scene = TransformerScene(narrow(name), side, torch.float32, device)
    control = make_control(scene.row, options.scratch, torch.float32, device)
    scene.start(control)
    scene.forward(control)()  # encodes the hint
    runs = [own_of(scene, control) for _ in range(options.repeats)]
    return (name, str(WIDTH), spread([own for own, _ in runs]), f"{statistics.median(took for _, took in runs):.2f}")


def main() -> None:
    options = begin(__doc__ or "")
    import comfyui_version

    side = 128 if options.quick else 512
    with watching(), torch.inference_mode():
        rows = [row_of(name, options, side) for name in ("SD3-medium", *NARROW) if options.wants(name)]
    settings = f"ComfyUI {comfyui_version.__version__}; fp32, {options.repeats} repeats, processor time"
    append_table("transformer_own", f"{side}x{side}, one row", HEAD, rows, settings, options.json, not options.quick)


if __name__ == "__main__":
    main()
