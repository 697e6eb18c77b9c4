"""Layers whose frozen weight is stored in another dtype, or on another device, than it is used in.

They cast the weight for the forward pass and again for the backward pass; stored in between, the casts together would
take the memory of a second UNet. The same values go into the same kernels, so results are equal in every bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize

from ...controlnext_core.comfy_adapter.sampling.host_layers import WholeLayers
from ..widened import SCALE, widened


@dataclass(frozen=True, slots=True)
class _Copy:
    """View of a cast weight that autograd has saved."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def copies_not_kept(layer: nn.Module, x: Tensor) -> Iterator[None]:
    """Context in which the layer's product with x does not store its cast weight for the backward pass.

    A trained weight is base + difference: the sum is formed once inside, and freed afterwards.
    """
    if parametrize.is_parametrized(layer):
        with parametrize.cached():
            yield
        return
    weight: Tensor = layer.weight  # type: ignore[assignment]
    scale: Tensor | None = getattr(layer, SCALE, None)
    if scale is None and weight.dtype == x.dtype and weight.device == x.device:
        yield
        return
    mine = x.untyped_storage().data_ptr()

    def pack(tensor: Tensor) -> Tensor | _Copy:
        if tensor.numel() != weight.numel() or tensor.untyped_storage().data_ptr() == mine:
            return tensor
        return _Copy(tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(kept: Tensor | _Copy) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        return widened(weight, scale, x_device, x_dtype).as_strided(kept.size, kept.stride, kept.offset)

    x_device, x_dtype = x.device, x.dtype
    with saved_tensors_hooks(pack, unpack):
        yield


class operations(WholeLayers):  # noqa: N801  # as the host names its own
    """Host's layers that cast their weights; the large ones with `copies_not_kept`."""

    class Linear(WholeLayers.Linear):
        def forward(self, x: Tensor) -> Any:
            with copies_not_kept(self, x):
                scale: Tensor | None = getattr(self, SCALE, None)
                if scale is None or parametrize.is_parametrized(self):
                    return super().forward(x)
                bias = None if self.bias is None else self.bias.to(x.device, x.dtype)
                return F.linear(x, widened(self.weight, scale, x.device, x.dtype), bias)

    class Conv2d(comfy.ops.manual_cast.Conv2d):
        def forward(self, x: Tensor) -> Any:
            with copies_not_kept(self, x):
                return super().forward(x)

    class Conv3d(comfy.ops.manual_cast.Conv3d):
        def forward(self, x: Tensor) -> Any:
            with copies_not_kept(self, x):
                return super().forward(x)
