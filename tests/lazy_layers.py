"""Layers as hosts make them under their dynamic memory manager: without weights until a file is loaded into them.

A test that uses the fixture `layers` runs twice: on whole layers, and on lazy ones. Where the host knows lazy layers
its own flag is set; elsewhere its Linear and Embedding are made to behave as those of later hosts do. Source: ComfyUI
0.33, comfy/ops.py, `disable_weight_init`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

EITHER_WAY = pytest.mark.usefixtures("layers")
WHOLE_ALONE = pytest.mark.parametrize("layers", ["whole"], indirect=True)
"""For slow tests of a module that is otherwise EITHER_WAY, whose kind others in it cover."""


@pytest.fixture(params=["whole", "lazy"])
def layers(request: pytest.FixtureRequest) -> Iterator[str]:
    """Kind of the host's layers while the test runs: `whole` or `lazy`."""
    with lazy_layers() if request.param == "lazy" else contextlib.nullcontext():
        yield request.param


@contextlib.contextmanager
def lazy_layers() -> Iterator[None]:
    """Inside, the host makes Linear and Embedding without weights, unless their class loads by itself."""
    with pytest.MonkeyPatch.context() as patch:
        if host_is_lazy():
            patch.setattr("comfy.memory_management.aimdo_enabled", True)
            patch.setattr("comfy.utils.load_safetensors", _read)  # the host's own needs the manager's library to run
            if _linear_is_whole():  # 0.22: on Windows alone
                patch.setattr("comfy.model_management.WINDOWS", True)
        else:
            _make_lazy(patch)
        yield


def host_is_lazy() -> bool:
    """True means that this host has lazy layers of its own."""
    try:
        import comfy.memory_management
    except ImportError:  # the pinned host
        return False
    return hasattr(comfy.memory_management, "aimdo_enabled")


def _linear_is_whole() -> bool:
    import comfy.ops

    return comfy.ops.disable_weight_init.Linear(1, 1).weight is not None


def _read(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _make_lazy(patch: pytest.MonkeyPatch) -> None:
    """Give the host's classes the two methods that later hosts give them."""
    import comfy.ops

    ops = comfy.ops.disable_weight_init
    for kind, start, keys in ((ops.Linear, _start_linear, BOTH), (ops.Embedding, _start_embedding, WEIGHT)):
        _make_kind_lazy(patch, kind, start, keys)


WEIGHT, BOTH = ("weight",), ("weight", "bias")


def _make_kind_lazy(patch: pytest.MonkeyPatch, kind: Any, start: Callable[..., None], keys: tuple[str, ...]) -> None:
    whole_init, whole_load = kind.__init__, kind._load_from_state_dict

    def is_lazy(layer: nn.Module) -> bool:
        return type(layer)._load_from_state_dict is kind._load_from_state_dict

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if not is_lazy(self):
            whole_init(self, *args, **kwargs)
            return
        nn.Module.__init__(self)
        start(self, *args, **kwargs)

    def load(self: Any, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if not is_lazy(self):
            whole_load(self, state, prefix, metadata, *rest)
            return
        _, missing, unexpected, _ = rest
        _fill(self, state, prefix, metadata.get("assign_to_params_buffers", False), keys, missing, unexpected)

    patch.setattr(kind, "_load_from_state_dict", load)
    patch.setattr(kind, "__init__", init)


def _start_linear(
    layer: Any, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
) -> None:
    layer.in_features, layer.out_features = in_features, out_features
    layer.weight = layer.bias = None
    layer.if_missing = {"weight": (in_features, out_features)} | ({"bias": (out_features,)} if bias else {})


def _start_embedding(layer: Any, num: int, dim: int, *_: Any, dtype: Any = None, **__: Any) -> None:
    layer.num_embeddings, layer.embedding_dim, layer.padding_idx, layer.max_norm = num, dim, None, None
    layer.norm_type, layer.scale_grad_by_freq, layer.sparse = 2.0, False, False
    layer.weight = nn.Parameter(torch.empty(num, dim, device="meta", dtype=dtype), requires_grad=False)
    layer.bias, layer.if_missing = None, {}


def _fill(
    layer: Any,
    state: dict[str, Tensor],
    prefix: str,
    assign: bool,
    keys: tuple[str, ...],
    missing: list[str],
    unexpected: list[str],
) -> None:
    """Take what the state holds for this layer, of whatever shape, and zeros for what it lacks."""
    for name, tensor in state.items():
        if (key := name[len(prefix) :]) in keys:
            setattr(layer, key, nn.Parameter(tensor if assign else tensor.clone(), requires_grad=False))
        else:
            unexpected.append(name)
    for key, shape in layer.if_missing.items():
        if getattr(layer, key) is None:
            setattr(layer, key, nn.Parameter(torch.zeros(shape), requires_grad=False))
            missing.append(prefix + key)
