"""Isolation of the nodes: they use no network, start no process, and load no pickle with a class."""

from __future__ import annotations

import ast
import io
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.hints import HINTS
from comfyui_controlnext.tests.fixtures.data_fixtures import coordinates, encoded, pairs
from comfyui_controlnext.tests.fixtures.sampling_fixtures import picture
from comfyui_controlnext.tools.tiny_models import make_controlnet_xs, make_controlnext, make_unet_difference
from safetensors.torch import load_file

if TYPE_CHECKING:
    from comfyui_controlnext.tests.fixtures.sampling_fixtures import Studio

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("controlnext_core", "controlnext_training", "models", "nodes")
TALKS = ("controlnext_training/queue_training.py",)
"""Client of a running ComfyUI that a user starts by hand; no node imports it."""
BLOCKED = (
    *(
        "socket.connect",
        "socket.bind",
        "socket.getaddrinfo",
        "socket.gethostbyname",
        "urllib.Request",
        "http.client.send",
    ),
    *(
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.startfile",
        "os.fork",
        "os.forkpty",
    ),
    *("pickle.find_class", "marshal.loads"),
)
"""Audit events of Python for network, processes and pickles."""

_blocking: list[bool] = []


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if _blocking and event in BLOCKED and not _is_import(event):
        raise AssertionError(f"{event}{arguments!r} while a node runs")


def _is_import(event: str) -> bool:
    """True: the event is a late import, which reads its .pyc file by marshal. False: another event."""
    frame: Any = sys._getframe()
    while event == "marshal.loads" and frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@pytest.fixture(scope="module")
def watched() -> Any:
    """Context inside which BLOCKED events raise. An audit hook cannot be removed, only deactivated."""
    sys.addaudithook(_refuse)

    @contextmanager
    def blocking() -> Iterator[None]:
        _blocking.append(True)
        try:
            yield
        finally:
            _blocking.pop()

    return blocking


def test_the_block_holds(watched: Any) -> None:
    import pickle

    attempts = (
        lambda: socket.create_connection(("127.0.0.1", 9)),
        lambda: socket.getaddrinfo("localhost", 9),
        lambda: subprocess.run([sys.executable, "-c", ""]),
        lambda: pickle.Unpickler(io.BytesIO(b"cos\nsystem\n.")).load(),
    )
    for attempt in attempts:
        with watched(), pytest.raises(AssertionError, match="while a node runs"):
            attempt()


@pytest.mark.comfy
def test_controls_are_loaded_sampled_inspected_and_saved_without_the_outside(
    watched: Any, studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.inspecting import inspect_file
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.saving import save_control
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    path = make_controlnext(tmp_path / "controlnet.safetensors", "gen2")
    make_unet_difference(tmp_path / "unet.safetensors")
    xs = make_controlnet_xs(tmp_path / "xs.safetensors")
    old = tmp_path / "old.pth"
    torch.save(load_file(path), old)
    image = picture()
    with watched(), torch.inference_mode():
        loaded = studio.load(str(path), "auto")
        old_control = studio.load(str(old)).control
        samples = studio.sample(loaded.model, *studio.stock(loaded.control, image))
        studio.sample(None, *studio.stock(old_control, image))
        studio.sample(None, *studio.stock(load_controlnet_xs(xs).control, image))
        inspect_file(path)
        inspect_file(xs)
        save_control(loaded.control, loaded.model, "controlnext/kept", "single", "fp16")
        for draw in HINTS.values():
            assert draw(image[0].numpy()).shape == image.shape[1:]
    assert samples.isfinite().all()


@pytest.mark.comfy
def test_data_is_opened_and_a_control_trained_without_the_outside(
    watched: Any, loaded_studio: Studio, tmp_path: Path
) -> None:
    from comfyui_controlnext.controlnext_training.data import open_dataset
    from comfyui_controlnext.controlnext_training.data.report import report
    from comfyui_controlnext.tests.fixtures.training_fixtures import base_of, small, train_in

    pairs(tmp_path / "data")
    with watched():
        data = open_dataset([tmp_path / "data"], resolution=64, bucket_step=64, roots=[tmp_path])
        assert report(data).text and len(data) == 3
        trained = train_in(tmp_path, base_of(loaded_studio), small(steps=1), data=data)
    assert trained is not None


def test_rows_are_read_without_the_outside(watched: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
    from comfyui_controlnext.controlnext_training.data import open_dataset

    drawing = encoded(coordinates(64, 64))
    datasets.Dataset.from_dict({"image": [drawing], "hint": [drawing]}).to_parquet(str(tmp_path / "a.parquet"))
    with watched():
        data = open_dataset([tmp_path / "a.parquet"], resolution=64, index=tmp_path / "cache" / "index.json")
        assert data.load(0).frames.shape == (1, 64, 64, 3)


def calls_of(source: str) -> set[str]:
    """Names of modules that a file imports, at any place."""
    tree = ast.parse(source)
    found = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    return found | {
        (n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) if not n.level
    }


OUTSIDE = {
    "socket",
    "ssl",
    "http",
    "urllib",
    "ftplib",
    "smtplib",
    "requests",
    "aiohttp",
    "subprocess",
    "multiprocessing",
}


def test_no_file_of_the_nodes_imports_what_reaches_outside() -> None:
    assert calls_of("import os, urllib.request\nfrom subprocess import run") == {"os", "urllib", "subprocess"}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if name not in TALKS:
                assert not calls_of(path.read_text("utf-8")) & OUTSIDE, name
