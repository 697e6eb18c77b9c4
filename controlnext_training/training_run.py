"""Training run in memory: made, opened, resumed and saved here; its steps are in `train`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import optimizers, state
from .averaging import Ema
from .base_model.controlled import Controlled
from .base_model.encode import BaseWithEncoders, compute_dtype
from .config import SETTINGS, ConfigError, TrainConfig
from .config_files import as_toml
from .data.joined import JOINED
from .data.order import Order, order
from .distributed import ProcessGroup
from .encoded import Prefetcher, SampleRequests, Store
from .journal import Observer
from .results import RunFiles, name_run
from .schedules import Schedule
from .split import SavedData
from .step import DiffusionObjective

RULES = {"small_buckets": JOINED, "weight_decay": optimizers.DECAYED}
"""Key of a saved state -> name of the rule that new runs follow; a state without the key was saved before that rule."""


@dataclass
class TrainingRun:
    """State of a run that its steps need, made once and saved and resumed together."""

    config: TrainConfig
    controlled: Controlled
    model: nn.Module
    """Module to call: the Controlled, wrapped where several processes train."""
    parameters: dict[str, nn.Parameter]
    """Trained parameters, by their names in saved states."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema | None
    objective: DiffusionObjective
    schedule: Schedule
    order: Order
    samples: Prefetcher
    indices: list[int]
    """Indices of the dataset's training samples; `order` counts in these."""
    group: ProcessGroup
    losses: list[float] = field(default_factory=list)
    """Losses of all steps so far."""
    norms: list[float] = field(default_factory=list)
    """Norms of the gradients of the steps of this process."""
    data: dict[str, torch.Tensor] = field(default_factory=dict)
    """Identities of the samples; see `split`."""
    rules: Mapping[str, Any] = field(default_factory=lambda: RULES)
    """Rules of the state's version, see `rules_of`."""
    complete: bool = True
    """False while a step changes the weights, and after one that made them invalid: such weights are not saved. True
    otherwise."""

    @property
    def step(self) -> int:
        """Number of optimizer steps taken."""
        return len(self.losses)

    def positions(self, step: int) -> list[int]:
        """Positions in the run of this process's samples of a step, one forward pass after the other."""
        config, group = self.config, self.group
        first = step * config.effective_batch * group.size
        return [
            first + (part * group.size + group.rank) * config.batch_size + number
            for part in range(config.accumulation)
            for number in range(config.batch_size)
        ]

    def requests(self, step: int) -> SampleRequests:
        """Requests for this process's samples of a step; () after the last step."""
        if step >= self.config.steps:
            return ()
        batch = self.order.batch(step)
        return tuple((self.indices[batch[position % len(batch)]], position) for position in self.positions(step))

    def coming(self, step: int) -> list[SampleRequests]:
        """Requests for this process's samples of the coming steps to prefetch."""
        after = range(step + 1, step + 1 + self.samples.steps_ahead(self.config.effective_batch))
        return [requests for later in after if (requests := self.requests(later))]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the parameters hold the weights to validate and to save: their moving average, if there is
        one.
        """
        with optimizers.weights_to_read(self.optimizer):
            if self.ema is None:
                yield
                return
            with self.ema.swapped(self.parameters):
                yield


def make_run(
    base: BaseWithEncoders,
    store: Store,
    usable: list[int],
    config: TrainConfig,
    device: torch.device,
    group: ProcessGroup,
    observer: Observer,
    rules: Mapping[str, Any] = RULES,
) -> TrainingRun:
    """Make a run before its first step. usable: indices of the store's training samples; rules: see `rules_of`."""
    dtype = compute_dtype(config.precision, device)
    decay_all = rules["weight_decay"] != optimizers.DECAYED
    controlled = Controlled(base.model, config, dtype, device)
    encoder = {f"control.{name}": p for name, p in controlled.net.named_parameters()}
    unet = {f"unet.{name}": p for name, p in controlled.differences.parameters.items()}
    parameters = {**encoder, **unet}
    rates = ((encoder, config.control_learning_rate), (unet, config.learning_rate))
    sizes = [store.data.sizes[index] for index in usable]
    repeats = [store.data.share(index).repeats for index in usable]
    return TrainingRun(
        config=config,
        controlled=controlled,
        model=group.wrap(controlled),
        parameters=parameters,
        optimizer=_make_optimizer(config, [(list(named.values()), rate) for named, rate in rates], group, decay_all),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype is torch.float16),
        ema=Ema(parameters, config.ema_decay, config.ema_on_cpu) if config.ema_decay and group.is_main else None,
        objective=DiffusionObjective.of(config, controlled),
        schedule=config.learning_rate_schedule,
        order=order(sizes, config.effective_batch * group.size, config.seed, repeats),
        samples=Prefetcher(store, usable, observer.say),
        indices=usable,
        group=group,
        rules=rules,
    )


def _make_optimizer(
    config: TrainConfig, parameters: list[tuple[list[nn.Parameter], float]], group: ProcessGroup, decay_all: bool
) -> torch.optim.Optimizer:
    """Optimizer of the run. parameters: (parameters, learning rate) of each group."""
    optimizer = optimizers.build(
        config.optimizer,
        [
            part
            for tensors, rate in parameters
            if tensors
            for part in optimizers.grouped(tensors, rate, config.weight_decay, decay_all)
        ],
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=not decay_all,
    )
    for parameter_group in optimizer.param_groups:
        parameter_group["initial_lr"] = parameter_group["lr"]
    return group.split(optimizer) if config.zero else optimizer


def open_run(
    files: RunFiles, config: TrainConfig, base: BaseWithEncoders, group: ProcessGroup, observer: Observer
) -> state.State | None:
    """Saved state to resume, or None for a new run, whose folder then exists and is empty.

    Raises ConfigError where the state is of another run, or is not the same for all processes.
    """
    found = state.latest(files.folder) if config.resume else None
    seen = set(group.gather(-1 if found is None else found.step))
    if len(seen) > 1:
        raise ConfigError(
            f"runs_folder: the processes do not see the same states in {files.folder}. Set runs_folder to a folder on "
            "a drive that all machines share."
        )
    if found is not None:
        _check_same_run(found, config, base)
    elif group.is_main:
        aside = state.set_aside(files.folder)
        if aside is not None:
            observer.say(f"an earlier run of this name is now {aside}")
    group.wait()
    if group.is_main:
        files.folder.mkdir(parents=True, exist_ok=True)
        state.clear_unfinished(files.folder)
        (files.folder / "config.toml").write_text(as_toml(config), "utf-8")
        name_run(files)
    return found


def _check_same_run(found: state.State, config: TrainConfig, base: BaseWithEncoders) -> None:
    old, new = _config_of(found), json.loads(config.to_json())
    fixed = [key for key, facts in SETTINGS.items() if facts.fixed_on_resume]
    changed = [f"{key} was {old[key]!r} and is {new[key]!r}" for key in fixed if old[key] != new[key]]
    if found.facts["base"] != base.identity("model"):
        changed.append("the base model is another")
    if found.step > config.steps:
        raise ConfigError(
            f"steps: {found.folder} has {found.step} steps behind it, and steps is {config.steps}. Set steps to "
            f"{found.step} or more, or set resume = false or another output_name to start a new run."
        )
    if changed:
        raise ConfigError(
            f"resume: {found.folder} is of another run: {'; '.join(changed)}. Set these back, or set resume = false "
            "or another output_name to start a new run."
        )


def rules_of(found: state.State | None) -> dict[str, Any]:
    """Rules that a run follows to its end: the current ones for a new run, those of its state for a resumed one."""
    return dict(RULES) if found is None else {key: found.facts.get(key) for key in RULES}


def saved_data(found: state.State | None) -> SavedData | None:
    """Samples of a saved state; None for a new run."""
    return None if found is None else SavedData(found.tensors("data"), str(found.facts.get("data", "")))


def _config_of(found: state.State) -> dict[str, Any]:
    """Configuration of a saved state; settings that were added later have their defaults, with which it was run."""
    return json.loads(TrainConfig().to_json()) | found.facts["config"]


def resume(run: TrainingRun, found: state.State, observer: Observer) -> None:
    """Continue from a saved state, and report the settings that have changed since."""
    weights = found.tensors("weights")
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            parameter.copy_(weights[name])
    _load_optimizer(run, found.optimizer())
    run.scaler.load_state_dict(found.facts["scaler"])
    if run.ema is not None:
        average = found.tensors("ema")
        if not average:  # switched on just now
            run.ema = Ema(run.parameters, run.config.ema_decay, run.config.ema_on_cpu)
        else:
            run.ema.load_state_dict(average)
    run.losses = found.tensors("losses")["loss"].tolist()
    old, new = _config_of(found), json.loads(run.config.to_json())
    changed = [f"{key} {old[key]!r} -> {value!r}" for key, value in new.items() if old[key] != value]
    if (before := found.facts.get("processes", 1)) != run.group.size:
        changed.append(f"processes {before} -> {run.group.size}")
    observer.say(
        f"resumed at step {found.step} from {found.folder}" + (f"; changed: {', '.join(changed)}" if changed else "")
    )


CONFIGURED = ("initial_lr", "betas", "eps", "weight_decay", "fused")
"""Hyper-parameters taken from the current configuration and device, not from the saved optimizer state, on resume."""


def _load_optimizer(run: TrainingRun, saved: dict[str, Any]) -> None:
    """Restore the optimizer's saved moments, with the configured learning rates."""
    now = [{key: group[key] for key in CONFIGURED if key in group} for group in run.optimizer.param_groups]
    groups = [group | values for group, values in zip(saved["param_groups"], now, strict=True)]
    run.optimizer.load_state_dict(saved | {"param_groups": groups})


def save(run: TrainingRun, files: RunFiles) -> Path:
    """Save the state; the main process writes it. Returns its folder."""
    folder = files.folder
    whole = run.group.whole_state(run.optimizer)
    if run.group.is_main:
        parts = {
            "weights": {name: p.detach() for name, p in run.parameters.items()},
            "ema": run.ema.state_dict() if run.ema is not None else {},
            "losses": {"loss": torch.tensor(run.losses, dtype=torch.float64)},
            "data": run.data,
        }
        facts = {
            "config": json.loads(run.config.to_json()),
            "scaler": run.scaler.state_dict(),
            "base": files.base,
            "processes": run.group.size,
            "data": run.samples.store.data.fingerprint,
            **run.rules,
        }
        folder = state.save(files.folder, run.step, parts, whole, facts, run.config.keep_states)
    run.group.wait()
    return folder
