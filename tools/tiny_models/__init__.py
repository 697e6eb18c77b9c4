"""Tiny but real model files that the host's loaders accept, made from a seed in seconds.

Tiny in depth and width, never in kind. Tests, `python run.py demo` and the benchmarks use them; torch and safetensors
suffice. Every maker has a path and a seed as parameters, writes atomically, and returns the path.
"""

from .checkpoints import (
    make_sd15,
    make_sd15_deep,
    make_sd15_full_unet,
    make_sd15_inpaint,
    make_sdxl,
    make_sdxl_deep,
    make_svd,
    make_svd_deep,
    unet_tensors,
)
from .layouts import LAYOUTS, attention_layers, unet_shapes
from .server_models import make_demo_models
from .tiny_controls import (
    CONTROLNEXT_BUILDS,
    controlnext_shapes,
    make_controlnext,
    make_lora,
    make_stock_controlnet,
    make_unet_difference,
)
from .tiny_sd3 import make_sd3
from .xs import RELEASED_XS, XSSize, make_controlnet_xs, xs_shapes

__all__ = [
    "CONTROLNEXT_BUILDS",
    "LAYOUTS",
    "RELEASED_XS",
    "XSSize",
    "attention_layers",
    "controlnext_shapes",
    "make_controlnet_xs",
    "make_controlnext",
    "make_demo_models",
    "make_lora",
    "make_sd15",
    "make_sd15_deep",
    "make_sd15_full_unet",
    "make_sd15_inpaint",
    "make_sd3",
    "make_sdxl",
    "make_sdxl_deep",
    "make_stock_controlnet",
    "make_svd",
    "make_svd_deep",
    "make_unet_difference",
    "unet_shapes",
    "unet_tensors",
    "xs_shapes",
]
