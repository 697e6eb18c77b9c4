"""Interrupted training at any place saves the complete steps, and resumes to the result of an uninterrupted run."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_training import state
from comfyui_controlnext.controlnext_training.averaging import Ema
from comfyui_controlnext.controlnext_training.base_model import conditioning
from comfyui_controlnext.controlnext_training.base_model.controlled import Controlled
from comfyui_controlnext.controlnext_training.base_model.encode import BaseWithEncoders
from comfyui_controlnext.controlnext_training.data import cache as caches
from comfyui_controlnext.controlnext_training.data.cache import Cache
from comfyui_controlnext.controlnext_training.data.index import Index
from comfyui_controlnext.controlnext_training.data.tree import Blob
from comfyui_controlnext.controlnext_training.train import Stopped, TrainingError
from comfyui_controlnext.controlnext_training.undisturbed import undisturbed
from comfyui_controlnext.controlnext_training.validation import Validator
from comfyui_controlnext.tests.fixtures.sampling_fixtures import Studio
from comfyui_controlnext.tests.fixtures.training_fixtures import Watcher, base_of, same, same_nested, small, train_in
from comfyui_controlnext.tests.host.test_interruptions import ERRORS, lay
from PIL import Image
from safetensors.torch import load_file

pytestmark = pytest.mark.comfy

SETTINGS: dict[str, Any] = {
    "variant": "xs",
    "xs_ratio": 0.05,
    "steps": 4,
    "ema_decay": 0.9,
    "validate_every": 3,
    "validation_samples": 1,
    "validation_steps": 1,
}


@pytest.fixture(scope="module")
def whole(loaded_studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    train_in(folder, base_of(loaded_studio), small(**SETTINGS))
    return folder


def last(folder: Path) -> state.State:
    found = state.latest(folder / "runs" / "control")
    assert found is not None
    return found


def cut(folder: Path, studio: Studio, name: str, save_every: int = 1000) -> Watcher:
    """Run that ends with that error; returns its messages."""
    watch = Watcher()
    with pytest.raises(Stopped if name == "cancel" else type(ERRORS[name]())) as raised:
        train_in(folder, base_of(studio), small(**SETTINGS, save_every=save_every), watch)
    if name == "cancel":
        watch.said.append(str(raised.value))
    left = [path.name for path in folder.rglob("*") if path.name.startswith((".unfinished", state.UNFINISHED))]
    assert not left and not any(path.suffix == ".tmp" for path in folder.rglob("*"))
    return watch


def assert_ends_as(folder: Path, whole: Path, studio: Studio) -> None:
    path = train_in(folder, base_of(studio), small(**SETTINGS))
    assert same_nested(last(folder).optimizer(), last(whole).optimizer())
    for part in ("weights", "ema", "losses"):
        assert same(last(folder).tensors(part), last(whole).tensors(part)), part
    assert same(load_file(path), load_file(whole / "out" / "control.safetensors"))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("cancel", "exit"),
        ("ctrl_c", "other"),
        pytest.param("exit", "cancel", marks=pytest.mark.long),
        pytest.param("other", "ctrl_c", marks=pytest.mark.long),
    ],
)
def test_cut_off_in_a_forward_and_in_a_validation_it_saves_and_ends_as_if_nobody_had(
    loaded_studio: Studio, whole: Path, tmp_path: Path, first: str, second: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        block = loaded_studio.model.model.diffusion_model.__class__
        lay_in_class(patch, block, "_forward", ERRORS[first](), 4)  # the trial step, two steps, and the third's
        watch = cut(tmp_path, loaded_studio, first)
    assert last(tmp_path).step == 2 and watch.logged("stopped after 2 steps; saved in ")
    with pytest.MonkeyPatch.context() as patch:
        lay_in_class(patch, Controlled, "denoised", ERRORS[second](), 2)  # amid the pictures, averaged weights in
        watch = cut(tmp_path, loaded_studio, second)
    assert last(tmp_path).step == 3 and watch.logged("stopped after 3 steps; saved in ")
    assert_ends_as(tmp_path, whole, loaded_studio)


@pytest.mark.long
def test_memory_that_runs_out_in_a_step_keeps_the_last_state_and_in_a_validation_ends_nothing(
    loaded_studio: Studio, whole: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        block = loaded_studio.model.model.diffusion_model.__class__
        lay_in_class(patch, block, "_forward", ERRORS["out_of_memory"](), 4)  # as above
        with pytest.raises(TrainingError, match="does not fit into the device's memory"):
            train_in(tmp_path, base_of(loaded_studio), small(**SETTINGS, save_every=1))
    assert last(tmp_path).step == 2
    with pytest.MonkeyPatch.context() as patch:
        trap = lay_in_class(patch, Controlled, "denoised", ERRORS["out_of_memory"](), 2)
        assert_ends_as(tmp_path, whole, loaded_studio)
    assert trap[0] <= 0, "the error was raised"


def lay_in_class(patch: pytest.MonkeyPatch, owner: type, name: str, error: BaseException, at: int) -> list[int]:
    """Trap as of `lay`, for a method: the n-th call of any object raises. Returns the calls left until then."""
    inner, left = getattr(owner, name), [at]

    def trapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise error
        return inner(self, *args, **kwargs)

    patch.setattr(owner, name, trapped)
    return left


@pytest.mark.parametrize("name", ["ctrl_c", pytest.param("exit", marks=pytest.mark.long)])
def test_cut_off_in_the_middle_of_a_change_it_goes_on_from_the_last_whole_state(
    loaded_studio: Studio, whole: Path, tmp_path: Path, name: str
) -> None:
    """The weights have moved and their average has not: that is the state of no step."""
    with pytest.MonkeyPatch.context() as patch:
        lay_in_class(patch, Ema, "update", ERRORS[name](), 4)
        watch = cut(tmp_path, loaded_studio, name, save_every=2)
    assert last(tmp_path).step == 2 and watch.logged("stopped after 2 steps; saved in ")
    assert_ends_as(tmp_path, whole, loaded_studio)


def test_cut_off_while_a_state_is_written_it_is_written_again(
    loaded_studio: Studio, whole: Path, tmp_path: Path
) -> None:
    from comfyui_controlnext.controlnext_core import checkpoint

    with pytest.MonkeyPatch.context() as patch:
        lay(patch, checkpoint, "save", KeyboardInterrupt(), 2)
        watch = cut(tmp_path, loaded_studio, "ctrl_c", save_every=2)
    assert last(tmp_path).step == 2 and watch.logged("stopped after 2 steps; saved in ")
    assert_ends_as(tmp_path, whole, loaded_studio)


@pytest.mark.parametrize(
    ("name", "place"), [("cancel", "latent"), ("ctrl_c", "encode_text"), ("exit", "latent"), ("other", "encode_text")]
)
def test_cut_off_in_an_encoders_pass_it_keeps_what_is_encoded(
    loaded_studio: Studio, tmp_path: Path, name: str, place: str
) -> None:
    base, config = base_of(loaded_studio), small(steps=1, cache=True)
    owner: Any = BaseWithEncoders if place == "latent" else conditioning
    with pytest.MonkeyPatch.context() as patch:
        if place == "latent":
            lay_in_class(patch, owner, place, ERRORS[name](), 2)
        else:
            lay(patch, owner, place, ERRORS[name](), 2)
        with pytest.raises(type(ERRORS[name]())):
            train_in(tmp_path, base, config)
    kept = sorted(path.name for path in (tmp_path / "cache").rglob("*.safetensors"))
    assert kept and not list((tmp_path / "cache" / "unfinished").iterdir())
    assert state.latest(tmp_path / "runs" / "control") is None and not torch.is_inference_mode_enabled()
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        inner = getattr(owner, place)
        patch.setattr(owner, place, lambda self, what: seen.append(what) or inner(self, what))
        store_again(base, config, tmp_path)
    assert len(seen) == (3 if place == "latent" else 4), "the first is not encoded again"


def store_again(base: Any, config: Any, folder: Path) -> None:
    """Encode the samples that a run would."""
    from comfyui_controlnext.controlnext_training.distributed import ProcessGroup
    from comfyui_controlnext.controlnext_training.encoded import Store
    from comfyui_controlnext.tests.fixtures.training_fixtures import drawn

    Store(base, drawn(), config, Cache(folder / "cache")).prepare(range(4), ProcessGroup(), Watcher())


@pytest.mark.parametrize("name", list(ERRORS))
def test_cut_off_while_something_is_kept_no_part_of_a_file_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cache, value = Cache(tmp_path), {"latent": torch.rand(3)}
    lay(monkeypatch, caches.os, "replace", ERRORS[name]())
    with pytest.raises(type(ERRORS[name]())):
        cache.put("key", value)
    assert "key" not in cache and not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert cache.put("key", value) and same(cache.get("key") or {}, value)


def test_files_that_were_read_before_a_cancel_are_not_read_again(tmp_path: Path) -> None:
    blobs = []
    for number in range(3):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (8, 8)).save(path)
        blobs.append(Blob(path, path.name))

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Index(tmp_path / "index.json").facts(blobs, stop)
    counts: list[tuple[int, int]] = []
    Index(tmp_path / "index.json").facts(blobs, lambda done, total: counts.append((done, total)))
    assert counts == [(3, 3)]


def test_a_ctrl_c_waits_while_the_weights_change() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt):
        with undisturbed():
            signal.raise_signal(signal.SIGINT)
            reached.append("the end")
    assert reached == ["the end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(ValueError), undisturbed():
        raise ValueError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    thread = threading.Thread(target=lambda: reached.append(list(map(str, [undisturbed().__enter__()]))))
    thread.start()
    thread.join()
    assert len(reached) == 2, "other threads, which cannot set handlers, go on"


def test_a_ctrl_c_in_the_optimizer_is_of_the_next_moment(
    loaded_studio: Studio, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real signal amid the change of the second step: the step is done, saved, and the run ends."""
    update, calls = Ema.update, [0]

    def interrupted(self: Any, parameters: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            signal.raise_signal(signal.SIGINT)
        update(self, parameters)

    monkeypatch.setattr(Ema, "update", interrupted)
    watch = cut(tmp_path, loaded_studio, "ctrl_c")
    assert last(tmp_path).step == 2 and watch.logged("stopped after 2 steps; saved in ")
    assert_ends_as(tmp_path, whole, loaded_studio)


def test_a_validator_that_is_cut_off_leaves_the_network_in_training(
    loaded_studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    run = Validator.run

    def noted(self: Any, controlled: Any, *tell: Any) -> Any:
        seen.append(controlled)
        return run(self, controlled, *tell)

    monkeypatch.setattr(Validator, "run", noted)
    lay_in_class(monkeypatch, Validator, "_pictures", KeyboardInterrupt(), 1)
    cut(tmp_path, loaded_studio, "ctrl_c")
    assert seen[0].training and torch.is_grad_enabled()
