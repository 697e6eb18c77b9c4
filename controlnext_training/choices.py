"""What the settings of a run may be: names read from the tables that know them, and bounds of the numbers."""

from __future__ import annotations

from ..controlnext_core.hints import HINTS
from ..controlnext_core.specs import PAPER_FUSION, SPECS
from .data.samples import PAIRED
from .objective import OBJECTIVES, TIMESTEP_LAWS
from .optimizers import OPTIMIZERS
from .schedules import SCHEDULES

XS = "xs"
"""The variant that trains a ControlNet-XS and not a ControlNeXt."""

AUTO = "auto"

FUSIONS: dict[str, str] = {"released": "released", PAPER_FUSION: PAPER_FUSION, "zero_conv": "none", "add": "none"}
"""Way of joining -> key of `injection.NORMALIZATIONS`. zero_conv adds a convolution that starts at zero."""

LAYOUTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(SPECS, ("single", "published")),
    XS: ("single", "xs_official", "xs_diffusers"),
}
"""Variant -> layouts of its trained file."""

CHOICES: dict[str, tuple[str, ...]] = {
    "variant": (*SPECS, XS),
    "fusion": tuple(FUSIONS),
    "hint": (PAIRED, *HINTS),
    "objective": (AUTO, *OBJECTIVES),
    "timesteps": (AUTO, *TIMESTEP_LAWS),
    "optimizer": tuple(OPTIMIZERS),
    "schedule": tuple(SCHEDULES),
    "precision": (AUTO, "fp32", "bf16", "fp16"),
    "save_dtype": ("fp16", "bf16", "fp32"),
    "layout": tuple(dict.fromkeys(layout for layouts in LAYOUTS.values() for layout in layouts)),
}
"""Key -> the values it may have."""

SUBSETS: dict[str, str] = {
    "none": r"(?!)",
    # the released trainers' rules, over published names: SD1.5 and SVD v1; SDXL; and one for a half of the blocks
    "to_out": r"to_out",
    "attn2_to_out": r"attn2.*to_out",
    "up_to_out": r"up_blocks.*to_out",
    "all": r"",
}
"""Name of a subset -> regular expression searched in the published names of the UNet's tensors."""

BOUNDS: dict[str, tuple[float, float, str]] = {
    "steps": (1, 10_000_000, "a number of steps"),
    "batch_size": (1, 4096, "a number of pictures"),
    "accumulation": (1, 4096, "a number of forward passes"),
    "resolution": (64, 4096, "a side in pixels"),
    "bucket_step": (8, 512, "a number of pixels"),
    "clip_frames": (1, 1024, "a number of frames"),
    "clip_stride": (1, 1024, "a number of frames"),
    "max_samples": (0, 1e12, "a number of pictures"),
    "learning_rate": (0, 10, "a learning rate"),
    "control_learning_rate": (0, 10, "a learning rate"),
    "beta1": (0, 0.9999999, "a decay"),
    "beta2": (0, 0.9999999, "a decay"),
    "weight_decay": (0, 10, "a decay"),
    "adam_eps": (1e-30, 1, "a small number"),
    "max_grad_norm": (0, 1e9, "a length"),
    "warmup_steps": (0, 10_000_000, "a number of steps"),
    "schedule_cycles": (1, 1000, "a number of cycles"),
    "schedule_power": (0, 100, "a power"),
    "ema_decay": (0, 0.9999999, "a decay"),
    "min_snr_gamma": (0, 1e6, "a ratio"),
    "noise_offset": (0, 10, "a standard deviation"),
    "caption_dropout": (0, 1, "a part"),
    "hint_dropout": (0, 1, "a part"),
    "mask_weight": (0, 1e6, "a weight"),
    "seed": (0, 2**64 - 1, "a number"),
    "gain": (0, 1e3, "a gain"),
    "xs_ratio": (1e-3, 1, "a part of the base's widths"),
    "save_every": (1, 10_000_000, "a number of steps"),
    "keep_states": (1, 1000, "a number of states"),
    "log_every": (1, 10_000_000, "a number of steps"),
    "validate_every": (0, 10_000_000, "a number of steps"),
    "validation_samples": (1, 64, "a number of pictures"),
    "validation_steps": (1, 1000, "a number of sampler steps"),
    "validation_cfg": (0, 100, "a guidance"),
}
"""Key -> lowest and highest value, and what it is."""
