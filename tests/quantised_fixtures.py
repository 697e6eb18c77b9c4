"""Narrow transformers with weights stored in the host's quantised formats, loaded as the host loads such a file."""

from __future__ import annotations

import json
from typing import Any

import torch
from comfyui_controlnext.tests.transformer_fixtures import NARROW, narrow_model
from torch import Tensor

FP8 = torch.float8_e4m3fn
SCALED, PLAIN_FP8 = "scaled_fp8", "fp8_e4m3fn"
WIDE = ("convrot_w4a4", "asym_w4a8_int8")
"""Formats that turn rows in groups of 256."""
UNET = "model.diffusion_model."


def formats(pinned: bool) -> tuple[str, ...]:
    """Quantised formats that this host reads on a CPU."""
    from comfy.ops import QUANT_ALGOS

    return (PLAIN_FP8, *((SCALED,) if pinned else ()), *QUANT_ALGOS)


def quantised_model(family: str, kind: str, pinned: bool) -> Any:
    """The host's BaseModel of a narrow family, every linear layer of its blocks in this format."""
    import comfy.supported_models

    if kind == PLAIN_FP8:
        return narrow_model(family, FP8)
    row = NARROW[family]
    state = narrow_model(family).diffusion_model.state_dict()
    settings = getattr(comfy.supported_models, row.supported)(dict(row.config) | ({} if pinned else row.later))
    return _quantised(settings, state, kind, pinned)


def quantised_unet(layout: str, kind: str, pinned: bool) -> Any:
    """The host's BaseModel of a tiny UNet, every linear layer of its blocks in this format."""
    from comfy.model_detection import model_config_from_unet
    from comfyui_controlnext.tools import tiny_models

    state = {name: tensor.float() for name, tensor in tiny_models.unet_tensors(layout).items()}
    settings = model_config_from_unet({f"{UNET}{name}": tensor for name, tensor in state.items()}, UNET)
    if kind != PLAIN_FP8:
        return _quantised(settings, state, kind, pinned)
    settings.set_inference_dtype(FP8, torch.float32)
    model = settings.get_model({}, "", None)
    model.diffusion_model.eval().requires_grad_(False).load_state_dict(state)
    return model


def _quantised(settings: Any, state: dict[str, Tensor], kind: str, pinned: bool) -> Any:
    names = [name for name, tensor in state.items() if _is_linear(name, tensor, 256 if kind in WIDE else 64)]
    if kind == SCALED:
        settings.scaled_fp8 = FP8
    elif pinned:
        settings.layer_quant_config = {name.removesuffix(".weight"): {"format": kind} for name in names}
    else:
        settings.quant_config = {"mixed_ops": True}
    settings.set_inference_dtype(torch.float32, torch.float32)
    model = settings.get_model({}, "", None)
    network = model.diffusion_model.eval()
    if kind == SCALED:
        names = [f"{name}.weight" for name, layer in network.named_modules() if hasattr(layer, "scale_weight")]
    for name in names:
        state |= _stored(name, state[name], kind, pinned)
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("scale_input") for name in missing), (missing, unexpected)
    network.requires_grad_(False)
    return model


def _is_linear(name: str, tensor: Tensor, multiple: int) -> bool:
    in_a_block = any(part.isdigit() for part in name.split("."))
    return in_a_block and name.endswith(".weight") and tensor.ndim == 2 and not any(s % multiple for s in tensor.shape)


def _stored(name: str, weight: Tensor, kind: str, pinned: bool) -> dict[str, Tensor]:
    """The entries of a file for one weight."""
    from comfy.ops import QUANT_ALGOS, QuantizedTensor

    layer = name.removesuffix(".weight")
    if kind == SCALED:
        scale = weight.abs().max() / torch.finfo(FP8).max
        return {name: (weight / scale).to(FP8), f"{layer}.scale_weight": scale}
    layout = QUANT_ALGOS[kind]["comfy_tensor_layout"]
    if pinned:
        made = QuantizedTensor.from_float(weight, layout, scale=None, dtype=FP8)
        return {name: made._qdata, f"{layer}.weight_scale": made._layout_params["scale"]}
    made = QuantizedTensor.from_float(weight, layout, scale="recalculate")
    found = {"weight_scale": "scale"}
    if kind == "nvfp4":
        found = {"weight_scale": "block_scale", "weight_scale_2": "scale"}
    if kind == "asym_w4a8_int8":
        found = {"weight_s_rel": "scale", "weight_s_channel": "s_channel", "weight_codebook": "codebook"}
    scales = {end: getattr(made._params, field) for end, field in found.items()}
    says = ("convrot", "convrot_groupsize", "group_size", "linear_dtype")
    facts = {"format": kind} | {word: getattr(made._params, word) for word in says if hasattr(made._params, word)}
    tensors = {f"{layer}.{end}": scale for end, scale in scales.items() if scale is not None}
    written = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    return {name: made._qdata, f"{layer}.comfy_quant": written, **tensors}
