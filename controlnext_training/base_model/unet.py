"""A trainable copy of the host's network in the dtype of the run, with the MODEL's patches applied.

The MODEL itself, which other workflows share, is only read; where dtype and device are right and there is no patch,
both share memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.lora
import comfy.ops
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher, get_key_weight
from torch import Tensor, nn

from ...controlnext_core.comfy_adapter.files.weights import base_weights
from ...controlnext_core.unet_weights import HOST_PREFIX
from .families import family_of
from .stored import operations

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def training_unet(model: ModelPatcher, dtype: torch.dtype, device: torch.device, narrow: bool = False) -> nn.Module:
    """The network of `model` as the host would sample with it, computing in `dtype`, frozen, on `device`.

    narrow: weights stored in fewer bits than `dtype` stay so and are widened, which is exact, at each use: less memory,
    more time, the same numbers. Weights are copied one at a time and must not be written to.
    Raises ValueError for a model that lacks a weight, or is of no family that can be trained.
    """
    family_of(model)
    source = model.model.diffusion_model
    config = {k: v for k, v in model.model.model_config.unet_config.items() if k not in ("dtype", "device")}
    unet = type(source)(**config, dtype=dtype, device="meta", operations=operations)
    look_up = _weights_of(model)
    with torch.no_grad():
        for name, old in (*unet.named_parameters(), *unet.named_buffers()):
            weight = look_up(HOST_PREFIX + name)
            if weight is None:
                raise ValueError(f"the connected model has no weight '{name}'. Load it from an ordinary checkpoint.")
            weight = _patched(model, HOST_PREFIX + name, weight)
            as_it_is = narrow and weight.dtype.itemsize < dtype.itemsize and _is_cast(unet, name)
            stored = weight.to(device, weight.dtype if as_it_is else dtype)
            _put(unet, name, _ordinary(stored), isinstance(old, nn.Parameter))
    return unet.eval().requires_grad_(False)


def _weights_of(model: ModelPatcher) -> Callable[[str], Tensor | None]:
    """Look up a weight or buffer by its host name, before any patch; None for a name that the model lacks.

    Weights in fp8 without a scale stay in fp8: widening them is exact, and can wait until they are used.
    """
    weights, rest = base_weights(model), dict(model.model.diffusion_model.named_buffers())
    stored = model.get_key_patches(HOST_PREFIX)

    def look_up(name: str) -> Tensor | None:
        if name in stored and _is_plain_fp8(model, name, stored[name][0][0]):
            return stored[name][0][0].detach().cpu()
        found = weights(name)
        return rest.get(name.removeprefix(HOST_PREFIX)) if found is None else found  # not every buffer is stored

    return look_up


def _is_plain_fp8(model: ModelPatcher, name: str, weight: Tensor) -> bool:
    """True: these are the numbers themselves. False: another format, or the layer has a scale for them."""
    _, _, convert = get_key_weight(model.model, name)
    return type(weight.detach()) is Tensor and weight.dtype in FP8 and convert is None


def _patched(model: ModelPatcher, name: str, weight: Tensor) -> Tensor:
    """The weight with the LoRAs and other patches on this MODEL."""
    patches = model.patches.get(name)
    if not patches:
        return weight
    return comfy.lora.calculate_weight(patches, weight.to(torch.float32, copy=True), name)


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor of the same memory that autograd accepts; tensors made in inference mode are not accepted."""
    if not tensor.is_inference():
        return tensor.detach()
    plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _is_cast(unet: nn.Module, name: str) -> bool:
    """True: the layer of this weight casts it to the dtype of its input."""
    return isinstance(unet.get_submodule(name.rpartition(".")[0]), comfy.ops.CastWeightBiasOp)


def _put(root: nn.Module, name: str, tensor: Tensor, is_parameter: bool) -> None:
    path, _, leaf = name.rpartition(".")
    module = root.get_submodule(path)
    if is_parameter:
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        module.register_buffer(leaf, tensor)


def plain_attention(_chosen: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Override of the host's attention function: torch's own, which has a gradient on every device."""
    return attention_pytorch(*args, **kwargs)
