"""Candidate: a forward of the base with its ControlNet-XS as one CUDA graph, captured at the first step and replayed
later.

Only the tensor inputs of the UNet may change between steps; a control with its own time embedding changes more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

KEY = "one_graph"
WARM_UP = 2


class Graphed:
    """DIFFUSION_MODEL wrapper that replays the graph.

    On a CPU the forward runs on the same static tensors, without a graph.
    """

    def __init__(self) -> None:
        self.shapes: Any = None
        self.inputs: dict[str, Tensor] = {}
        self.graph: Any = None
        self.output = torch.empty(0)

    def __call__(
        self, executor: Any, x: Tensor, timesteps: Any, context: Any, y: Any, control: Any, options: Any, **kwargs: Any
    ) -> Tensor:
        given = {"x": x, "timesteps": timesteps, "context": context, "y": y}
        given = {name: tensor for name, tensor in given.items() if tensor is not None}
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in given.items()}
        new = shapes != self.shapes
        if new:
            self.shapes, self.inputs, self.graph = shapes, {name: t.clone() for name, t in given.items()}, None
        for name, tensor in given.items():
            self.inputs[name].copy_(tensor)

        def run() -> Tensor:
            inside = self.inputs
            # the options are copied, since a forward writes to them
            return executor(
                inside["x"], inside["timesteps"], inside["context"], inside.get("y"), control, dict(options), **kwargs
            )

        if x.device.type != "cuda":
            return run()
        if self.graph is None:
            self._capture(run)
        self.graph.replay()
        return self.output.clone()

    def _capture(self, run: Any) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = run()


@contextmanager
def one_graph(model: Any) -> Iterator[None]:
    """Context in which this MODEL's forward passes are replayed from a CUDA graph."""
    from comfy.patcher_extension import WrappersMP

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, Graphed())
    try:
        yield
    finally:
        model.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, KEY)
