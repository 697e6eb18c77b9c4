"""Complete runs: a resumed run equals an uninterrupted one, accumulated parts equal the whole batch, and errors name
the remaining state.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.checkpoint import peek
from comfyui_controlnext.controlnext_training import results, state
from comfyui_controlnext.controlnext_training.base_model.controlled import Controlled
from comfyui_controlnext.controlnext_training.config import ConfigError
from comfyui_controlnext.controlnext_training.encoded import Store
from comfyui_controlnext.controlnext_training.results import Meter
from comfyui_controlnext.controlnext_training.train import Stopped, TrainingError
from comfyui_controlnext.tests.fixtures.sampling_fixtures import Studio, relative
from comfyui_controlnext.tests.fixtures.training_fixtures import (
    CPU,
    Watcher,
    base_of,
    drawn,
    gradients_of,
    loop_on,
    same,
    same_nested,
    small,
    take_steps,
    train_in,
)
from safetensors.torch import load_file

pytestmark = pytest.mark.comfy

EVERYTHING = {
    "steps": 4,
    "accumulation": 2,
    "schedule": "cosine",
    "warmup_steps": 2,
    "ema_decay": 0.9,
    "caption_dropout": 0.4,
    "hint_dropout": 0.4,
    "noise_offset": 0.1,
    "min_snr_gamma": 5.0,
    "timesteps": "logit_normal",
    "max_grad_norm": 0.5,
}
PARTS_AND_WHOLE = 2e-5
"""Relative difference of the gradients of four samples one by one and at once: fp32 sums in another order, through 20
layers; of one sample's loss it is 1e-6."""


def last_state(folder: Path, name: str = "control") -> state.State:
    found = state.latest(folder / "runs" / name)
    assert found is not None
    return found


def assert_same_run(one: Path, other: Path, path_one: Path, path_other: Path) -> None:
    """Assert that states and trained files of two runs are equal in every bit."""
    mine, theirs = last_state(one), last_state(other)
    assert mine.step == theirs.step and same_nested(mine.optimizer(), theirs.optimizer())
    for part in ("weights", "ema", "losses"):
        assert same(mine.tensors(part), theirs.tensors(part)), part
    assert same(load_file(path_one), load_file(path_other))


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Order of samples: (position, index) of every sample that is read for training; filled during a run."""
    read: list[tuple[int, int]] = []
    sample = Store.sample

    def noted(self: Store, index: int, position: int, dropout: bool = True) -> Any:
        read.append((position, index))
        return sample(self, index, position, dropout)

    monkeypatch.setattr(Store, "sample", noted)
    return read


@pytest.mark.parametrize("variant", ["sd15", "xs"])
def test_stopped_and_resumed_is_bit_for_bit_the_uninterrupted_run(
    loaded_studio: Studio, tmp_path: Path, variant: str, order: list[tuple[int, int]]
) -> None:
    base, config = base_of(loaded_studio), small(**EVERYTHING, variant=variant)
    whole = train_in(tmp_path / "whole", base, config)
    read_by_the_whole = set(order)
    order.clear()
    with pytest.raises(Stopped, match=r"stopped after 2 steps; saved in .*state-00000002"):
        train_in(tmp_path / "parts", base, config, Watcher(stop_at=2))
    watch = Watcher()
    parts = train_in(tmp_path / "parts", base_of(loaded_studio), config, watch)
    assert watch.logged("resumed at step 2 from ") and not watch.logged("changed")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", whole, parts)
    assert set(order) == read_by_the_whole
    losses = last_state(tmp_path / "parts").tensors("losses")["loss"]
    assert losses.shape == (4,) and losses.dtype == torch.float64 and losses.isfinite().all()


def test_a_run_stopped_before_its_first_step_goes_on_from_there(loaded_studio: Studio, tmp_path: Path) -> None:
    base, config = base_of(loaded_studio), small(steps=2)
    with pytest.raises(Stopped, match="stopped after 0 steps"):
        train_in(tmp_path / "parts", base, config, Watcher(stop_at=0))
    parts = train_in(tmp_path / "parts", base, config)
    assert_same_run(tmp_path / "parts", tmp_path / "whole", parts, train_in(tmp_path / "whole", base, config))


def test_a_finished_run_that_is_started_again_writes_the_same_file(loaded_studio: Studio, tmp_path: Path) -> None:
    base, config, watch = base_of(loaded_studio), small(steps=2), Watcher()
    first = load_file(train_in(tmp_path, base, config))
    path = train_in(tmp_path, base, config, watch)
    assert watch.logged("resumed at step 2") and same(load_file(path), first)
    assert peek(path).metadata["controlnext.steps"] == "2"


def test_more_steps_go_on_from_a_finished_run(loaded_studio: Studio, tmp_path: Path) -> None:
    base = base_of(loaded_studio)
    train_in(tmp_path / "parts", base, small(steps=1))
    parts = train_in(tmp_path / "parts", base, small(steps=3))
    assert_same_run(tmp_path / "parts", tmp_path / "whole", parts, train_in(tmp_path / "whole", base, small(steps=3)))


def test_settings_changed_on_the_way_are_said_and_take_effect(loaded_studio: Studio, tmp_path: Path) -> None:
    base, watch = base_of(loaded_studio), Watcher()
    train_in(tmp_path, base, small(steps=1))
    before = last_state(tmp_path).tensors("weights")
    changed = small(steps=2, learning_rate=0.0, control_learning_rate=0.0, weight_decay=0.0)
    train_in(tmp_path, base, changed, watch)
    assert watch.logged("learning_rate 0.0001 -> 0.0")
    assert same(last_state(tmp_path).tensors("weights"), before), "at rate 0 nothing moves"


def test_an_average_that_is_switched_on_on_the_way_starts_from_the_weights_there(
    loaded_studio: Studio, tmp_path: Path
) -> None:
    base = base_of(loaded_studio)
    train_in(tmp_path, base, small(steps=1))
    before = last_state(tmp_path).tensors("weights")
    still = small(steps=2, ema_decay=0.9, learning_rate=0.0, control_learning_rate=0.0, weight_decay=0.0)
    train_in(tmp_path, base, still)
    average = last_state(tmp_path).tensors("ema")
    assert all(torch.equal(average[name], before[name]) for name in before)


@pytest.mark.parametrize(("key", "value"), [("trainable", "none"), ("seed", 1), ("fusion", "add"), ("gain", 0.5)])
def test_another_run_of_the_name_is_not_resumed(loaded_studio: Studio, tmp_path: Path, key: str, value: Any) -> None:
    base = base_of(loaded_studio)
    with pytest.raises(Stopped):
        train_in(tmp_path, base, small(), Watcher(stop_at=1))
    with pytest.raises(ConfigError, match=rf"{key} was .* and is {value!r}.*set resume = false"):
        train_in(tmp_path, base, small(**{key: value}))


def test_without_resume_the_earlier_run_is_set_aside_and_its_file_kept(loaded_studio: Studio, tmp_path: Path) -> None:
    base, watch = base_of(loaded_studio), Watcher()
    first = train_in(tmp_path, base, small(steps=1))
    second = train_in(tmp_path, base, small(steps=1, resume=False), watch)
    assert watch.logged("an earlier run of this name is now ")
    assert (first.name, second.name) == ("control.safetensors", "control_2.safetensors")
    assert same(load_file(first), load_file(second)), "the same seed"


def test_four_parts_of_one_sample_are_a_batch_of_four(loaded_studio: Studio) -> None:
    """Samples, order and noise are equal; the order of sums differs."""
    base, data = base_of(loaded_studio), drawn(6)
    settings = {"caption_dropout": 0.3, "hint_dropout": 0.3, "noise_offset": 0.1, "max_grad_norm": 0.0}
    whole = loop_on(base, small(batch_size=4, **settings), data)
    parts = loop_on(base, small(batch_size=1, accumulation=4, **settings), data)
    assert [whole.order.batch(step) for step in range(3)] == [parts.order.batch(step) for step in range(3)]
    one, other = gradients_of(whole), gradients_of(parts)
    assert one.keys() == other.keys()
    together = [torch.cat([gradient.flatten() for gradient in found.values()]) for found in (one, other)]
    assert relative(together[1], together[0]) < PARTS_AND_WHOLE
    assert take_steps(parts, 2) == pytest.approx(take_steps(whole, 2), rel=1e-5)


def test_the_learning_rates_follow_the_schedule_in_every_group(loaded_studio: Studio) -> None:
    config = small(steps=8, warmup_steps=4, schedule="linear")
    loop = loop_on(base_of(loaded_studio), config)
    for step in (0, 2, 6):
        take_steps(loop, 1, step)
        rates = [group["lr"] for group in loop.optimizer.param_groups]
        factor = config.learning_rate_schedule.factor(step)
        assert rates == [config.control_learning_rate * factor] * 2 + [config.learning_rate * factor] * 2


def test_gradients_are_shortened_over_everything_that_trains(loaded_studio: Studio) -> None:
    """SGD-like view of one step: with a tiny limit the gradient that AdamW remembers has that length."""
    loop = loop_on(base_of(loaded_studio), small(max_grad_norm=1e-3, beta1=0.0))
    take_steps(loop, 1)
    moments = [loop.optimizer.state[p]["exp_avg"].flatten() for p in loop.parameters.values()]
    assert float(torch.cat(moments).norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.03), ("fp16", 0.01)])
def test_half_precision_computes_and_what_trains_stays_fp32(
    loaded_studio: Studio, tmp_path: Path, precision: str, tolerance: float
) -> None:
    """The loss is near that of fp32: 8 and 11 bits through some 20 layers."""
    base, exact = base_of(loaded_studio), loop_on(base_of(loaded_studio), small())
    loop = loop_on(base, small(precision=precision))
    assert loop.scaler.is_enabled() == (precision == "fp16")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {p.dtype for p in loop.controlled.unet.parameters() if not p.requires_grad} == {dtype}
    expected, found = take_steps(exact, 2), take_steps(loop, 2)
    assert found == pytest.approx(expected, rel=tolerance) and found != expected
    assert {p.dtype for p in loop.parameters.values()} == {torch.float32}
    assert all(bool(p.isfinite().all()) for p in loop.parameters.values())
    assert all(bool(s["exp_avg"].isfinite().all()) for s in loop.optimizer.state.values())


def _spoil(monkeypatch: pytest.MonkeyPatch, after: int, spoiled: Any) -> None:
    """Make the output of a run's forwards pass through `spoiled`, from the n-th on."""
    forward, calls = Controlled.forward, [0]

    def wrapped(self: Controlled, *args: Any) -> Any:
        calls[0] += 1
        out = forward(self, *args)
        return spoiled(out) if calls[0] > after else out

    monkeypatch.setattr(Controlled, "forward", wrapped)


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_last_state(
    loaded_studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil(monkeypatch, 3, lambda out: out * float("nan"))  # one forward is the trial step
    with pytest.raises(TrainingError, match=r"step 3 is nan.*The last saved state is .*state-00000002.*Lower the lear"):
        train_in(tmp_path, base_of(loaded_studio), small(steps=4, save_every=1))
    assert last_state(tmp_path).step == 2
    assert all(bool(t.isfinite().all()) for t in last_state(tmp_path).tensors("weights").values())


def test_a_gradient_that_is_no_number_is_never_taken_over_nor_saved(
    loaded_studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finite_with_a_bad_gradient(out: torch.Tensor) -> torch.Tensor:
        return out + (out - out.detach()).clamp(min=0).sqrt()  # the root's slope at 0 is infinite

    _spoil(monkeypatch, 2, finite_with_a_bad_gradient)
    with pytest.raises(TrainingError, match=r"gradient of step 2 is (nan|inf).*state-00000001"):
        train_in(tmp_path, base_of(loaded_studio), small(steps=3, save_every=1))
    weights = last_state(tmp_path).tensors("weights")
    assert last_state(tmp_path).step == 1 and all(bool(t.isfinite().all()) for t in weights.values())


@pytest.mark.parametrize("after", [0, 2])
def test_too_little_memory_ends_the_run_with_advice(
    loaded_studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    import comfy.model_management

    def full(out: torch.Tensor) -> torch.Tensor:
        raise comfy.model_management.OOM_EXCEPTION("no room")

    _spoil(monkeypatch, after, full)
    with pytest.raises(TrainingError, match="does not fit into the device's memory.*checkpointing = true") as error:
        train_in(tmp_path, base_of(loaded_studio), small(save_every=1))
    where = "No state was saved yet" if after == 0 else "The last saved state is"
    assert where in str(error.value)


def test_the_host_says_what_is_out_of_memory() -> None:
    """Some drivers throw torch.AcceleratorError for it, which the host's own test knows where it has one."""
    import comfy.model_management
    from comfyui_controlnext.controlnext_training.base_model.encode import is_out_of_memory

    assert is_out_of_memory(comfy.model_management.OOM_EXCEPTION("no room"))
    assert not is_out_of_memory(ValueError("out of memory"))
    if not hasattr(comfy.model_management, "is_oom"):
        pytest.skip("this ComfyUI knows one error of a full device alone (no model_management.is_oom)")
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))
    assert not is_out_of_memory(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))


def test_the_log_holds_every_step_and_the_trial_step_its_cost(loaded_studio: Studio, tmp_path: Path) -> None:
    watch = Watcher()
    train_in(tmp_path, base_of(loaded_studio), small(), watch)
    lines = [json.loads(line) for line in (tmp_path / "runs/control/log.jsonl").read_text("utf-8").splitlines()]
    assert [line["event"] for line in lines] == ["start", "dry_run", "step", "step", "step", "finished"]
    assert lines[1]["trained"] > 3e6 and lines[1]["peak_bytes"] > 0
    assert lines[2]["control_learning_rate"] == 1e-3 and lines[2]["gradient"] > 0
    assert watch.logged("numbers train; one step takes") and watch.logged("finished after 3 steps")
    assert "step 3/3  loss " in watch.lines[-1]


MIB = 2**20


def peak_known() -> bool:
    """True: this machine resets the peak memory of a process when requested. False: some containers cannot."""
    held = b"x" * (300 * MIB)
    del held
    before = results._highest()
    with contextlib.suppress(OSError):
        results.STATUS.with_name("clear_refs").write_text("5")
    return results._highest() < before - 200 * MIB


def test_the_peak_of_a_step_is_what_was_held_in_it_and_not_what_was_held_before() -> None:
    if not peak_known():
        pytest.skip("this machine does not say the peak of a part of a process")
    before = b"x" * (300 * MIB)
    del before
    meter = Meter(CPU)
    start = meter.read()[1]
    held = b"x" * (120 * MIB)
    del held
    found = meter.read()[1]
    assert 110 * MIB < found - start < 130 * MIB


@pytest.mark.parametrize(("later", "peak"), [(9_000_000, None), (9_500_000, 9_500_000 * 1024)])
def test_a_peak_that_is_never_started_anew_counts_only_where_it_rose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: int, peak: int | None
) -> None:
    status = tmp_path / "status"
    monkeypatch.setattr(results, "STATUS", status)
    status.write_text("VmPeak:\t99 kB\nVmHWM:\t9000000 kB\n")
    meter = Meter(CPU)
    status.write_text(f"VmPeak:\t99 kB\nVmHWM:\t{later} kB\n")
    found = meter.read()[1]
    assert found == peak if peak else 50 * MIB < found < 9_000_000 * 1024


def test_lines_of_the_log_are_means_of_their_interval_also_after_a_stop(loaded_studio: Studio, tmp_path: Path) -> None:
    base, config = base_of(loaded_studio), small(steps=5, log_every=3)
    with contextlib.suppress(Stopped):
        train_in(tmp_path, base, config, Watcher(stop_at=0))
    train_in(tmp_path, base, small(steps=4, log_every=3, save_every=4))
    train_in(tmp_path, base, config)
    losses = last_state(tmp_path).tensors("losses")["loss"]
    lines = [json.loads(line) for line in (tmp_path / "runs" / "control" / "log.jsonl").read_text("utf-8").splitlines()]
    found = {line["step"]: (line["steps"], line["loss"]) for line in lines if line["event"] == "step"}
    assert found.keys() == {3, 4, 5}
    for step, count in ((3, 3), (4, 1), (5, 2)):
        assert found[step] == (count, pytest.approx(float(losses[step - count : step].mean()), rel=1e-12))


def test_a_stop_while_encoding_claims_no_state(loaded_studio: Studio, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="stopped after 0 steps, before the first state; only encoded samples") as stopped:
        train_in(tmp_path, base_of(loaded_studio), small(), Watcher(stop_at=0))
    assert stopped.value.where is None and "saved in" not in str(stopped.value)
