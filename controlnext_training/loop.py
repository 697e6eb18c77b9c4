"""A run as the loop holds it: what its steps need, how it is saved, and how it is taken up again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import optimizers, state
from .averaging import Ema
from .base_model.controlled import Controlled
from .base_model.controls import MakeControl, new_control
from .base_model.encode import BaseWithEncoders, compute_dtype
from .config import SETTINGS, ConfigError, TrainConfig
from .config_files import as_toml
from .data.order import Order, order
from .distributed import World
from .encoded import Ahead, Store
from .journal import Watch
from .results import RunFiles, name_run
from .schedules import Schedule
from .step import Law


@dataclass
class Loop:
    """What the steps need, made once."""

    config: TrainConfig
    controlled: Controlled
    model: nn.Module
    """The same, or what distributes it."""
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema | None
    law: Law
    schedule: Schedule
    plan: Order
    samples: Ahead
    indices: list[int]
    world: World
    losses: list[float] = field(default_factory=list)
    """Of every complete step."""
    complete: bool = True
    """False while a step changes the weights, and after one that spoilt them: what is there is not to be saved."""


def make_loop(
    base: BaseWithEncoders,
    store: Store,
    usable: list[int],
    config: TrainConfig,
    device: torch.device,
    world: World,
    watch: Watch,
    make: MakeControl = new_control,
) -> Loop:
    dtype = compute_dtype(config.precision, device)
    controlled = Controlled(base.model, config, dtype, device, make)
    encoder = {f"control.{name}": p for name, p in controlled.net.named_parameters()}
    unet = {f"unet.{name}": p for name, p in controlled.differences.parameters.items()}
    rates = ((encoder, config.control_learning_rate), (unet, config.learning_rate))
    groups = [{"params": list(named.values()), "lr": rate} for named, rate in rates if named]
    optimizer = optimizers.build(
        config.optimizer,
        groups,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    if config.zero:
        optimizer = world.split(optimizer)
    parameters = {**encoder, **unet}
    sizes = [store.data.sizes[index] for index in usable]
    return Loop(
        config=config,
        controlled=controlled,
        model=world.wrap(controlled),
        parameters=parameters,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=dtype is torch.float16),
        ema=Ema(parameters, config.ema_decay, config.ema_on_cpu) if config.ema_decay else None,
        law=Law.of(config, controlled),
        schedule=config.learning_rate_schedule,
        plan=order(sizes, config.effective_batch * world.size, config.seed),
        samples=Ahead(store, usable, watch.say),
        indices=usable,
        world=world,
    )


def open_run(
    run: RunFiles, config: TrainConfig, base: BaseWithEncoders, world: World, watch: Watch
) -> state.State | None:
    """The state to go on from, or None for a new run, whose folder is then there and empty.

    Raises ConfigError where the state is of another run, or is not the same for all processes.
    """
    found = state.latest(run.folder) if config.resume else None
    seen = set(world.gather(-1 if found is None else found.step))
    if len(seen) > 1:
        raise ConfigError(
            f"runs_folder: the processes do not see the same states in {run.folder}. Set runs_folder to a folder on a "
            "drive that all machines share."
        )
    if found is not None:
        _check_same_run(found, config, base)
    elif world.first:
        aside = state.set_aside(run.folder)
        if aside is not None:
            watch.say(f"an earlier run of this name is now {aside}")
    world.wait()
    if world.first:
        run.folder.mkdir(parents=True, exist_ok=True)
        state.clear_unfinished(run.folder)
        (run.folder / "config.toml").write_text(as_toml(config), "utf-8")
        name_run(run)
    return found


def _check_same_run(found: state.State, config: TrainConfig, base: BaseWithEncoders) -> None:
    old, new = found.facts["config"], json.loads(config.to_json())
    fixed = [key for key, facts in SETTINGS.items() if facts.fixed_on_resume]
    changed = [f"{key} was {old[key]!r} and is {new[key]!r}" for key in fixed if old[key] != new[key]]
    if found.facts["base"] != base.identity("model"):
        changed.append("the base model is another")
    if found.step > config.steps:
        raise ConfigError(
            f"steps: {found.folder} has {found.step} steps behind it, and steps is {config.steps}. Set steps to "
            f"{found.step} or more, or set resume = false or another output_name to start anew."
        )
    if changed:
        raise ConfigError(
            f"resume: {found.folder} is of another run: {'; '.join(changed)}. Set these back, or set resume = false "
            "or another output_name to start anew."
        )


def resume(loop: Loop, found: state.State | None, watch: Watch) -> int:
    """Take over a saved state; the number of steps that are done."""
    if found is None:
        return 0
    weights = found.tensors("weights")
    with torch.no_grad():
        for name, parameter in loop.parameters.items():
            parameter.copy_(weights[name])
    _load_optimizer(loop, optimizers.unpack(found.tensors("optimizer"), found.facts["optimizer"]))
    loop.scaler.load_state_dict(found.facts["scaler"])
    if loop.ema is not None:
        average = found.tensors("ema")
        if not average:  # switched on just now
            loop.ema = Ema(loop.parameters, loop.config.ema_decay, loop.config.ema_on_cpu)
        else:
            loop.ema.load_state_dict(average)
    loop.losses = found.tensors("losses")["loss"].tolist()
    changed = [
        f"{key} {found.facts['config'].get(key)!r} -> {value!r}"
        for key, value in json.loads(loop.config.to_json()).items()
        if found.facts["config"].get(key) != value
    ]
    if (before := found.facts.get("processes", 1)) != loop.world.size:
        changed.append(f"processes {before} -> {loop.world.size}")
    watch.say(
        f"resumed at step {found.step} from {found.folder}" + (f"; changed: {', '.join(changed)}" if changed else "")
    )
    return found.step


CONFIGURED = ("initial_lr", "betas", "eps", "weight_decay")
"""What a group of the optimizer has from the configuration, in whose favour a saved state is overruled."""


def _load_optimizer(loop: Loop, saved: dict[str, Any]) -> None:
    """Go on with the optimizer's saved moments at the rates that are configured now."""
    now = [{key: group[key] for key in CONFIGURED if key in group} for group in loop.optimizer.param_groups]
    loop.optimizer.load_state_dict(saved)
    for group, values in zip(loop.optimizer.param_groups, now, strict=True):
        group.update(values)


def save(loop: Loop, step: int, run: RunFiles) -> Path:
    """The state after `step` steps, written by the first process."""
    rest: object = None
    folder = run.folder
    whole = loop.world.whole_state(loop.optimizer)
    if loop.world.first:
        tensors, rest = optimizers.pack(whole)
        parts = {
            "weights": {name: p.detach() for name, p in loop.parameters.items()},
            "optimizer": tensors,
            "ema": loop.ema.state_dict() if loop.ema is not None else {},
            "losses": {"loss": torch.tensor(loop.losses, dtype=torch.float64)},
        }
        facts = {
            "config": json.loads(loop.config.to_json()),
            "optimizer": rest,
            "scaler": loop.scaler.state_dict(),
            "base": run.base,
            "processes": loop.world.size,
        }
        folder = state.save(run.folder, step, parts, facts, loop.config.keep_states)
    loop.world.wait()
    return folder


@contextmanager
def averaged(loop: Loop) -> Iterator[None]:
    """Inside, the weights are those to look at and to save: averaged, where an average is kept."""
    with optimizers.weights_to_read(loop.optimizer):
        if loop.ema is None:
            yield
            return
        with loop.ema.swapped(loop.parameters):
            yield
