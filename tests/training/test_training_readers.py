"""Prefetching of files: the same bits with any number of readers, no unneeded file opened, no process left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.controlnext_training.config import TrainConfig
from comfyui_controlnext.controlnext_training.config_files import as_toml
from comfyui_controlnext.controlnext_training.data import BrokenSample, Cache, open_dataset
from comfyui_controlnext.controlnext_training.data.tree import Blob
from comfyui_controlnext.controlnext_training.distributed import ProcessGroup
from comfyui_controlnext.controlnext_training.packed import bytes_of, floats_of, pack, unpack
from comfyui_controlnext.controlnext_training.readers import ThreadReaders
from comfyui_controlnext.tests.fixtures.data_fixtures import coordinates, pairs, write
from comfyui_controlnext.tests.fixtures.training_fixtures import Watcher, base_of, same, small
from comfyui_controlnext.tests.training.test_training_encoded import store_of
from comfyui_controlnext.tools.reader_processes import ProcessReaders

if TYPE_CHECKING:
    from comfyui_controlnext.controlnext_training.data import FileDataset
    from comfyui_controlnext.tests.conftest import TinyModels
    from comfyui_controlnext.tests.fixtures.sampling_fixtures import Studio

PROCESS = Path(__file__).parents[1] / "fixtures" / "training_process.py"
NAMES = tuple(f"picture {number}" for number in range(6))
PATIENCE = 30.0
"""Seconds in which a process whose run was killed must have ended."""


def opened(root: Path, **options: Any) -> FileDataset:
    return open_dataset(root, **{"resolution": 64, "bucket_step": 64, **options})


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read from now on."""
    names: list[str] = []
    real = Blob.read
    monkeypatch.setattr(Blob, "read", lambda blob: names.append(blob.name) or real(blob))
    return names


def large(root: Path, size: tuple[int, int] = (90, 70)) -> Path:
    """Pictures that are shrunk, with hints whose values come between whole numbers by that, and a mask."""
    pairs(root, NAMES, size)
    for number, name in enumerate(NAMES[:2]):
        write(root / "masks" / f"{name}.png", coordinates(*size, number)[..., 0])
    return root


@pytest.mark.comfy
@pytest.mark.parametrize("cache", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_run_gives_the_same_bits_with_any_number_of_readers(
    loaded_studio: Studio, tmp_path: Path, cache: bool
) -> None:
    from comfyui_controlnext.controlnext_training.train import train
    from comfyui_controlnext.tests.fixtures.training_fixtures import run_in

    data, found = opened(large(tmp_path / "data"), hint="soft_edge"), []
    processes: list[ProcessReaders] = []

    def make_processes(count: int) -> ProcessReaders:
        processes.append(ProcessReaders(count))
        return processes[-1]

    for make, workers in ((ThreadReaders, 0), (ThreadReaders, 3), (make_processes, 1 if cache else 2)):
        base, folder = base_of(loaded_studio), tmp_path / f"{make.__name__} {workers}"
        config = small(workers=workers, steps=2, batch_size=2, cache=cache, mask_weight=1.0)
        found.append(
            checkpoint.load(train(base, data, None, config, run_in(folder, base), Watcher(), make_readers=make))
        )
    assert same(found[0], found[1]) and same(found[0], found[2])
    (used,) = processes
    assert used.began == config.workers and used._started == [], "they read, and none is left"


@pytest.fixture(params=["windows", pytest.param("here", marks=pytest.mark.long)])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """windows: processes are spawned by default, as on macOS too, and no signal can be held back."""
    before = multiprocessing.get_start_method(allow_none=True)
    if request.param == "windows":
        multiprocessing.set_start_method("spawn", force=True)
        for name in ("pthread_sigmask", "SIGHUP"):
            monkeypatch.delattr(signal, name, raising=False)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.comfy
def test_a_process_reads_the_same_bits_and_may_end_and_none_is_left(tmp_path: Path, system: str) -> None:
    data, readers = opened(large(tmp_path / "data"), hint="soft_edge"), ProcessReaders(1)
    (tmp_path / "data" / "images" / f"{NAMES[5]}.png").unlink()
    alone, together = store_of(data), store_of(data)
    together.readers = readers
    try:
        begun = [together.begin(index, index, 0) for index in range(6)]
        for index in range(5):
            one, other = alone.sample(index, index), together.finish(begun[index])
            assert torch.equal(one.latent, other.latent) and torch.equal(one.hint, other.hint)
            assert one.mask is other.mask is None or torch.equal(one.mask, other.mask)
        with pytest.raises(BrokenSample, match=f"{NAMES[5]}.png"):
            together.finish(begun[5])
        ((process, _),) = readers._started
        assert type(process).__name__ == "SpawnProcess", "a fork of a process with threads is not safe"
        process.kill()
        process.join()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store_of(data).cache.__class__, "__contains__", lambda *given: False)
            assert torch.equal(together.finish(together.begin(0, 0, 0)).hint, alone.sample(0, 0).hint)
    finally:
        readers.close()
    assert not alive(process.pid) and readers._started == []


@pytest.mark.comfy
def test_a_file_is_read_again_only_where_something_of_it_is_needed(tmp_path: Path, read: list[str]) -> None:
    data = opened(large(tmp_path / "data"))
    store = store_of(data, Cache(tmp_path / "cache"), cache=True)
    store.readers = ThreadReaders(1)
    fresh = [store_of(data).sample(index, index) for index in range(6)]
    read.clear()
    store.prepare(range(6), ProcessGroup(), Watcher())
    assert sorted(read) == sorted(blob for blob in files_of(data)), "each once"
    read.clear()
    for index, one in enumerate(fresh):
        other = store.sample(index, index)
        assert torch.equal(one.hint, other.hint) and other.hint.is_contiguous()
        assert (one.mask is None) == (other.mask is None) == (index > 1)
        assert one.mask is None or torch.equal(one.mask, other.mask)
    store.readers.close()
    assert read == []
    for path in (tmp_path / "cache").rglob("hint-*"):
        path.unlink()
    store.readers = ThreadReaders(0)
    assert torch.equal(store.sample(0, 0).hint, fresh[0].hint)
    assert sorted(read) == [f"hints/{NAMES[0]}.png", f"masks/{NAMES[0]}.png"], "its latent is there"


def files_of(data: FileDataset) -> Iterator[str]:
    for item in data.items:
        for frames in (item.clip.images, item.clip.hints, item.clip.masks):
            yield from [] if frames is None else [blob.name for blob in frames.blobs]  # type: ignore[attr-defined]


@pytest.mark.comfy
def test_files_of_later_steps_are_read_while_a_step_computes(tmp_path: Path) -> None:
    from comfyui_controlnext.controlnext_training.encoded import Prefetcher

    store = store_of(opened(large(tmp_path / "data")))
    store.readers = ThreadReaders(2)
    ahead, steps = Prefetcher(store, range(6), Watcher().say), [((index, index),) for index in range(6)]
    assert ahead.steps_ahead(1) == 3 and ahead.steps_ahead(4) == 1
    ahead.get(steps[0], steps[1:4])
    begun = [ahead.begun[step].result()[0] for step in steps[1:4]]
    assert all(one._coming is not None or one._read is not None for one in begun)
    ahead.close()
    store.readers.close()


class Counted(Sequence[int]):
    """Iterator of a million ascending numbers, the last two of which are 2 and 3; each access is counted."""

    looks = 0

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, place: Any) -> int:
        self.looks += 1
        return place - 999_996


@pytest.mark.comfy
def test_a_sample_of_a_million_is_found_without_a_look_at_all(tmp_path: Path) -> None:
    from comfyui_controlnext.controlnext_training.encoded import Prefetcher

    store = store_of(opened(large(tmp_path / "data")))
    usable = Counted()
    ahead = Prefetcher(store, usable, Watcher().say)
    assert torch.equal(ahead.get(((3, 0),), [])[0].hint, store.sample(3, 0).hint)
    assert usable.looks < 30
    ahead.close()


def test_packed_hints_are_what_they_were_and_gray_ones_take_a_third() -> None:
    rng = torch.Generator().manual_seed(0)
    for values in (torch.rand(3, 20, 30, generator=rng), torch.rand(1, 20, 30, generator=rng).expand(3, -1, -1)):
        packed = pack(bytes_of(values))
        found = floats_of(unpack(packed, 3, (20, 30)))
        assert (found - values).abs().max() <= 0.5 / 255 + 1e-7
        assert torch.equal(bytes_of(found), bytes_of(values))
    assert len(packed) < 700
    assert len(pack(torch.zeros(3, 512, 512, dtype=torch.uint8))) < 2000
    with pytest.raises(ValueError, match="600 packed numbers are not 31x20"):
        unpack(packed, 3, (20, 31))


def alive(pid: int) -> bool:
    """True: the process runs. False: it is gone, or dead and not yet collected."""
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(what: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.05)
    return what()


@pytest.mark.comfy
@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no groups of processes")
@pytest.mark.parametrize("how", ["kill", "terminal"])
def test_a_run_that_is_killed_or_stopped_leaves_no_process(
    host: Path, tiny: TinyModels, tmp_path: Path, how: str
) -> None:
    import psutil

    large(tmp_path / "data")
    config = TrainConfig(
        variant="xs",
        base=str(tiny.models / "checkpoints" / tiny.names["checkpoint"]),
        data=("data",),
        resolution=64,
        steps=100_000,
        validate_every=0,
        log_every=1,
        cache=False,
        workers=2,
        precision="fp32",
        runs_folder="runs",
        output_folder="out",
    )
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(as_toml(config), "utf-8")
    run = subprocess.Popen([sys.executable, str(PROCESS), str(host), str(recipe)], cwd=tmp_path, start_new_session=True)
    out = recipe.with_suffix(".out")
    assert until(lambda: out.is_file() and "step 5/" in out.read_text("utf-8"), 240)
    children = [child.pid for child in psutil.Process(run.pid).children(recursive=True)]
    assert len(children) >= 2
    if how == "kill":
        run.kill()
        run.wait()
    else:
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(60) == 130, out.read_text("utf-8")
        assert "Traceback" not in out.read_text("utf-8") and "has ended" not in out.read_text("utf-8")
    assert until(lambda: not any(map(alive, children)), PATIENCE)
