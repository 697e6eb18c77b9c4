"""Memory and multiply-adds of a control of clips in one latent: 81 frames of 480 x 832, computed from shapes.

    python run.py bench clip_memory

The steps are those of `bench_transformer_counts`. Kept: bytes in the cache for one step of the clip. Wide: peak bytes
while `project` and the standardisation bring the map to the base's channels, with the map itself and the result; by the
formula, `memory.WIDE_TENSORS` and `WIDE_FP32_TENSORS` tensors of that width. Pass: peak bytes of the encoder, by the
formula of docs/video.md, over at least the frames of one latent frame.
"""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

import torch  # noqa: E402
from comfyui_controlnext.benchmarks.bench_transformer_counts import STEPS, counts_of  # noqa: E402
from comfyui_controlnext.benchmarks.bench_video_memory import MIB, Allocations  # noqa: E402
from comfyui_controlnext.benchmarks.host_start import begin  # noqa: E402
from comfyui_controlnext.benchmarks.real_transformers import (  # noqa: E402
    META,
    PUBLISHED,
    TransformerScene,
)
from comfyui_controlnext.benchmarks.recording import append_table  # noqa: E402
from comfyui_controlnext.controlnext_core.families import FAMILIES  # noqa: E402
from comfyui_controlnext.controlnext_core.injection import prepare  # noqa: E402
from comfyui_controlnext.controlnext_core.memory import NUMBERS_PER_PIXEL, rows_at_once, wide_bytes  # noqa: E402
from comfyui_controlnext.controlnext_core.specs import SPECS, config_of  # noqa: E402

CLIP = (81, 480, 832)
WANS = tuple(name for name in PUBLISHED if name.startswith("Wan"))
HEAD = (
    "base",
    "T multiply-adds",
    "first step",
    f"run of {STEPS}",
    "second run",
    "kept, MiB a step",
    "wide, MiB",
    "wide, formula",
    "pass, MiB",
)


@dataclass(frozen=True)
class Memory:
    """Memory of one control for a clip, in bytes."""

    kept: int
    wide: int
    wide_formula: int
    encoder: int


def memory_of(name: str, clip: tuple[int, int, int] = CLIP, dtype: torch.dtype = torch.bfloat16) -> Memory:
    """Memory by the formulas, and by counting the tensors that are created on the meta device."""
    row, (frames, height, width) = PUBLISHED[name], clip
    spec = SPECS[row.variant]
    together = FAMILIES[spec.family].frames or 1
    length = 1 + (frames - 1) // together
    narrow = config_of(spec).stages[-1].out_ch
    cell = FAMILIES[spec.family].cells[spec.fusion.site]
    rows, columns = -(-height // cell), -(-width // cell)
    projection = torch.nn.Conv2d(narrow, row.width, 1, dtype=dtype, device=META).requires_grad_(False)
    kept = torch.empty(1, narrow, length * rows, columns, dtype=dtype, device=META)
    with torch.no_grad(), Allocations([kept, *projection.parameters()]) as allocations:
        prepare(projection(kept), (length * rows, columns), spec.fusion).to(dtype)
    hint = NUMBERS_PER_PIXEL[spec.build] * height * width * dtype.itemsize
    return Memory(
        kept.nbytes,
        allocations.peak,
        length * wide_bytes(spec, row.width, height, width, dtype.itemsize),
        hint * min(frames, together * rows_at_once(together * hint)),
    )


def row_of(name: str, folder: Path) -> tuple[str, ...]:
    counts, memory = counts_of(TransformerScene(PUBLISHED[name], 0, clip=CLIP), folder), memory_of(name)
    ratios = (f"{ratio:.4f}" for ratio in counts.ratios())
    sizes = (f"{size / MIB:.1f}" for size in (memory.kept, memory.wide, memory.wide_formula, memory.encoder))
    return (name, f"{counts.bare.macs / 1e12:,.1f}", *ratios, *sizes)


def main() -> None:
    options = begin(__doc__ or "")
    import comfyui_version

    rows = [row_of(name, options.scratch) for name in WANS if options.wants(name)]
    frames, height, width = CLIP
    title = f"{frames} frames of {height} x {width}, one row, bf16"
    settings = f"ComfyUI {comfyui_version.__version__}; counted, not timed"
    append_table("clip_memory", title, HEAD, rows, settings, options.json, not options.quick)


if __name__ == "__main__":
    main()
