"""The training loop, top to bottom: data, model, optimizer, resume, steps, the trained file.

What is trained is what is run: the encoder, the place where it acts and the way it is added are those of inference,
and the base is the host's. Source of the method: ControlNeXt (arXiv 2408.06070) and ControlNet-XS (arXiv 2312.06573).
"""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from . import state
from .base_model.controlled import check_fits
from .base_model.controls import MakeControl, new_control
from .base_model.encode import BaseWithEncoders, device_of_host, is_interruption, is_out_of_memory, make_room
from .config import TrainConfig
from .data.cache import Cache
from .data.samples import ControlDataset
from .distributed import World
from .encoded import Memory, Store, Wanted
from .journal import Journal, Watch
from .lock import held
from .loop import Loop, averaged, make_loop, open_run, resume, save
from .results import Meter, RunFiles, duration, finished_file, show_validation
from .step import draw, losses
from .undisturbed import undisturbed
from .validation import Validator


class TrainingError(RuntimeError):
    """A run that cannot go on. The message names what happened, where the last state is and what to do."""


class Stopped(Exception):  # noqa: N818  # not an error: somebody asked for it
    """The run was stopped from outside and has saved its state first."""

    def __init__(self, step: int, where: Path) -> None:
        super().__init__(f"stopped after {step} steps; saved in {where}. Run it again with resume on to go on.")
        self.step, self.where = step, where


def train(
    base: BaseWithEncoders,
    data: ControlDataset,
    held_out: ControlDataset | None,
    config: TrainConfig,
    run: RunFiles,
    watch: Watch,
    world: World | None = None,
    make: MakeControl = new_control,
) -> Path:
    """Train, or go on training, and return the path of the trained file, which has been read again.

    base: the host's models, only read; held_out: for validation, None to hold out some of `data`; run: where things
    go; make: makes the control that trains. Raises Stopped where `watch` asks for it, TrainingError, ConfigError,
    DatasetError, CheckpointError.
    """
    world = world or World()
    with held(run.folder) if world.first else contextlib.nullcontext():
        return _train(base, data, held_out, config, run, watch, world, make)


def _train(
    base: BaseWithEncoders,
    data: ControlDataset,
    held_out: ControlDataset | None,
    config: TrainConfig,
    run: RunFiles,
    watch: Watch,
    world: World,
    make: MakeControl,
) -> Path:
    torch.manual_seed(config.seed)  # for what asks nobody, such as a stock layer; ours are functions of the position
    check_fits(base.model, config)
    base.check()
    found = open_run(run, config, base, world, watch)
    device = device_of_host()
    store = Store(base, data, config, Cache(run.cache) if config.cache else Memory())
    count = min(len(data), config.max_samples or len(data))
    readable, broken = store.prepare(range(count), world, watch)
    if _any(watch.stopping(), world):  # what is encoded is kept; there is nothing else to save yet
        raise Stopped(found.step if found else 0, run.folder)
    training, validating = _split(readable, config, held_out is not None)
    looked_at = store
    if held_out is not None and config.validate_every:
        looked_at = Store(base, held_out, config, store.kept)
        first = range(min(len(held_out), config.validation_samples))
        validating, unseen = looked_at.prepare(first, world, watch)
        broken += unseen
    for name, why in broken:
        watch.say(f"left out: {name}: {why}")
    _release(base)
    make_room(device)
    loop = make_loop(base, store, training, config, device, world, watch, make)
    validator = None
    if config.validate_every and world.first:
        validator = Validator(looked_at, validating, config, loop.law, watch)
    journal = Journal(run.folder, world.first, config.tensorboard)
    try:
        start = resume(loop, found, watch)
        journal.write("start" if start == 0 else "resume", start, samples=len(training), left_out=len(broken))
        _steps(loop, start, run, watch, journal, validator)
        with averaged(loop):
            path = finished_file(loop.controlled, config, run, loop.losses, world)
        watch.say(f"finished after {config.steps} steps: {path}")
        journal.write("finished", config.steps, path=str(path))
        return path
    finally:
        journal.close()
        loop.samples.close()


def _steps(loop: Loop, start: int, run: RunFiles, watch: Watch, journal: Journal, validator: Validator | None) -> None:
    """From `start` to the last step.

    Raises Stopped with the state saved where the run was asked to end, or the host's layers threw in a forward; Ctrl-C
    and an exit of the process go on after the state is saved.
    """
    try:
        _steps_until_stopped(loop, start, run, watch, journal, validator)
    except BaseException as error:
        if is_out_of_memory(error):
            raise TrainingError(
                f"a step does not fit into the device's memory. {state.where_it_ends(run.folder)} Set checkpointing = "
                "true, then offload = true; or take a smaller batch_size with more accumulation, a smaller "
                "resolution, or optimizer = adamw8bit. Run again then: it goes on from there."
            ) from error
        if is_interruption(error):
            raise _stopped(loop, run) from error
        if not isinstance(error, Exception) and loop.world.size == 1:  # several processes would wait for each other
            watch.say(str(_stopped(loop, run)))
        raise


def _stopped(loop: Loop, run: RunFiles) -> Stopped:
    """Save what the complete steps have made, unless the next has begun to change it; where the run goes on from."""
    if loop.complete:
        step = len(loop.losses)
        return Stopped(step, save(loop, step, run))
    last = state.latest(run.folder)
    return Stopped(last.step, last.folder) if last is not None else Stopped(0, run.folder)


def _steps_until_stopped(
    loop: Loop, start: int, run: RunFiles, watch: Watch, journal: Journal, validator: Validator | None
) -> None:
    config, clock, since = loop.config, time.monotonic(), start
    for step in range(start, config.steps):
        if _any(watch.stopping(), loop.world):
            raise Stopped(step, save(loop, step, run))
        if step == start:
            _try_one_step(loop, start, watch, journal)
            clock = time.monotonic()
        loss, norm = _step(loop, step)
        _check(loss, norm, step, loop, run)
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            seconds = (time.monotonic() - clock) / (done - since)
            clock, since = time.monotonic(), done
            _tell(loop, done, loss, norm, seconds, journal, watch)
        if done % config.save_every == 0 or done == config.steps:
            save(loop, done, run)
        if validator is not None and (done % config.validate_every == 0 or done == config.steps):
            with averaged(loop):
                show_validation(validator.run(loop.controlled), done, run, journal, watch)
            _release(validator.store.base)
            clock, since = time.monotonic(), done


def _release(base: BaseWithEncoders) -> None:
    """Let go of the encoders, unless conditions are still encoded while training."""
    if not base.family.conditioning.encoded_while_training:
        base.release()


def _check(loss: float, norm: float, step: int, loop: Loop, run: RunFiles) -> None:
    """Raise TrainingError where a step has spoilt the weights, before they are saved."""
    if loop.complete:
        return
    what = f"loss of step {step + 1} is {loss}" if not math.isfinite(loss) else f"gradient of step {step + 1} is {norm}"
    raise TrainingError(
        f"the {what}. {state.where_it_ends(run.folder)} Lower the learning rates, or set precision = bf16 or fp32, "
        "and run again: it goes on from there."
    )


def _step(loop: Loop, step: int) -> tuple[float, float]:
    """One step of the optimizer: (mean loss over all processes, length of the gradient). Its effect is all or none."""
    config, world = loop.config, loop.world
    rate = loop.schedule.factor(step)
    for group in loop.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * rate
    total = _gradients(loop, step)
    loop.scaler.unscale_(loop.optimizer)
    limit = config.max_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(loop.parameters.values(), limit)
    loss = world.mean(total)
    with undisturbed():
        loop.complete = False
        loop.scaler.step(loop.optimizer)
        loop.scaler.update()
        loop.optimizer.zero_grad(set_to_none=True)
        if loop.ema is not None:
            loop.ema.update(loop.parameters)
        loop.losses.append(float(loss))
        loop.complete = _is_sound(loop, loop.losses[-1], float(norm))
    return loop.losses[-1], float(norm)


def _is_sound(loop: Loop, loss: float, norm: float) -> bool:
    """Whether a step has left the weights fit to be saved."""
    skipped = loop.scaler.is_enabled()  # a step whose gradient is not finite has no effect then
    return math.isfinite(loss) and (skipped or math.isfinite(norm))


def _gradients(loop: Loop, step: int) -> Tensor:
    """Forward and backward of one step's samples; the mean loss of this process."""
    config = loop.config
    samples = loop.samples.get(_wanted(loop, step), _wanted(loop, step + 1) if step + 1 < config.steps else ())
    places = _places(loop, step)
    total = torch.zeros((), device=loop.controlled.device)
    for part in range(config.accumulation):
        cut = slice(part * config.batch_size, (part + 1) * config.batch_size)
        batch = draw(samples[cut], places[cut], loop.law, config, loop.controlled)
        with loop.world.without_exchange(loop.model, off=part + 1 < config.accumulation):
            loss = losses(loop.model, batch, loop.law, config).mean() / config.accumulation
            loop.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def _places(loop: Loop, step: int) -> list[int]:
    """Positions in the run of this process's samples of a step. One part over all processes comes after the other."""
    config, world = loop.config, loop.world
    first = step * config.effective_batch * world.size
    return [
        first + (part * world.size + world.rank) * config.batch_size + place
        for part in range(config.accumulation)
        for place in range(config.batch_size)
    ]


def _wanted(loop: Loop, step: int) -> Wanted:
    """(index, position) of this process's samples of a step."""
    batch = loop.plan.batch(step)
    places = _places(loop, step)
    return tuple((loop.indices[batch[place % len(batch)]], place) for place in places)


def _split(indices: list[int], config: TrainConfig, held_out: bool) -> tuple[list[int], list[int]]:
    """(samples that train, samples to look at). Of few samples none is held out: they are looked at as well."""
    if held_out or not config.validate_every:
        return indices, []
    spare = min(config.validation_samples, len(indices) // 10)
    return indices[spare:], indices[: spare or config.validation_samples]


def _try_one_step(loop: Loop, step: int, watch: Watch, journal: Journal) -> None:
    """Run the first step without its effect, and say what a step costs before the run begins."""
    meter = Meter(loop.controlled.device)
    _gradients(loop, step)
    loop.optimizer.zero_grad(set_to_none=True)
    seconds, peak = meter.read()
    left = loop.config.steps - step
    trained = sum(parameter.numel() for parameter in loop.parameters.values())
    watch.say(
        f"{trained:,} numbers train; one step takes {seconds:.2f} s, {left} steps about {duration(seconds * left)}; "
        f"peak memory {peak / 2**30:.2f} GiB"
    )
    journal.write("dry_run", step, seconds_per_step=seconds, peak_bytes=peak, trained=trained)


def _tell(loop: Loop, step: int, loss: float, norm: float, seconds: float, journal: Journal, watch: Watch) -> None:
    config = loop.config
    left = duration(seconds * (config.steps - step))
    rate = loop.schedule.factor(step - 1)
    watch.progress(
        step, config.steps, f"step {step}/{config.steps}  loss {loss:.4f}  {1 / seconds:.2f} it/s  {left} left"
    )
    journal.write(
        "step",
        step,
        loss=loss,
        gradient=norm,
        learning_rate=config.learning_rate * rate,
        control_learning_rate=config.control_learning_rate * rate,
        seconds_per_step=seconds,
    )


def _any(mine: bool, world: World) -> bool:
    return any(world.gather(mine)) if world.size > 1 else mine
