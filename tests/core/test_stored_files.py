"""Weight files whose content contradicts their header, or that change while they are in use."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint, numbers_in_names
from comfyui_controlnext.controlnext_core.checkpoint import CheckpointError, load, peek
from comfyui_controlnext.controlnext_core.published_unets import unet_config_of
from comfyui_controlnext.controlnext_core.xs_detection import read_xs_file
from comfyui_controlnext.tools.tiny_models import make_controlnext, make_unet_difference
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from comfyui_controlnext.tests.fixtures.sampling_fixtures import Studio

ROOT = Path(__file__).resolve().parents[2]

# -- files that change ------------------------------------------------------------------------------------------------

IN_USE = """
import os, runpy, sys
runpy.run_path(sys.argv[1])
from comfyui_controlnext.controlnext_core import checkpoint
loaded = checkpoint.load(sys.argv[2])
os.truncate(sys.argv[2], 100)
print(sum(float(tensor.double().sum()) for tensor in loaded.values()))
"""


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_file_cut_short_while_its_tensors_are_in_use_ends_nothing(tmp_path: Path, suffix: str) -> None:
    """Mapped memory behind the end of its file is a SIGBUS, which ends the process."""
    path, tensors = tmp_path / f"x{suffix}", {f"w{i}": torch.ones(64, 1024) for i in range(4)}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    command = [sys.executable, "-c", IN_USE, str(ROOT / "_alias.py"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "262144.0"), done.stderr


@pytest.mark.comfy
def test_weights_on_a_model_do_not_change_with_their_files(tmp_path: Path, studio: Studio) -> None:
    paths = [tmp_path / "controlnet.safetensors", tmp_path / "unet.safetensors"]
    make_controlnext(paths[0], "gen2")
    make_unet_difference(paths[1])
    loaded = studio.load(str(paths[0]), "auto")
    held = [
        *loaded.control.net.patcher.model.state_dict().values(),
        *(patch[0][1][0] for patch in loaded.model.patches.values()),
    ]
    before = [tensor.clone() for tensor in held]
    for path in paths:
        with open(path, "r+b") as file:
            file.write(bytes(path.stat().st_size))
    assert len(held) > 60 and all(torch.equal(*pair) for pair in zip(held, before, strict=True))


def test_tensors_that_are_read_later_see_that_the_file_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4), "b": torch.zeros(4)}, path)
    found = checkpoint.open_tensors(path, {"first": "a", "second": "b"})
    assert list(found) == ["first", "second"] and checkpoint.shape_of(found, "first") == (4,)
    assert torch.equal(found["first"], torch.ones(4))
    with pytest.raises(KeyError):
        found["a"]
    save_file({"a": torch.ones(5), "b": torch.zeros(4)}, path)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: cannot be read \(it was changed while"):
        found["second"]
    with pytest.raises(CheckpointError, match=r"1 missing: c\. It was changed meanwhile: load it again"):
        load(path, ["c"])


# -- small files that claim much --------------------------------------------------------------------------------------


class Calls:
    """Object that unpickles into a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def expanded() -> dict[str, torch.Tensor]:
    return {"mid_convs.1.weight": torch.zeros(1).expand(256, 128, 300, 300)}


def beyond() -> dict[str, Any]:
    """Tensor whose strides exceed its storage: torch enlarges the storage."""
    storage = torch.zeros(4)
    rebuild = torch._utils._rebuild_tensor_v2  # type: ignore[attr-defined]
    return {"x": Calls(rebuild, storage.storage(), 0, (200, 3), (3, 1), False, {})}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:.*quantized tensor creation")
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (expanded, "its tensors claim 11,796,480,000 bytes, and the file has"),
        (beyond, "'x' reaches to byte 2,400 of the 16"),
        (lambda: {"x": Calls(bytearray, 10**10)}, "holds more than tensors"),
        (lambda: {"x": torch.eye(3).to_sparse()}, "its tensor 'x' is sparse, and plain numbers are needed"),
        (lambda: {"x": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, "its tensor 'x' is quantised"),
    ],
    ids=["expanded", "beyond", "bytearray", "sparse", "quantised"],
)
def test_a_pickle_that_claims_more_than_it_holds_is_refused(
    tmp_path: Path, content: Callable[[], Any], words: str, zipped: bool
) -> None:
    path = tmp_path / "x.ckpt"
    torch.save(content(), path, _use_new_zipfile_serialization=zipped)
    assert path.stat().st_size < 8000
    with pytest.raises(CheckpointError, match=words):
        load(path)


def test_many_names_of_one_storage_are_listed_and_not_loaded(tmp_path: Path) -> None:
    shared = torch.zeros(1 << 20)
    torch.save({f"x{i}": shared for i in range(200)}, tmp_path / "x.ckpt")
    assert len(peek(tmp_path / "x.ckpt").shapes) == 200
    with pytest.raises(CheckpointError, match="its tensors claim 838,860,800 bytes, and the file has"):
        load(tmp_path / "x.ckpt")


def rezip(path: Path, compression: int) -> None:
    """Copy of the archive with its parts compressed."""
    with zipfile.ZipFile(path) as old:
        parts = {part.filename: old.read(part) for part in old.infolist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, content in parts.items():
            new.writestr(name, content)


def test_an_archive_that_is_compressed_is_refused_by_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"x": torch.zeros(1 << 22)}, path)
    rezip(path, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    for read in (peek, load):
        with pytest.raises(CheckpointError, match="its archive is compressed or encrypted, as torch does not write it"):
            read(path)


def test_a_memo_of_two_gigabytes_is_not_made(tmp_path: Path) -> None:
    """Python's own unpickler in C makes room for the number in the file."""
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}" + pickle.LONG_BINPUT + struct.pack("<I", 2**31 - 1) + b".")
        archive.writestr("x/data/0", b"")
    assert peek(path).shapes == {}


def write_header(path: Path, names: list[str]) -> Path:
    """Write a safetensors file of these names, each of one byte."""
    table = {name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate(names)}
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(len(names)))
    return path


MANY = 20_000


@pytest.mark.parametrize("part", ["down_blocks.0.resnets.{}.x", "down_blocks.{}.x", "down_blocks.{}.resnets.0.x"])
def test_thousands_of_numbered_names_are_refused_at_once(tmp_path: Path, part: str) -> None:
    names = [part.format(i) for i in range(MANY)]
    adapter = write_header(tmp_path / "adapter.safetensors", ["control_to_base_for_conv_in.weight", *names])
    unet = write_header(tmp_path / "unet.safetensors", ["conv_in.weight", "conv_out.weight", *names])
    started = time.process_time()
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors: has 20,000 parts of down_blocks.*more than 64"):
        read_xs_file(peek(adapter))
    with pytest.raises(CheckpointError, match=r"unet\.safetensors: has 20,000 parts of down_blocks"):
        unet_config_of(peek(unet).shapes, str(unet))
    assert time.process_time() - started < 4  # of 20 and more before


def test_many_layers_in_all_are_refused(tmp_path: Path) -> None:
    names = [f"down_blocks.{i}.resnets.{j}.x" for i in range(60) for j in range(60)]
    path = write_header(tmp_path / "x.safetensors", ["control_to_base_for_conv_in.weight", *names])
    with pytest.raises(
        CheckpointError,
        match=f"3,600 layers, and no network that is known has more than {numbers_in_names.MOST_LAYERS}",
    ):
        read_xs_file(peek(path))


@pytest.mark.parametrize("name", ["a." * 400_000, "module." * 50_000])
def test_names_that_no_network_gives_are_refused(tmp_path: Path, name: str) -> None:
    path = write_header(tmp_path / "x.safetensors", [name])
    with pytest.raises(CheckpointError, match=r"the name of a tensor, has [\d,]+ letters") as caught:
        peek(path)
    assert len(str(caught.value)) < 400


def test_a_header_of_more_than_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 30_000_000) + b"{" + b" " * 30_000_000)
    with pytest.raises(CheckpointError, match="its header is 30,000,000 bytes long, and no more than"):
        peek(path)


def test_a_deep_header_is_refused(tmp_path: Path) -> None:
    text = b'{"a":' + b"[" * 100_000
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match="cannot be read"):
        peek(tmp_path / "x.safetensors")


# -- against the formats' own readers ---------------------------------------------------------------------------------


def every_dtype() -> dict[str, torch.Tensor]:
    numbers = torch.arange(6).reshape(2, 3)
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64)
    found = {str(dtype): numbers.to(dtype) for dtype in (*kinds, *whole)}
    return found | {"none": torch.zeros(0, 3), "single": torch.tensor(2.0)}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def test_every_number_format_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    save_file(every_dtype(), tmp_path / "x.safetensors", {"key": "value"})
    theirs, ours = load_file(tmp_path / "x.safetensors"), load(tmp_path / "x.safetensors")
    assert ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("zipped", [False, True])
def test_every_number_format_is_read_as_torch_reads_it(tmp_path: Path, zipped: bool) -> None:
    long = torch.arange(24.0).reshape(4, 6)
    content = every_dtype() | {"turned": long.T.contiguous().T, "part": long[1:3, 2:5], "row": long[2]}
    content |= {"layer": torch.nn.Parameter(torch.ones(2)), **torch.nn.Linear(2, 3).state_dict()}
    if not zipped:
        content = {name: t for name, t in content.items() if "float8" not in name}  # the old format has none
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    theirs, ours = torch.load(tmp_path / "x.pt", weights_only=True), load(tmp_path / "x.pt")
    assert ours.keys() == theirs.keys()
    assert all(same(ours[name], theirs[name].detach().contiguous()) for name in theirs)


def test_the_loaded_tensors_can_be_trained_and_saved(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "x.safetensors")
    weight = load(tmp_path / "x.safetensors")["w"].requires_grad_()
    weight.square().sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.full((3,), 2.0))
    shutil.copyfile(tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    os.unlink(tmp_path / "x.safetensors")
    assert torch.equal(weight.detach(), load(tmp_path / "y.safetensors")["w"])
