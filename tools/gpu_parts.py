"""Parts of `run.py gpu-day`, by importance: scripts of benchmarks/, and tests. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

PYTEST = "pytest"
TRAINED = ("picturebook_autoencoder.safetensors", "picturebook_mmdit.safetensors")
"""Packed weights that are returned, and from which the next run continues."""
STARTS = ("picturebook_unet_autoencoder.safetensors", *TRAINED)
"""Files of demo/weights from which the training parts start."""
TRANSFORMERS = ("sd3", "flux", "chroma", "qwen_image", "lumina2", "z_image")


@dataclass(frozen=True)
class Part:
    """Part of a day, run in a separate process."""

    name: str
    question: str
    script: str
    """Script of benchmarks/, or PYTEST."""
    arguments: tuple[str, ...] = ()
    seconds: float = 90.0
    """Longest time in seconds."""
    endless: bool = False
    """True: it continues in every run, for all the remaining time. False: it runs once."""


PARTS = (
    Part("machine", "rates of arithmetic, memory, copies and launches", "bench_machine.py", (), 60),
    Part("loads", "every kind of control on fp32, fp16, bf16 and fp8 bases", "bench_loads.py", (), 120),
    Part("loads-dynamic", "the same with the host's dynamic VRAM", "bench_loads.py", ("--dynamic",), 120),
    Part("tests", "cache tiers, out of memory, cancel, free memory, two streams", PYTEST, (), 150),
    Part("step-sd15", "a step with each control, SD1.5 at 512", "bench_step.py", ("--cases", "sd15"), 75),
    Part("step-sdxl", "the same, SDXL at 1024", "bench_step.py", ("--cases", "sdxl"), 120),
    Part("step-svd", "the same, SVD at 14 x 576 x 1024", "bench_step.py", ("--cases", "svd"), 240),
    Part("stacking-sd15", "several controls at once, SD1.5", "bench_stacking.py", ("--cases", "sd15"), 75),
    Part("stacking-sdxl", "the same, SDXL", "bench_stacking.py", ("--cases", "sdxl"), 120),
    *(
        Part(f"step-{name}", f"a step with a control, {name} at 1024", "bench_step.py", ("--cases", name), 90)
        for name in TRANSFORMERS
    ),
    Part("memory", "peaks of the allocator against what the host is told", "bench_memory.py", ("--measured",), 150),
    Part("profile", "launches, waits, share of the fused add", "bench_profile.py", (), 120),
    Part("candidates", "changes that only a GPU can judge", "bench_candidates.py", (), 150),
    Part(
        "train",
        "training steps against a plain loop",
        "bench_train.py",
        ("--all", "--batch", "4", "--dtype", "bf16"),
        300,
    ),
    Part("painter", "the picturebook's autoencoder, trained on", "bench_pictures.py", ("--cases", "painter"), 120),
    Part("picture-base", "the picturebook's base, trained on", "bench_pictures.py", ("--cases", "base"), 3600, True),
)
