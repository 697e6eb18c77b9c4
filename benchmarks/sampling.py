"""Queue runs with the host's sampler, timed step by step, and the share of the time in this pack's code."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .published_transformers import TRANSFORMERS
from .real_size import UNETS

CFG = {"sd15": 7.0, "sdxl": 7.0, "svd": 2.5, **{name: row.cfg for name, row in TRANSFORMERS.items()}}
KEY = "controlnext_benchmark"
OWN_RANGE = "controlnext: ours"
"""Name of this pack's code in profiles."""


@dataclass
class Setup:
    """Inputs of KSampler for one case. A control is applied to both prompts with the stock Apply node."""

    family: str
    model: Any
    height: int
    width: int
    batch: int = 1
    controls: tuple[Any, ...] = ()
    prompt: int = 0
    hint: int = 0
    """Seeds of the prompt and of the first hint."""
    conds: Any = field(default=None, repr=False)

    def with_controls(self, *controls: Any) -> Setup:
        return replace(self, controls=controls, conds=None)

    def prepare(self) -> Any:
        """Conditionings (positive, negative), made once: ComfyUI keeps the outputs of unchanged nodes."""
        import nodes as host_nodes

        if self.conds is None:
            halves = tuple(conditioning(self.family, self.prompt * 2 + half) for half in range(2))
            frames = self.batch if self.family == "svd" else 1
            for number, control in enumerate(self.controls):
                picture = hint(self.hint + number, self.height, self.width, frames)
                halves = host_nodes.ControlNetApplyAdvanced().apply_controlnet(*halves, control, picture, 1.0, 0.0, 1.0)
            self.conds = halves
        return self.conds


@dataclass(frozen=True)
class Cost:
    """Cost in seconds: wall time, processor time of this process, and the part of the latter in this pack's code."""

    wall: float = 0.0
    cpu: float = 0.0
    own: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu, self.own + other.own)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.wall - other.wall, self.cpu - other.cpu, self.own - other.own)

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.wall * factor, self.cpu * factor, self.own * factor)


@dataclass(frozen=True)
class QueueRun:
    """Costs and result of one queue run."""

    first: Cost
    later: Cost
    """Cost of a later step: the mean over all but the first."""
    latent: Tensor

    def per_step(self, steps: int) -> Cost:
        """Mean cost of a step in a run of `steps` steps."""
        return (self.first + self.later * (steps - 1)) * (1 / steps)


def hint(seed: int, height: int, width: int, count: int = 1) -> Tensor:
    """IMAGE of smooth random shapes: (count, height, width, 3) in [0, 1]."""
    coarse = torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    picture = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return picture.movedim(1, -1).contiguous()


def conditioning(family: str, seed: int) -> Any:
    """Random conditioning in place of an encoded prompt."""
    generator = torch.Generator().manual_seed(seed)
    if family in TRANSFORMERS:
        row = TRANSFORMERS[family].published
        pooled = torch.randn(1, row.pooled, generator=generator) if row.pooled else None
        return [[torch.randn(1, *row.text, generator=generator), {"pooled_output": pooled}]]
    layout = UNETS[family]
    tokens = 1 if family == "svd" else 77
    extra: dict[str, Any] = {}
    if layout.adm_channels is not None:
        extra["pooled_output"] = torch.randn(1, 1280, generator=generator)
    if family == "svd":
        extra |= {"motion_bucket_id": 127, "fps": 6, "augmentation_level": 0.0}
    return [[torch.randn(1, tokens, layout.context_dim, generator=generator), extra]]


class Stopwatch:
    """Stopwatch of the time in functions of this pack during a run; nested calls count once."""

    def __init__(self) -> None:
        self.own, self.depth = 0.0, 0

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.depth:
                return function(*args, **kwargs)
            self.depth, started = 1, time.process_time()
            try:
                with torch.profiler.record_function(OWN_RANGE):
                    return function(*args, **kwargs)
            finally:
                self.depth, self.own = 0, self.own + time.process_time() - started

        return call


WATCH = Stopwatch()


@contextmanager
def watching() -> Iterator[None]:
    """Context with the stopwatch around every function by which the host enters this pack in a step."""
    from ..controlnext_core.comfy_adapter.sampling.host_control import HostControl
    from ..controlnext_core.comfy_adapter.sampling.next_forward import Collector
    from ..controlnext_core.comfy_adapter.sampling.xs_forward import Lockstep, XSJob

    doors: list[tuple[Any, str]] = [(HostControl, "add_to"), (Collector, "_add"), (Lockstep, "__init__")]
    doors += [(Lockstep, name) for name in ("mix_time", "take_time", "encode", "take_base", "decode")]
    before = [(owner, name, getattr(owner, name)) for owner, name in doors]
    make = XSJob.__init__
    try:
        for owner, name, function in before:
            setattr(owner, name, WATCH.watched(function))
        XSJob.__init__ = lambda self, order, start, owner: make(  # type: ignore[method-assign]
            self, order, WATCH.watched(start), owner
        )
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
        XSJob.__init__ = make  # type: ignore[method-assign]


class Timer:
    """CALC_COND_BATCH wrapper that reads the clock at the start of the run, after its first step and at its end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ends: list[Cost] = []
        self.start = Cost()

    def now(self) -> Cost:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return Cost(time.perf_counter(), time.process_time(), WATCH.own)

    def __call__(self, executor: Any, *args: Any) -> Any:
        if not self.ends:
            self.start = self.now()
        result = executor(*args)
        # later steps on a GPU are not synchronised one by one: launching ahead is part of the speed
        self.ends.append(self.now() if not self.ends or self.device.type == "cpu" else Cost())
        return result


def queue(setup: Setup, steps: int, seed: int = 0) -> QueueRun:
    """Run one queue run; time before the first step or after the last one is not counted."""
    import comfy.model_management
    import comfy.sample
    from comfy.patcher_extension import WrappersMP

    positive, negative = setup.prepare()
    timer = Timer(comfy.model_management.get_torch_device())
    model = setup.model.clone()
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, timer)
    latent_format = model.model.latent_format
    frames = (1,) if latent_format.latent_dimensions == 3 else ()
    shape = (setup.batch, latent_format.latent_channels, *frames, setup.height // 8, setup.width // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    sampler = (CFG[setup.family], "euler", "normal", positive, negative, torch.zeros(shape))
    with torch.inference_mode():
        latent = comfy.sample.sample(model, noise, steps, *sampler, disable_pbar=True, seed=seed)
    end = timer.ends[-1] if timer.device.type == "cpu" else timer.now()
    first = timer.ends[0] - timer.start
    later = (end - timer.ends[0]) * (1 / (steps - 1)) if steps > 1 else first  # a run of one step uses it for both
    return QueueRun(first, later, latent)


def forget(setup: Setup) -> None:
    """Drop the cached features of these controls' hints, as before their first run."""
    from ..controlnext_core.comfy_adapter.sampling.features import CACHE

    for control in setup.controls:
        CACHE.drop(control.net.uid if hasattr(control, "net") else control.loaded.uid)
