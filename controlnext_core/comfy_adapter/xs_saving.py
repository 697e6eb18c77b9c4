"""Save a ControlNet-XS under the host's output folder, with either set of names."""

from __future__ import annotations

from pathlib import Path

from ..control_files import DTYPES
from ..xs_convert import LAYOUTS, write
from .saving import free_stem
from .xs_control import ControlNetXSControl

ADAPTER_FILE = "diffusion_pytorch_model.safetensors"
"""What diffusers looks for in an adapter's folder."""


def save_xs(control: ControlNetXSControl, prefix: str, layout: str, dtype: str) -> Path:
    """Write the control and re-open it. Returns the path of its weights.

    layout: `single` or `xs_official` (one file, released names), or `xs_diffusers` (a folder that diffusers'
    `ControlNetXSAdapter.from_pretrained` takes). Raises CheckpointError, ValueError for another layout.
    """
    if layout == "single":
        layout = "xs_official"
    if layout not in LAYOUTS:
        raise ValueError(f"layout: {layout} is for ControlNeXt. Choose {' or '.join(LAYOUTS)} for a ControlNet-XS.")
    loaded, stem = control.loaded, free_stem(prefix)
    tensors = {name: tensor.to("cpu", DTYPES[dtype]) for name, tensor in loaded.net.state_dict().items()}
    path = stem.with_name(f"{stem.name}.safetensors") if layout == "xs_official" else stem / ADAPTER_FILE
    return write(path, tensors, loaded.file.shape, loaded.heads, loaded.norm_rule, layout)
