"""Training loop, top to bottom: samples, run, steps, the trained file.

Training runs inference's code: the encoder, its place in the base and the way it is added, inside the host's model.
Source of the method: ControlNeXt (arXiv 2408.06070) and ControlNet-XS (arXiv 2312.06573).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import state
from .base_model.before import check_before
from .base_model.encode import BaseWithEncoders, device_of_host, is_interruption, is_out_of_memory, make_room
from .base_model.needs import estimate_step, step_shape
from .config import TrainConfig
from .data.cache import Cache
from .data.joined import JOINED, join_small_buckets
from .data.samples import ControlDataset
from .distributed import ProcessGroup
from .encoded import MemoryCache
from .journal import Journal, Observer
from .readers import MakeReaders, ThreadReaders
from .results import Meter, RunFiles, StepClock, curve_of, duration, finished_file, show_validation
from .run_lock import run_lock
from .run_samples import encode_samples
from .step import draw, losses
from .training_run import TrainingRun, make_run, open_run, resume, rules_of, save, saved_data
from .undisturbed import undisturbed
from .validation import VALIDATING, Validator


class TrainingError(RuntimeError):
    """Error that ends a run. The message says what happened, where the last state is and what to do."""


class Stopped(Exception):  # noqa: N818  # not an error: somebody asked for it
    """Exception after a requested stop: the run has saved its state first, if there was one."""

    def __init__(self, step: int, where: Path | None) -> None:
        """where: folder of the saved state; None where there is no state yet."""
        kept = f"; saved in {where}" if where is not None else ", before the first state; only encoded samples are kept"
        super().__init__(f"stopped after {step} steps{kept}. Run it again with resume on to continue.")
        self.step, self.where = step, where


@dataclass(frozen=True)
class Outputs:
    """Outputs of a run: its files, observer, journal and validator."""

    files: RunFiles
    observer: Observer
    journal: Journal
    validator: Validator | None
    """Validator of this process; None: another process validates, or none does."""


def train(
    base: BaseWithEncoders,
    data: ControlDataset,
    held_out: ControlDataset | None,
    config: TrainConfig,
    files: RunFiles,
    observer: Observer,
    group: ProcessGroup | None = None,
    make_readers: MakeReaders = ThreadReaders,
) -> Path:
    """Train, or continue a saved run; returns the path of the trained file, which has been read back.

    base: the host's models, which are not modified; held_out: validation data, None to hold out some of `data`;
    make_readers: factory of the readers that prefetch files. Raises Stopped where `observer` asks for it,
    TrainingError, ConfigError, DatasetError, CheckpointError.
    """
    group = group or ProcessGroup()
    lock = run_lock(files.folder) if group.is_main else contextlib.nullcontext()
    with lock, contextlib.closing(make_readers(config.workers)) as readers:
        torch.manual_seed(config.seed)  # for code that uses torch's global random state, such as the host's layers
        check_before(base, config)
        saved = open_run(files, config, base, group, observer)
        cache = Cache(files.cache) if config.cache else MemoryCache()
        rules = rules_of(saved)
        if rules["small_buckets"] == JOINED:
            data = join_small_buckets(data, config.effective_batch * group.size, observer.say)
        samples = encode_samples(base, data, held_out, config, cache, group, observer, saved_data(saved), readers)
        if group.any(observer.stopping()):  # encoded samples are in the cache; there is nothing else to save yet
            raise Stopped(saved.step if saved else 0, saved.folder if saved else None)
        base.release_unused()
        make_room(device_of_host())
        run = make_run(base, samples.store, samples.training, config, device_of_host(), group, observer, rules)
        journal = Journal(files.folder, group.is_main, config.tensorboard)
        try:
            if saved is not None:
                resume(run, saved, observer)
            run.data = samples.tensors
            event = "resume" if run.step else "start"
            journal.write(event, run.step, samples=len(samples.training), left_out=samples.left_out)
            validator = None
            if config.validate_every and group.is_main:
                validator = Validator(samples.validation_store, samples.validation, config, run.objective, observer)
            outputs = Outputs(files, observer, journal, validator)
            with _errors_explained(run, outputs):
                _take_steps(run, outputs)
            return _finish(run, outputs)
        finally:
            journal.close()
            run.samples.close()


@contextlib.contextmanager
def _errors_explained(run: TrainingRun, outputs: Outputs) -> Iterator[None]:
    """Context in which a lack of memory becomes a TrainingError, and the host's Cancel becomes Stopped.

    Ctrl-C and an exit of the process save the complete steps and then propagate.
    """
    try:
        yield
    except BaseException as error:
        if is_out_of_memory(error):
            raise TrainingError(
                f"a step does not fit into the device's memory. {state.where_it_ends(outputs.files.folder)} Set "
                "checkpointing = true, then offload = true; or take a smaller batch_size with more accumulation, a "
                "smaller resolution, or optimizer = adamw8bit. Then run again: the run resumes from there."
            ) from error
        if is_interruption(error):
            raise _stopped(run, outputs) from error
        if not isinstance(error, Exception) and run.group.size == 1:  # several processes would wait for each other
            outputs.observer.say(str(_stopped(run, outputs)))
        raise


def _stopped(run: TrainingRun, outputs: Outputs) -> Stopped:
    """Save the complete steps, unless the next one has begun to change the weights: then the last state remains."""
    if run.complete:
        return Stopped(run.step, save(run, outputs.files))
    last = state.latest(outputs.files.folder)
    return Stopped(last.step, last.folder) if last is not None else Stopped(0, None)


def _take_steps(run: TrainingRun, outputs: Outputs) -> None:
    """Run the remaining steps, with logs, saved states and validations between them. Raises Stopped."""
    config, start = run.config, run.step
    clock = StepClock(start)
    for step in range(start, config.steps):
        if run.group.any(outputs.observer.stopping()):
            raise Stopped(step, save(run, outputs.files))
        if step == start:
            _measure_a_step(run, outputs)
            clock.restart(step)
        loss = gradients(run, step)
        norm = update(run, step, loss)
        _check(run, norm, outputs)
        if _is_due(config.log_every, run):
            _tell(run, clock.read(run.step), outputs)
        if _is_due(config.save_every, run):
            save(run, outputs.files)
        if outputs.validator is not None and _is_due(config.validate_every, run):
            _validate(run, outputs.validator, outputs)
            clock.restart(run.step)


def _is_due(every: int, run: TrainingRun) -> bool:
    return run.step % every == 0 or run.step == run.config.steps


def gradients(run: TrainingRun, step: int) -> Tensor:
    """Run the forward and backward passes of one step's samples; returns the mean loss of this process."""
    config = run.config
    samples = run.samples.get(run.requests(step), run.coming(step))
    positions = run.positions(step)
    total = torch.zeros((), device=run.controlled.device)
    for part in range(config.accumulation):
        cut = slice(part * config.batch_size, (part + 1) * config.batch_size)
        batch = draw(samples[cut], positions[cut], run.objective, config, run.controlled)
        with run.group.without_exchange(run.model, off=part + 1 < config.accumulation):
            loss = losses(run.model, batch, run.objective, config).mean() / config.accumulation
            run.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def update(run: TrainingRun, step: int, loss: Tensor) -> float:
    """Update the weights from the gradients, completely or not at all; returns the norm before clipping.

    loss: of this process; the mean over all processes is added to the run's losses.
    """
    rate = run.schedule.factor(step)
    for parameter_group in run.optimizer.param_groups:
        parameter_group["lr"] = parameter_group["initial_lr"] * rate
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.parameters.values(), run.config.max_grad_norm or math.inf)
    mean = run.group.mean(loss)
    with undisturbed():
        run.complete = False
        if run.ema is not None:
            run.ema.before_step()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        if run.ema is not None:
            run.ema.update(run.parameters)
        run.norms.append(float(norm))
        run.losses.append(float(mean))
        skipped = run.scaler.is_enabled()  # GradScaler skips a step whose gradient is not finite
        run.complete = math.isfinite(run.losses[-1]) and (skipped or math.isfinite(float(norm)))
    return float(norm)


def _check(run: TrainingRun, norm: float, outputs: Outputs) -> None:
    """Raise TrainingError where a step has made the weights or the loss invalid, before they are saved."""
    if run.complete:
        return
    step, loss = run.step, run.losses[-1]
    found = f"loss of step {step} is {loss}" if not math.isfinite(loss) else f"gradient of step {step} is {norm}"
    raise TrainingError(
        f"the {found}. {state.where_it_ends(outputs.files.folder)} Lower the learning rates, or set precision = bf16 "
        "or fp32, and run again: the run resumes from there."
    )


def _measure_a_step(run: TrainingRun, outputs: Outputs) -> None:
    """Compute the next step's gradients, drop them, and report the time and memory of a step.

    The memory estimate is logged first, since the step may not fit.
    """
    expected = _expected(run, outputs)
    meter = Meter(run.controlled.device)
    gradients(run, run.step)
    run.optimizer.zero_grad(set_to_none=True)
    seconds, peak = meter.read()
    left = run.config.steps - run.step
    trained = sum(parameter.numel() for parameter in run.parameters.values())
    outputs.observer.say(
        f"{trained:,} numbers train; one step takes {seconds:.2f} s, {left} steps about {duration(seconds * left)}; "
        f"peak memory {peak / 2**30:.2f} GiB"
    )
    facts = {"seconds_per_step": seconds, "peak_bytes": peak, "trained": trained, "expected_bytes": expected}
    outputs.journal.write("dry_run", run.step, **facts)


def _expected(run: TrainingRun, outputs: Outputs) -> int | None:
    """Estimated bytes of a step, also logged; None for a run that `memory_estimate` does not cover."""
    if not (run.config.checkpointing and run.controlled.family.inside and run.requests(run.step)):
        return None
    sample = run.samples.store.sample(*run.requests(run.step)[0])
    shape = step_shape(run.controlled, sample.latent, sample.given, sample.hint, run.config)
    if shape is None:
        return None
    need, line = estimate_step(shape, run.config, run.controlled.device)
    outputs.observer.say(line)
    return need.total


def _tell(run: TrainingRun, seconds: float, outputs: Outputs) -> None:
    """Show and log the means over the steps since the last line. seconds: per step since then."""
    config, step = run.config, run.step
    count = step - (step - 1) // config.log_every * config.log_every
    loss, norm = _mean(run.losses[-count:]), _mean(run.norms[-count:])
    left = duration(seconds * (config.steps - step))
    rate = run.schedule.factor(step - 1)
    outputs.journal.write(
        "step",
        step,
        loss=loss,
        steps=count,
        gradient=norm,
        learning_rate=config.learning_rate * rate,
        control_learning_rate=config.control_learning_rate * rate,
        seconds_per_step=seconds,
    )
    outputs.observer.curve(lambda: curve_of(outputs.files))
    outputs.observer.progress(
        step, config.steps, f"step {step}/{config.steps}  loss {loss:.4f}  {1 / seconds:.2f} it/s  {left} left"
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _validate(run: TrainingRun, validator: Validator, outputs: Outputs) -> None:
    """Validate with the weights that would be saved."""

    def tell(text: str) -> None:
        outputs.observer.progress(run.step, run.config.steps, f"{VALIDATING} after step {run.step}: {text}")

    with run.averaged():
        found = validator.run(run.controlled, tell)
        show_validation(found, run.step, outputs.files, outputs.journal, outputs.observer)
    validator.store.base.release_unused()


def _finish(run: TrainingRun, outputs: Outputs) -> Path:
    """Write the trained file; returns its path."""
    steps = run.config.steps
    with run.averaged():
        path = finished_file(run.controlled, run.config, outputs.files, run.losses, run.group)
    outputs.observer.say(f"finished after {steps} steps: {path}")
    outputs.journal.write("finished", steps, path=str(path))
    return path
