"""Trainable copy of the host's network in the dtype of the run, with the MODEL's patches applied.

The MODEL itself, which other workflows share, is not modified; where dtype and device are right and there is no patch,
both share memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.ops
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...controlnext_core.comfy_adapter.files.weights import base_weights, is_plain, stored_weight
from ...controlnext_core.unet_weights import HOST_PREFIX
from ..widened import SCALE, widened
from .frozen_layers import operations
from .trained_families import family_of

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def training_unet(model: ModelPatcher, dtype: torch.dtype, device: torch.device, narrow: bool = False) -> nn.Module:
    """Copy of the network of `model`, as the host would sample with it, computing in `dtype`, frozen, on `device`.

    narrow: True leaves weights with fewer bits than `dtype` in their format and widens them, which is exact, at each
    use: less memory, more time, the same values; False widens them here. Weights are copied one at a time and must not
    be written to. Raises ValueError for a model that lacks a weight, or is of a family that cannot be trained.
    """
    family_of(model)
    source = model.model.diffusion_model
    config = {k: v for k, v in model.model.model_config.unet_config.items() if k not in ("dtype", "device")}
    unet = type(source)(**config, dtype=dtype, device="meta", operations=operations)
    look_up = _weights_of(model)
    with torch.no_grad():
        for name, old in (*unet.named_parameters(), *unet.named_buffers()):
            found = look_up(HOST_PREFIX + name)
            if found is None:
                raise ValueError(f"the connected model has no weight '{name}'. Load it from an ordinary checkpoint.")
            if model.patches.get(HOST_PREFIX + name):
                found = StoredWeight(_patched(model, HOST_PREFIX + name, found.numbers()))
            if not (narrow and found.tensor.dtype.itemsize < dtype.itemsize and _is_cast(unet, name, found)):
                found = StoredWeight(found.numbers().to(device, dtype))
            _put(unet, name, _ordinary(found.tensor.to(device)), isinstance(old, nn.Parameter))
            if found.scale is not None:
                owner = unet.get_submodule(name.rpartition(".")[0])
                owner.register_buffer(SCALE, _ordinary(found.scale.to(device)), persistent=False)
    return unet.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """Weight in its stored format, or in one that layers compute in."""

    tensor: Tensor
    scale: Tensor | None = None
    """Factor of the stored values; None: no factor."""

    def numbers(self) -> Tensor:
        """Values of the weight, in fp32 where there is a scale."""
        if self.scale is None:
            return self.tensor
        return widened(self.tensor, self.scale, self.tensor.device, torch.float32)


def _weights_of(model: ModelPatcher) -> Callable[[str], StoredWeight | None]:
    """Lookup of a weight or buffer by its host name, before any patch; None for a name that the model lacks.

    Weights of one byte stay in their format where widening them gives, in every bit, the values that the host computes
    with.
    """
    weights, rest = base_weights(model), dict(model.model.diffusion_model.named_buffers())

    def look_up(name: str) -> StoredWeight | None:
        stored = stored_weight(model, name)
        if stored is not None and _is_plain_fp8(*stored):
            return StoredWeight(stored[0].detach().cpu())
        numbers = weights(name)
        if numbers is None:
            buffer = rest.get(name.removeprefix(HOST_PREFIX))  # not every buffer is stored
            return None if buffer is None else StoredWeight(buffer)
        narrow = None if stored is None or is_plain(stored[0]) else _in_a_byte(model, name, stored[0])
        same = narrow is not None and torch.equal(narrow.numbers(), numbers)
        return narrow if same and narrow is not None else StoredWeight(numbers)

    return look_up


def _is_plain_fp8(weight: Tensor, convert: Any) -> bool:
    """True: the stored values are the weight's values in fp8.

    False: another format, or the layer has a scale for them.
    """
    return type(weight.detach()) is Tensor and weight.dtype in FP8 and convert is None


def _in_a_byte(model: ModelPatcher, name: str, weight: Tensor) -> StoredWeight | None:
    """Bytes and scale of a weight in the host's scaled fp8 or int8; None for other formats.

    Relies on the host's layer having `scale_weight`, or on its quantised tensor having `_qdata` and, in `_params` or
    before ComfyUI 0.10 in `_layout_params`, `scale`.
    """
    layer = model.model.get_submodule(name.rpartition(".")[0])
    data = getattr(weight, "_qdata", weight).detach().cpu()
    params = getattr(weight, "_params", None) or getattr(weight, "_layout_params", None)
    of_tensor = params.get("scale") if isinstance(params, dict) else getattr(params, "scale", None)
    scale = getattr(layer, "scale_weight", None) if of_tensor is None else of_tensor
    if data.dtype not in (*FP8, torch.int8) or data.shape != weight.shape or not isinstance(scale, Tensor):
        return None
    scale = scale.detach().cpu().float()
    return StoredWeight(data, scale) if scale.numel() == 1 or scale.shape == (data.shape[0], 1) else None


def _patched(model: ModelPatcher, name: str, weight: Tensor) -> Tensor:
    """Weight with the LoRAs and other patches of this MODEL."""
    patches = model.patches.get(name)
    if not patches:
        return weight
    return comfy.lora.calculate_weight(patches, weight.to(torch.float32, copy=True), name)


def _ordinary(tensor: Tensor) -> Tensor:
    """Tensor on the same memory that autograd accepts; it refuses tensors made in inference mode."""
    if not tensor.is_inference():
        return tensor.detach()
    plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _is_cast(unet: nn.Module, name: str, found: StoredWeight) -> bool:
    """True: the layer of this weight casts it to the dtype of its input. False: it does not."""
    layer = unet.get_submodule(name.rpartition(".")[0])
    kinds = comfy.ops.CastWeightBiasOp if found.scale is None else operations.Linear
    return isinstance(layer, kinds)


def _put(root: nn.Module, name: str, tensor: Tensor, is_parameter: bool) -> None:
    path, _, leaf = name.rpartition(".")
    module = root.get_submodule(path)
    if is_parameter:
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        module.register_buffer(leaf, tensor)


def plain_attention(_chosen: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Attention of torch, in place of the host's: it has a gradient on every device."""
    return attention_pytorch(*args, **kwargs)
