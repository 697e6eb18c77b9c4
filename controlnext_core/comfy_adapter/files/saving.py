"""Saving of controls under the host's output folder:

ControlNeXt with its UNet weights, ControlNet-XS in both formats.
"""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...checkpoint import CheckpointError
from ...control_files import DTYPES, check_layout, write_control, write_host_control
from ...file_names import problem_of_prefix
from ...low_rank import summed
from ...metadata import PREFIX
from ...unet_weights import published_names
from ...xs_convert import LAYOUTS, write
from ..bases.table import loaded_base
from ..sampling.next_control import ControlNeXtControl
from ..sampling.xs_control import ControlNetXSControl
from .host_weights import shape_of
from .weights import applied_weights

ADAPTER_FILE = "diffusion_pytorch_model.safetensors"
"""Name of the file that diffusers expects in an adapter's folder."""


def save_control(control: ControlNeXtControl, model: ModelPatcher | None, prefix: str, layout: str, dtype: str) -> Path:
    """Write the control under the host's output folder and read it back. Returns the path of the encoder's file.

    prefix: as in the stock save nodes, may contain sub-folders; layout: `single` (one file, bundled), `published` (a
    folder with controlnet.safetensors and unet.safetensors, the authors' names) or `lora` (a folder with the
    differences as a LoRA). Raises CheckpointError.
    """
    spec = control.net.spec
    check_layout(layout, spec)
    differences = summed((a.differences, a.strength) for a in applied_weights(model)) if model is not None else {}
    facts = {f"{PREFIX}sources": f"encoder: {control.name}"}
    encoder = control.net.patcher.model.state_dict()
    whole = {key: d for key, d in differences.items() if isinstance(key, str) and isinstance(d, Tensor)}
    if model is not None and (spec.on_transformer or layout == "lora" or len(whole) < len(differences)):
        shapes = shape_of(model)
        return write_host_control(free_stem(prefix), encoder, differences, spec, layout, DTYPES[dtype], facts, shapes)
    weights = published_names(whole, loaded_base(model.model).key_map()) if model is not None and whole else {}
    return write_control(free_stem(prefix), encoder, weights, spec, layout, DTYPES[dtype], facts)


def save_xs(control: ControlNetXSControl, prefix: str, layout: str, dtype: str) -> Path:
    """Write a ControlNet-XS and read it back. Returns the path of its weights.

    layout: `single` or `xs_official` (one file, released names), or `xs_diffusers` (a folder for diffusers'
    `ControlNetXSAdapter.from_pretrained`). Raises CheckpointError, ValueError for another layout.
    """
    if layout == "single":
        layout = "xs_official"
    if layout not in LAYOUTS:
        raise ValueError(f"layout: {layout} is for ControlNeXt. Choose {' or '.join(LAYOUTS)} for a ControlNet-XS.")
    loaded, stem = control.loaded, free_stem(prefix)
    tensors = {name: tensor.to("cpu", DTYPES[dtype]) for name, tensor in loaded.net.state_dict().items()}
    path = stem.with_name(f"{stem.name}.safetensors") if layout == "xs_official" else stem / ADAPTER_FILE
    return write(path, tensors, loaded.file.shape, loaded.heads, loaded.norm_rule, layout)


def free_stem(prefix: str) -> Path:
    """Path below the host's output folder, without suffix, at which no file or folder exists yet.

    Raises CheckpointError for a prefix that is not a valid name, or a folder that cannot be made.
    """
    if problem := problem_of_prefix(prefix):
        raise CheckpointError(f"filename_prefix: {problem}")
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    except OSError as error:
        raise CheckpointError(f"filename_prefix: {prefix!r}: the folder cannot be made ({error}).") from error
    while True:
        stem = Path(folder) / f"{name}_{counter:05}_"
        if not stem.exists() and not stem.with_name(f"{stem.name}.safetensors").exists():
            return stem
        counter += 1
