"""Counting of one forward of a controlled UNet on torch's `meta` device: multiply-adds, operations and bytes.

Shapes go through the host's UNet and this pack's patches as in a run; no values are computed, so that any size takes
seconds.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .bench_video_memory import Allocations
from .real_size import UNETS
from .sampling import hint

META = torch.device("meta")
SIGMA = 3.0
TIMESTEP = 500
VIEWS = frozenset(
    ("view", "_unsafe_view", "expand", "unsqueeze", "squeeze", "transpose", "t", "permute", "slice", "select", "split")
    + ("chunk", "unbind", "as_strided", "alias", "detach", "_reshape_alias", "empty", "unfold", "split_with_sizes")
)
"""Operations that launch nothing on a GPU."""


class Operations(TorchDispatchMode):
    """Counter of the operations that a GPU would launch, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name not in VIEWS:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Count:
    """Counts of one forward."""

    macs: int
    """Number of multiply-adds."""
    launches: Counter[str]


class Scene:
    """UNet of real size on `meta`, and its forwards with any controls."""

    def __init__(self, family: str, dtype: torch.dtype, height: int, width: int, latents: int = 1) -> None:
        """latents: number of images or frames; each is in both halves of the guidance."""
        from .real_size import make_unet

        self.family, self.dtype, self.size, self.latents = family, dtype, (height, width), latents
        self.model = make_unet(family, dtype, META)

    def forward(self, controls: Sequence[Any] = (), stock: Any = None) -> Callable[[], None]:
        """Function that runs one forward with these controls, or with a stock ControlNet."""
        rows, layout = 2 * self.latents, UNETS[self.family]
        cells = (self.size[0] // 8, self.size[1] // 8)

        def tensor(*shape: int) -> Tensor:
            return torch.zeros(rows, *shape, dtype=self.dtype, device=META)

        x, t = tensor(layout.in_channels, *cells), torch.full((rows,), TIMESTEP, device=META)
        context = tensor(1 if self.family == "svd" else 77, layout.context_dim)
        extra: dict[str, Any] = {}
        if layout.adm_channels is not None:
            extra["y"] = tensor(layout.adm_channels)
        video = {"num_video_frames": self.latents} if layout.temporal else {}
        picture = torch.zeros(rows, 3, *self.size, dtype=self.dtype, device=META)

        def run() -> None:
            options: dict[str, Any] = {"cond_or_uncond": [0, 1]}
            for control in controls:
                control.add_to(options, x[:, :4], SIGMA)
            given = None
            if stock is not None:
                network = stock.control_model
                given = stock.control_merge(
                    network(x=x, hint=picture, timesteps=t, context=context, **extra), None, None
                )
            self.model.model.diffusion_model(
                x, t, context=context, control=given, transformer_options=options, **extra, **video
            )

        return run

    def start(self, controls: Sequence[Any]) -> None:
        """Set the controls' hints and begin a run."""
        from ..controlnext_core.comfy_adapter.sampling.features import CACHE

        model = self.model.model
        for control in controls:
            for patcher in control.get_models():
                patcher.model.to(META, self.dtype)
            frames = self.latents if self.family == "svd" else 1
            control.set_cond_hint(hint(0, 64, 64, 1).movedim(-1, 1).expand(frames, -1, -1, -1))
            control.pre_run(model, model.model_sampling.percent_to_sigma)
        CACHE.clear()


def count(run: Callable[[], None]) -> Count:
    """Count the operations of one call of a forward. On `meta`, attention is counted as matrix products."""
    import comfy.ldm.modules.attention as host_attention

    with torch.no_grad(), attention(host_attention.attention_pytorch):
        with FlopCounterMode(display=False) as flops, Operations() as operations:
            run()
        total, names = flops.get_total_flops() // 2, operations.names
    return Count(total, names)


def once_per_hint(control: Any, scene: Scene, encoding: int) -> float:
    """Multiply-adds of `encoding` a hint for one timestep that further timesteps of the run do not repeat."""
    if not hasattr(control, "net"):
        return float(encoding)  # a ControlNet-XS's hint does not depend on the timestep
    network, frames = control.net.patcher.model, scene.latents if scene.family == "svd" else 1
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        network.begin(torch.zeros(frames, 3, *scene.size, dtype=scene.dtype, device=META))
    return flops.get_total_flops() / 2


@contextmanager
def attention(function: Callable[..., Tensor]) -> Iterator[None]:
    """Context in which the host's networks use this attention: each of their modules has the function under a separate
    name.
    """
    names = ("optimized_attention", "optimized_attention_masked")
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("comfy.ldm.")]
    before = [(module, name, vars(module)[name]) for module in modules for name in names if name in vars(module)]
    try:
        for module, name, _ in before:
            setattr(module, name, function)
        yield
    finally:
        for module, name, old in before:
            setattr(module, name, old)


def peak(run: Callable[[], None], old: Sequence[Tensor]) -> int:
    """Peak bytes in one call of a forward, with attention that needs no table of all pairs.

    old: tensors from before, which are not counted.
    """

    def fused(q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        return torch.empty_like(q)

    with torch.no_grad(), attention(fused), Allocations(old) as allocations:
        run()
    return allocations.peak
