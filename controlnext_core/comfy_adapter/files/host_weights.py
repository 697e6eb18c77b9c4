"""Weight differences under the host's names, added to a MODEL: low-rank or full-rank, for weights in any format.

A weight in a plain format gets a patch, as from a LoRA. A quantised weight would be quantised again, and the rounding
would drown a small difference (fp8: a cosine of about 0.6 to the intended result). For such a weight the difference is
added in each forward to the dequantised weight, and the stored weight does not change. The layers of ComfyUI-GGUF do
that with patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor

from ... import checkpoint
from ...detection import BUNDLE_BASE, ControlFile
from ...low_rank import (
    Difference,
    Differences,
    Key,
    LowRank,
    Slice,
    from_lora,
    is_lora,
    name_of,
    read_differences,
    slice_of,
)
from ...metadata import read_metadata
from ...unet_weights import WeightsKind
from .folders import ChosenWeights
from .weights import WEIGHTS_KEY, AppliedWeights, ggml_layer, input_factors, is_plain, stored_weight

LOADED_WHOLE = 16 * 1024
"""Bytes of a layer up to which the host's dynamic patcher loads it at once."""


def host_named(
    model: ModelPatcher, file: ControlFile, chosen: ChosenWeights
) -> tuple[Mapping[str, Tensor], Mapping[str, Slice]] | None:
    """Differences of the chosen file under the host's names, with the slices they apply to; None for published names.

    The differences are bundled with the encoder, in a separate file, or in the host's LoRA form.
    """
    assert chosen.path is not None
    if chosen.bundled:
        return (checkpoint.open_tensors(chosen.path, file.weights), file.metadata.slices) if file.host_names else None
    header = checkpoint.peek(chosen.path)
    if is_lora(header.shapes):
        return from_lora(checkpoint.load(chosen.path), shape_of(model)), {}
    names = {name.removeprefix(BUNDLE_BASE): name for name in header.shapes if name.startswith(BUNDLE_BASE)}
    return (checkpoint.open_tensors(chosen.path, names), read_metadata(header).slices) if names else None


def put_on(
    model: ModelPatcher,
    named: tuple[Mapping[str, Tensor], Mapping[str, Slice]],
    chosen: ChosenWeights,
    weights_kind: str,
    strength: float,
) -> tuple[ModelPatcher, str]:
    """Return (clone of `model` with the differences of `host_named`, a line of the loader's report).

    Raises CheckpointError as `low_rank.read_differences` does, and where weights_kind says full weights.
    """
    source = str(chosen.path)
    if weights_kind == WeightsKind.FULL.value:
        raise checkpoint.CheckpointError(
            f"{source}: holds differences (`base.` names or a LoRA), not full weights. Set weights_kind to auto."
        )
    differences = read_differences(*named, shape_of(model), source)
    ranks = sorted({d.rank for d in differences.values() if isinstance(d, LowRank)})
    kind = f"low rank ({', '.join(map(str, ranks))})" if ranks else "whole differences"
    how = added_how(model, differences)
    report = f"base weights: {chosen.why}; {kind} of {len(differences)} weights, strength {strength:g}{how}"
    return add_host_differences(model, differences, strength, source), report


def shape_of(model: ModelPatcher) -> Callable[[str], torch.Size | None]:
    """Look up the shape of a weight by its host name; None for a name that the model lacks."""
    return lambda name: None if (found := stored_weight(model, name)) is None else found[0].shape


def quantised(model: ModelPatcher, differences: Differences) -> set[str]:
    """Names of the weights with a difference to which a patch would add it before they are quantised again."""
    found = {name: stored_weight(model, name) for name in map(name_of, differences)}
    return {
        name
        for name, stored in found.items()
        if stored is not None and not is_plain(stored[0]) and ggml_layer(model, name) is None
    }


def added_how(model: ModelPatcher, differences: Differences) -> str:
    """End of a line of the report: how differences are added, where that is not by a patch; else empty."""
    return ", added in each forward as the model is quantised" if quantised(model, differences) else ""


def add_host_differences(model: ModelPatcher, differences: Differences, strength: float, source: str) -> ModelPatcher:
    """Clone `model` with strength * differences added to its weights; commutes with LoRA loaders.

    Strength 0 adds nothing. Raises CheckpointError for a name that the model lacks, and for a quantised weight in a
    layer that accepts no weight function.
    """
    patched = model.clone()
    if strength == 0 or not differences:
        return patched
    in_forward = quantised(model, differences)
    in_forward -= {name for name in in_forward if _is_loaded_whole(model, name)}
    patches = {key: _as_patch(d) for key, d in differences.items() if name_of(key) not in in_forward}
    used = patched.add_patches(patches, strength)
    if len(used) != len(patches):
        unknown = sorted({name_of(key) for key in patches if key not in used})
        raise checkpoint.CheckpointError(
            f"{source}: {len(unknown)} weights are not in this model, first {unknown[0]}. Choose a file for this model."
        )
    for key, difference in differences.items():
        if name_of(key) in in_forward:
            own = strength / _scale_of(model, name_of(key), source)
            added = AddedInForward(_for_scaled_input(model, key, difference), slice_of(key), own)
            patched.add_weight_wrapper(name_of(key), added)
    earlier: tuple[AppliedWeights, ...] = patched.get_attachment(WEIGHTS_KEY) or ()
    patched.set_attachments(WEIGHTS_KEY, (*earlier, AppliedWeights(differences, strength, source)))
    return patched


class AddedInForward:
    """Weight function of the host, which is called with a weight right before its use."""

    def __init__(self, difference: Difference, part: Slice | None, strength: float) -> None:
        self.difference, self.part, self.strength = difference, part, strength

    def __call__(self, weight: Tensor) -> Tensor:
        """Return a new tensor, weight + strength * difference, in the weight's dtype.

        Raises TypeError for a weight in fp8, as hosts pass it that multiply in fp8.
        """
        if weight.dtype.itemsize == 1:
            raise TypeError(
                "differences of a control cannot be added to weights that are multiplied in fp8. Start ComfyUI without "
                "--fast fp8_matrix_mult, or load the base in fp16 or bf16."
            )
        changed = weight.clone()
        target = changed if self.part is None else changed.narrow(*self.part)
        if isinstance(self.difference, LowRank):
            up, down = (part.to(weight) for part in (self.difference.up, self.difference.down))
            target.addmm_(up, down, alpha=self.strength)
        else:
            target.add_(self.difference.to(weight), alpha=self.strength)
        return changed

    def move_to(self, device: torch.device | None = None) -> int:
        """Move the difference to a device, called by the host where it loads the weight.

        Returns the number of bytes moved.
        """
        if isinstance(self.difference, LowRank):
            self.difference = LowRank(self.difference.up.to(device), self.difference.down.to(device))
            return self.difference.up.nbytes + self.difference.down.nbytes
        self.difference = self.difference.to(device)
        return self.difference.nbytes


def _scale_of(model: ModelPatcher, name: str, source: str) -> float:
    """Scale of a scaled fp8 layer, which multiplies the stored weight after every weight function; 1 for biases and
    other layers.

    Raises CheckpointError for a layer that takes no weight functions.
    """
    layer = comfy.utils.get_attr(model.model, name.rpartition(".")[0])
    if not hasattr(layer, "weight_function"):
        raise checkpoint.CheckpointError(
            f"{source}: '{name}' of the connected model is quantised in a way that differences cannot be added to "
            f"({type(layer).__qualname__}). Load the base in fp16 or bf16, or set weights_name to none."
        )
    scale = getattr(layer, "scale_weight", None)
    return 1.0 if scale is None or not name.endswith(".weight") else float(scale)


def _is_loaded_whole(model: ModelPatcher, name: str) -> bool:
    """True: the host's dynamic patcher loads this small layer at once, with patches but without weight functions; what
    it then rounds is rounded at random, up or down. False: the layer takes weight functions.
    """
    if not getattr(model, "is_dynamic", bool)():
        return False
    return (
        comfy.model_management.module_size(comfy.utils.get_attr(model.model, name.rpartition(".")[0])) <= LOADED_WHOLE
    )


def _for_scaled_input(model: ModelPatcher, key: Key, difference: Difference) -> Difference:
    """Difference divided by the factors that a layer multiplies its input with; unchanged where it has none."""
    factors = input_factors(model, name_of(key))
    if factors is None:
        return difference
    part = slice_of(key)
    if part is not None and part[0] == 1:
        factors = factors.narrow(0, *part[1:])
    if isinstance(difference, LowRank):
        return LowRank(difference.up, (difference.down.float() / factors).to(difference.down.dtype))
    return (difference.float() / factors).to(difference.dtype)


def _as_patch(difference: Difference) -> Any:
    """Patch for `add_patches`: the two factors stay apart until the host applies it to the weight."""
    if isinstance(difference, LowRank):
        return LoRAAdapter(set(), (difference.up, difference.down, None, None, None, None))
    return (difference,)
