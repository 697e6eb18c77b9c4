"""Fixtures of the trainer's tests: small configurations, drawn data, a watcher, and runs on the real host."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from comfyui_controlnext.controlnext_training.config import TrainConfig
from comfyui_controlnext.controlnext_training.drawn import DrawnDataset
from comfyui_controlnext.tests.sampling_fixtures import CELLS, Studio
from torch import Tensor, nn

SIDE = 8 * CELLS
CPU = torch.device("cpu")


def small(**settings: Any) -> TrainConfig:
    """A configuration of few and quick steps in fp32, with nothing kept on disk but its states."""
    quick: dict[str, Any] = {
        "steps": 3,
        "resolution": SIDE,
        "learning_rate": 1e-4,
        "control_learning_rate": 1e-3,
        "precision": "fp32",
        "save_dtype": "fp32",
        "cache": False,
        "log_every": 1,
        "save_every": 1000,
        "validate_every": 0,
        "validation_samples": 2,
        "validation_steps": 2,
    }
    return TrainConfig(**(quick | settings))


def drawn(count: int = 4) -> DrawnDataset:
    return DrawnDataset("synthetic", "edges", count, SIDE)


@dataclass
class Watcher:
    """Remembers what a run told, and asks it to stop before the step `stop_at` (counted from 0)."""

    stop_at: int | None = None
    said: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    pictures: list[Any] = field(default_factory=list)
    curves: list[Any] = field(default_factory=list)
    steps_done: int = 0

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, step: int, steps: int, text: str) -> None:
        self.lines.append(text)
        if text.startswith("step "):
            self.steps_done = step

    def picture(self, image: Any) -> None:
        self.pictures.append(image)

    def curve(self, draw: Any) -> None:
        self.curves.append(draw)

    def stopping(self) -> bool:
        return self.stop_at is not None and self.steps_done >= self.stop_at

    def told(self, text: str) -> bool:
        """True means that something was said that holds this text."""
        return any(text in line for line in self.said)


def base_of(studio: Studio, model: Any = None) -> Any:
    """The studio's checkpoint (or another MODEL with its encoders) as something to train on."""
    from comfyui_controlnext.controlnext_training.base_model.encode import BaseWithEncoders

    return BaseWithEncoders(model or studio.model, studio.vae, studio.clip)


def run_in(folder: Path, base: Any, name: str = "control") -> Any:
    from comfyui_controlnext.controlnext_training.results import RunFiles

    return RunFiles(folder / "runs" / name, folder / "cache", folder / "out" / name, base.identity("model"), "tiny")


def train_in(
    folder: Path, base: Any, config: TrainConfig, watch: Watcher | None = None, data: Any = None, held_out: Any = None
) -> Path:
    """A whole run in `folder`; the trained file."""
    from comfyui_controlnext.controlnext_training.train import train

    run = run_in(folder, base, config.output_name)
    return train(base, data or drawn(), held_out, config, run, watch or Watcher())


@functools.cache
def _kept() -> Any:
    """Encoded samples of all tests: keyed by content, so that each is encoded once."""
    from comfyui_controlnext.controlnext_training.encoded import MemoryCache

    return MemoryCache()


def loop_on(base: Any, config: TrainConfig, data: Any = None, rules: Any = None, group: Any = None) -> Any:
    """Parts that the steps of a run need, without a run around them.

    rules: of an older state; None for today's. group: None for a single process.
    """
    from comfyui_controlnext.controlnext_training.distributed import ProcessGroup
    from comfyui_controlnext.controlnext_training.encoded import Store
    from comfyui_controlnext.controlnext_training.training_run import RULES, make_run

    data = data or drawn()
    store = Store(base, data, config, _kept())
    parts = base, store, list(range(len(data))), config, CPU, group or ProcessGroup(), Watcher()
    return make_run(*parts, rules or RULES)


def take_steps(loop: Any, count: int, first: int = 0) -> list[float]:
    """Steps of the optimizer; their losses."""
    from comfyui_controlnext.controlnext_training.train import gradients, update

    losses = []
    for step in range(first, first + count):
        loss = gradients(loop, step)
        update(loop, step, loss)
        losses.append(float(loss))
    return losses


def gradients_of(loop: Any, step: int = 0) -> dict[str, Tensor]:
    """The gradients of one step, by name; they are gone from the loop afterwards."""
    from comfyui_controlnext.controlnext_training.train import gradients

    gradients(loop, step)
    found = {name: p.grad.clone() for name, p in loop.parameters.items() if p.grad is not None}
    loop.optimizer.zero_grad(set_to_none=True)
    return found


def hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> hash of every bit."""
    return {
        name: hashlib.blake2b(t.detach().contiguous().view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()
        if t.dim()
        else repr(t.item())
        for name, t in tensors.items()
    }


def frozen(module: nn.Module) -> dict[str, Tensor]:
    """Everything in a module that does not train, what trains added to included."""
    return {n: p for n, p in module.named_parameters() if not p.requires_grad} | dict(module.named_buffers())


def host_weights(model: Any) -> dict[str, Tensor]:
    """Weights of the host's UNet, without anybody's patches."""
    return dict(model.model.diffusion_model.state_dict())


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """True means that two sets of tensors are equal in every bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def shaken(parameters: Mapping[str, nn.Parameter], size: float = 0.02, seed: int = 5) -> None:
    """Move every trained tensor by random numbers, as if it had trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def same_nested(one: Any, other: Any) -> bool:
    """True: two values of dicts, lists, tensors and numbers are equal, tensors in every bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype is other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_nested(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_nested, one, other))
    return bool(one == other)
