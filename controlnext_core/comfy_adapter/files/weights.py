"""Weights of a MODEL: as loaded from disk, and the control weights added by this pack's loaders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher, get_key_weight
from torch import Tensor

from ...low_rank import Differences
from ..sampling.cautions import WEIGHTS_KEY

PLAIN_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AppliedWeights:
    """Control weights that one loader added to a MODEL; attached to it for saving."""

    differences: Differences
    strength: float
    source: str


def stored_weight(model: ModelPatcher, name: str) -> tuple[Tensor, Callable[..., Tensor] | None] | None:
    """Weight with a host name, as loaded, before any patch; and the function that dequantises it.

    None for a name that the model lacks; no function for a plain weight. ComfyUI's own list of all weights
    (`get_key_patches`) fails on newer hosts for quantised models, whose state holds scales that no layer has.
    """
    try:
        weight, _, convert = get_key_weight(model.model, name)
    except AttributeError:
        return None
    if name in model.hook_backup:
        weight = model.hook_backup[name][0]
    elif name in model.backup:
        weight = model.backup[name].weight
    return (weight, convert) if isinstance(weight, Tensor) else None


def stored_names(model: ModelPatcher, prefix: str) -> list[str]:
    """Host names of the weights and buffers that begin with `prefix`, sorted; scales without a layer are left out."""
    names = sorted(model.model_state_dict(prefix))
    return [name for name in names if stored_weight(model, name) is not None]


def is_plain(weight: Tensor) -> bool:
    """True: the weight's format is one that layers compute in. False: it is quantised or scaled."""
    return type(weight.detach()) is Tensor and weight.dtype in PLAIN_DTYPES


def ggml_layer(model: ModelPatcher, name: str) -> Any | None:
    """Layer of ComfyUI-GGUF that holds a weight; None: the weight is in another kind of layer, or missing.

    Such a layer adds patches to the dequantised weight in each forward, and calls no weight functions.
    """
    try:
        layer = comfy.utils.get_attr(model.model, name.rpartition(".")[0])
    except AttributeError:
        return None
    return layer if hasattr(layer, "is_ggml_quantized") and hasattr(layer, "get_weight") else None


def _dequantised(layer: Any, weight: Tensor) -> Tensor:
    """Weight of a layer of ComfyUI-GGUF as a plain tensor in fp32 on the CPU, without the patches that it carries."""
    bare: Any = weight.to("cpu", copy=True)
    bare.patches = []
    return layer.get_weight(bare, torch.float32).as_subclass(Tensor)


def input_factors(model: ModelPatcher, name: str) -> Tensor | None:
    """Factors (in,) in fp32 on the CPU with which a quantised layer multiplies its input, for its `.weight`.

    None: it has none. Some nvfp4 files have them, as `pre_quant_scale`.
    """
    layer, _, parameter = name.rpartition(".")
    factors = getattr(comfy.utils.get_attr(model.model, layer), "pre_quant_scale", None)
    return factors.detach().float().cpu() if isinstance(factors, Tensor) and parameter == "weight" else None


def base_weights(model: ModelPatcher) -> Callable[[str], Tensor | None]:
    """Lookup of a base weight by its host name: as loaded, before any patch; None for a name that the model lacks."""

    def look_up(name: str) -> Tensor | None:
        found = stored_weight(model, name)
        if found is None:
            return None
        if (layer := ggml_layer(model, name)) is not None:
            return _dequantised(layer, found[0])
        weight, convert = found[0].detach().cpu(), found[1]
        if is_plain(weight):
            return weight
        weight = weight.to(torch.float32, copy=True)
        weight = weight if convert is None else convert(weight, inplace=True)  # scaled or quantised: as the host has it
        factors = input_factors(model, name)
        return weight if factors is None else weight * factors

    return look_up


def applied_weights(model: ModelPatcher) -> tuple[AppliedWeights, ...]:
    """Control weights that this pack's loaders added to this MODEL."""
    return model.get_attachment(WEIGHTS_KEY) or ()
