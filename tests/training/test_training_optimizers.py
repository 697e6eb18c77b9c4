"""Optimizers, schedules, the moving average and their saved states."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.controlnext_training import state
from comfyui_controlnext.controlnext_training.averaging import Ema
from comfyui_controlnext.controlnext_training.config import TrainConfig
from comfyui_controlnext.controlnext_training.optimizers import (
    OPTIMIZERS,
    MissingOptimizerError,
    build,
    weights_to_read,
)
from comfyui_controlnext.controlnext_training.schedules import SCHEDULES, Schedule
from torch import Tensor, nn

NUMBERS: dict[str, Any] = {"betas": (0.8, 0.95), "weight_decay": 0.03, "eps": 1e-7}
SIZES = [(3, 5), (64, 80), (), (7,)]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator)) for size in SIZES]


def groups(of: list[nn.Parameter], rates: tuple[float, float] = (1e-3, 1e-2)) -> list[dict[str, Any]]:
    return [{"params": of[:2], "lr": rates[0], "name": "unet"}, {"params": of[2:], "lr": rates[1], "name": "control"}]


def run(optimizer: torch.optim.Optimizer, of: list[nn.Parameter], steps: range) -> None:
    """Run steps on gradients that depend on the step and the weights."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in of:
            p.grad = torch.randn(p.shape, generator=generator) + p.detach()
        optimizer.step()


@pytest.fixture(params=OPTIMIZERS)
def name(request: pytest.FixtureRequest) -> str:
    """Name of each optimizer whose package is installed."""
    pytest.importorskip(OPTIMIZERS[request.param].package.split(".")[0], reason="an optional package")
    return request.param


@pytest.mark.parametrize("fused", [False, True], ids=["a kernel a tensor", "fused"])
def test_adamw_is_torchs_with_the_configured_numbers(fused: bool) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = build("adamw", groups(ours), **NUMBERS, fused=fused)
    reference = torch.optim.AdamW(groups(theirs), betas=(0.8, 0.95), eps=1e-7, weight_decay=0.03, fused=fused or None)
    run(optimizer, ours, range(5))
    run(reference, theirs, range(5))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2]
    assert [group["name"] for group in optimizer.param_groups] == ["unet", "control"]
    assert [group["fused"] for group in optimizer.param_groups] == [fused or None] * 2


def test_every_optimizer_lowers_a_loss(name: str) -> None:
    p = nn.Parameter(torch.linspace(-2, 2, 8192).view(64, 128))
    optimizer = build(
        name,
        [{"params": [p], "lr": 1.0 if OPTIMIZERS[name].own_rate else 0.05}],
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.01,
    )
    for _ in range(150):
        optimizer.zero_grad()
        p.square().mean().backward()
        optimizer.step()
    with weights_to_read(optimizer):
        assert float(p.detach().square().mean()) < 0.4, "it started at 1.33"


def test_a_state_that_was_saved_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    rates = (1.0, 1.0) if OPTIMIZERS[name].own_rate else (1e-3, 1e-2)
    straight, first = parameters(), parameters()
    optimizer = build(name, groups(straight, rates), **NUMBERS)
    run(optimizer, straight, range(8))

    stopped = build(name, groups(first, rates), **NUMBERS)
    run(stopped, first, range(4))
    state.save(tmp_path, 4, {}, stopped.state_dict(), {}, 1)
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = build(name, groups(second, rates), **NUMBERS)
    saved = state.latest(tmp_path)
    assert saved is not None
    resumed.load_state_dict(saved.optimizer())
    run(resumed, second, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(straight, second, strict=True))
    assert same(resumed.state_dict(), optimizer.state_dict())


def test_reading_the_weights_leaves_the_training_as_it_was(name: str) -> None:
    rates = (1.0, 1.0) if OPTIMIZERS[name].own_rate else (1e-3, 1e-2)
    seen, unseen = parameters(), parameters()
    looked, did_not = build(name, groups(seen, rates), **NUMBERS), build(name, groups(unseen, rates), **NUMBERS)
    for step in range(6):
        run(looked, seen, range(step, step + 1))
        run(did_not, unseen, range(step, step + 1))
        with pytest.raises(KeyError), weights_to_read(looked):
            raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(seen, unseen, strict=True))
    with weights_to_read(looked):
        moved = any(not torch.equal(a, b) for a, b in zip(seen, unseen, strict=True))
        assert moved == (name == "schedulefree")


class Averaging(torch.optim.SGD):
    """Stand-in for a schedule-free optimizer where none is installed: its weights to read are others."""

    def eval(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.data = p.data / 3

    def train(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.data = p.data * 3


def test_a_way_back_that_rounds_is_not_taken() -> None:
    p = nn.Parameter(torch.linspace(0.1, 1, 1000))
    before = p.detach().clone()
    optimizer = Averaging([p], lr=1.0)
    with weights_to_read(optimizer):
        assert torch.equal(p, before / 3)
    assert torch.equal(p, before) and not torch.equal(before / 3 * 3, before)


@pytest.mark.parametrize("missing", ["adamw8bit", "prodigy", "schedulefree"])
def test_an_optimizer_that_is_not_installed_is_named_with_its_package(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedulefree": "schedulefree"}[missing]
    monkeypatch.setitem(__import__("sys").modules, package, None)
    monkeypatch.setitem(__import__("sys").modules, OPTIMIZERS[missing].package, None)
    with pytest.raises(MissingOptimizerError, match=f"{missing} needs the package {package}.*pip install -U {package}"):
        build(missing, groups(parameters(), (1.0, 1.0)), **NUMBERS)


def test_prodigy_refuses_two_learning_rates() -> None:
    with pytest.raises(ValueError, match="learning_rate and control_learning_rate are 1e-05 and 0.0001. Set both to 1"):
        build("prodigy", groups(parameters(), (1e-5, 1e-4)), **NUMBERS)


NESTED = {
    "state": {0: {"step": 3, "moment": torch.arange(6.0).view(2, 3), "deep": [{"t": torch.tensor(1)}, ()]}, 7: {}},
    "numbers": [1, -0.0, 1e-45, 0.1, math.inf, -math.inf, True, None, 2**70, "text"],
    ("a", 1): (1, (2.5, [torch.zeros(0, 4, dtype=torch.uint8)])),
    "tensor": {"tensor": "t0", "tuple": "x"},
    "half": torch.ones(3, dtype=torch.bfloat16),
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype is b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b and repr(a) == repr(b)


@pytest.mark.parametrize("old", [False, True], ids=["in today's form", "as version 0.1.0 saved it"])
def test_any_nested_state_comes_back_as_it_was(tmp_path: Path, old: bool) -> None:
    folder = state.save(tmp_path, 1, {}, NESTED, {}, 1)
    if old:
        tensors, rest = packed(NESTED)
        checkpoint.save(folder / "optimizer.safetensors", tensors, {})
        (folder / state.OPTIMIZER).unlink()
        size = (folder / "optimizer.safetensors").stat().st_size
        facts = {"step": 1, "parts": {"optimizer": size}, "optimizer": rest}
        (folder / state.FACTS).write_text(json.dumps(facts, allow_nan=False), "utf-8")
    saved = state.latest(tmp_path)
    assert saved is not None and same(saved.optimizer(), NESTED)


def test_a_state_whose_optimizer_was_damaged_is_not_taken_and_weights_are_never_executed(tmp_path: Path) -> None:
    first = state.save(tmp_path, 1, {}, NESTED, {}, 2)
    second = state.save(tmp_path, 2, {}, NESTED, {}, 2)
    whole = (second / state.OPTIMIZER).read_bytes()
    (second / state.OPTIMIZER).write_bytes(whole[:-1])
    assert state.latest(tmp_path).folder == first  # type: ignore[union-attr]
    executing = io.BytesIO()
    torch.save({"state": Path("x")}, executing)
    for content in (b"x" * len(whole), pickle.dumps(print, 2), executing.getvalue()):
        (second / state.OPTIMIZER).write_bytes(content)
        with pytest.raises(checkpoint.CheckpointError, match="optimizer.pt: cannot be read"):
            state.State(second, {"parts": {}}).optimizer()


def packed(value: Any) -> tuple[dict[str, Tensor], Any]:
    """Tensors and JSON of an optimizer's state, in the form of version 0.1.0."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[f"t{len(tensors)}"] = value.contiguous()
            return {"tensor": f"t{len(tensors) - 1}"}
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, tuple):
            return {"tuple": [walk(item) for item in value]}
        if isinstance(value, list):
            return [walk(item) for item in value]
        if isinstance(value, dict):
            return {"dict": [[walk(key), walk(item)] for key, item in value.items()]}
        return value

    return tensors, walk(value)


def learning_rates(scheduler_of: Callable[[torch.optim.Optimizer], Any], steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = scheduler_of(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def config(schedule: str, steps: int = 60, warmup: int = 0, cycles: int = 1, power: float = 1.0) -> Schedule:
    return TrainConfig(
        schedule=schedule, steps=steps, warmup_steps=warmup, schedule_cycles=cycles, schedule_power=power
    ).learning_rate_schedule


def factors(of: Schedule) -> list[float]:
    return [of.factor(step) for step in range(of.steps)]


TORCHS = {
    "constant": (config("constant"), lambda o, s: s.LambdaLR(o, lambda step: 1.0)),
    "linear": (config("linear"), lambda o, s: s.LinearLR(o, 1.0, 0.0, total_iters=60)),
    "cosine": (config("cosine"), lambda o, s: s.CosineAnnealingLR(o, T_max=60)),
    "cosine_restarts": (config("cosine_restarts", cycles=3), lambda o, s: s.CosineAnnealingWarmRestarts(o, 20)),
    "polynomial": (config("polynomial", power=2.5), lambda o, s: s.PolynomialLR(o, total_iters=60, power=2.5)),
    "piecewise": (config("piecewise", cycles=4), lambda o, s: s.StepLR(o, step_size=15, gamma=0.1)),
}


@pytest.mark.parametrize("name_of_schedule", SCHEDULES)
def test_a_schedule_is_torchs_of_its_kind(name_of_schedule: str) -> None:
    ours, theirs = TORCHS[name_of_schedule]
    expected = learning_rates(lambda o: theirs(o, torch.optim.lr_scheduler), 60)
    assert factors(ours) == pytest.approx(expected, abs=1e-9)


DIFFUSERS = {
    "constant": lambda o, d, w: d.get_constant_schedule_with_warmup(o, w),
    "linear": lambda o, d, w: d.get_linear_schedule_with_warmup(o, w, 60),
    "cosine": lambda o, d, w: d.get_cosine_schedule_with_warmup(o, w, 60),
    "cosine_restarts": lambda o, d, w: d.get_cosine_with_hard_restarts_schedule_with_warmup(o, w, 60, 3),
    "polynomial": lambda o, d, w: d.get_polynomial_decay_schedule_with_warmup(o, w, 60, lr_end=0.0, power=2.0),
}


@pytest.mark.parametrize("warmup", [0, 1, 13, 59])
@pytest.mark.parametrize("name_of_schedule", DIFFUSERS)
def test_warm_up_is_that_of_the_authors_trainers(name_of_schedule: str, warmup: int) -> None:
    from diffusers import optimization

    expected = learning_rates(lambda o: DIFFUSERS[name_of_schedule](o, optimization, warmup), 60)
    assert factors(config(name_of_schedule, 60, warmup, cycles=3, power=2.0)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name_of_schedule", SCHEDULES)
def test_a_factor_depends_on_the_step_alone_and_stays_between_0_and_1(name_of_schedule: str) -> None:
    of = config(name_of_schedule, 50, 7, cycles=3, power=0.5)
    forwards = factors(of)
    assert [of.factor(step) for step in reversed(range(50))] == forwards[::-1]
    assert all(0 <= value <= 1 for value in [*forwards, of.factor(50), of.factor(1000)])
    assert forwards[0] == 0 and forwards[7] == 1
    assert config(name_of_schedule, 1).factor(0) == 1
    assert config(name_of_schedule, 5, warmup=9).factor(4) == pytest.approx(4 / 9)


def named() -> dict[str, Tensor]:
    return {f"p{i}": p for i, p in enumerate(parameters())}


def moved(weights: dict[str, Tensor], step: int) -> None:
    for i, p in enumerate(weights.values()):
        p.detach().add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_the_average_is_the_written_out_sum(decay: float) -> None:
    weights = named()
    ema = Ema(weights, decay)
    expected = {name: p.detach().double() for name, p in weights.items()}
    for step in range(30):
        moved(weights, step)
        ema.update(weights)
        keep = min(decay, (1 + step) / (10 + step))
        expected = {name: keep * expected[name] + (1 - keep) * p.detach().double() for name, p in weights.items()}
    assert all(torch.allclose(ema.average[name].double(), expected[name], atol=1e-5) for name in weights)


def test_an_average_goes_on_bit_for_bit_from_its_state(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = named()
    ema = Ema(weights, 0.99)
    for step in range(5):
        moved(weights, step)
        ema.update(weights)
    save_file(ema.state_dict(), tmp_path / "ema.safetensors")
    resumed = Ema(named(), 0.99)
    resumed.load_state_dict(load_file(tmp_path / "ema.safetensors"))
    for step in range(5, 9):
        moved(weights, step)
        ema.update(weights)
        resumed.update(weights)
    assert resumed.updates == 9
    assert all(torch.equal(a, b) for a, b in zip(ema.state_dict().values(), resumed.state_dict().values(), strict=True))


def test_an_average_of_other_weights_is_refused() -> None:
    ema = Ema(named(), 0.9)
    before = copy.deepcopy(ema.average)
    for wrong in ({}, {**ema.state_dict(), "more": torch.zeros(1)}, {**ema.state_dict(), "p0": torch.zeros(2)}):
        with pytest.raises(ValueError, match="of other weights than those that train now"):
            ema.load_state_dict(wrong)
    assert all(torch.equal(before[name], ema.average[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swapping_shows_the_averages_and_gives_the_own_weights_back(dtype: torch.dtype) -> None:
    weights = {name: nn.Parameter(p.detach().to(dtype)) for name, p in named().items()}
    ema = Ema(weights, 0.5)
    moved(weights, 1)
    own = {name: p.detach().clone() for name, p in weights.items()}
    average = copy.deepcopy(ema.average)
    with pytest.raises(KeyError), ema.swapped(weights):
        assert all(torch.equal(weights[name], average[name].to(dtype)) for name in weights)
        raise KeyError
    assert all(torch.equal(weights[name], own[name]) for name in weights)
    assert all(torch.equal(average[name], ema.average[name]) for name in weights)
    assert all(p.requires_grad and p.grad is None for p in weights.values())


@pytest.mark.gpu
@pytest.mark.parametrize("on_cpu", [True, False])
def test_an_average_is_kept_where_it_is_told(on_cpu: bool) -> None:
    weights = {name: nn.Parameter(p.detach().cuda()) for name, p in named().items()}
    ema = Ema(weights, 0.5, on_cpu)
    moved_cpu = named()
    for step in range(3):
        for i, (name, p) in enumerate(weights.items()):
            p.data = moved_cpu[name].detach().cuda() + step * (i + 1)
        ema.update(weights)
    assert all(t.device.type == ("cpu" if on_cpu else "cuda") for t in ema.average.values())
    with ema.swapped(weights):
        assert all(torch.equal(weights[name].cpu(), ema.average[name].cpu()) for name in weights)
