"""Momentum with orthogonalised steps for matrices (Jordan 2024, "Muon"), and Adam for the rest.

A matrix of several layers side by side (qkv) is split into square parts for the step. The matrix products are computed
in fp32, unlike in torch's implementation.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 4
MATRICES = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")


class Muon:
    """Optimizer that combines both. rate, adam_rate: learning rates, multiplied by `scale` at each step."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        rate: float,
        adam_rate: float,
        matrices: tuple[str, ...] = MATRICES,
    ) -> None:
        """matrices: endings of the names whose steps are made orthogonal."""
        parameters = dict(named)
        self.rate, self.adam_rate = rate, adam_rate
        self.matrices = [value for name, value in parameters.items() if name.endswith(matrices)]
        others = [value for name, value in parameters.items() if not name.endswith(matrices)]
        self.momentum = [torch.zeros_like(value) for value in self.matrices]
        self.adam = torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = self.adam_rate * scale
        self.adam.step()
        for value, momentum in zip(self.matrices, self.momentum, strict=True):
            if value.grad is None:
                continue
            momentum.lerp_(value.grad, 0.05)
            direction = value.grad.lerp(momentum, 0.95)
            flat, toward_all = value.flatten(1), direction.flatten(1)  # of a convolution, its matrix; both are views
            short = min(flat.shape)
            for part, toward in zip(flat.split(short), toward_all.split(short), strict=True):
                part.sub_(orthogonal(toward), alpha=self.rate * scale * max(1.0, part.shape[0] / part.shape[1]) ** 0.5)

    def zero_grad(self) -> None:
        self.adam.zero_grad(set_to_none=True)
        for value in self.matrices:
            value.grad = None

    def state_dict(self) -> dict[str, object]:
        return {"momentum": self.momentum, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        for own, stored in zip(self.momentum, state["momentum"], strict=True):  # type: ignore[call-overload]
            own.copy_(stored)
        self.adam.load_state_dict(state["adam"])  # type: ignore[arg-type]


def orthogonal(matrix: Tensor) -> Tensor:
    """Matrix with singular values near 1, by ROUNDS of a quintic iteration (Newton-Schulz)."""
    a, b, c = COEFFICIENTS
    turned = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    found = turned / (turned.norm() + 1e-12)
    for _ in range(ROUNDS):
        square = found @ found.T
        found = a * found + (b * square + c * square @ square) @ found
    return found.T if matrix.shape[0] > matrix.shape[1] else found
