"""Weight files: reading, refusals with their messages, and saves that are complete or absent."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint, safetensors_file
from comfyui_controlnext.controlnext_core.checkpoint import CheckpointError, fingerprint, load, load_strict, peek, save
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

FUZZ = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I64", "U8", "BOOL", "C64", "X", "")


def tensors() -> dict[str, Tensor]:
    return {
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(4, dtype=torch.float16),
        "scale": torch.tensor(0.5, dtype=torch.bfloat16),
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a space and a letter outside ASCII."""
    made = tmp_path / "my mod\u00e8les"
    made.mkdir()
    return made


# -- reading ------------------------------------------------------------------------------------------------------


def test_a_saved_file_is_read_back(folder: Path) -> None:
    path = save(folder / "deep er" / "x.safetensors", tensors(), {"key": "v\u00e4lue"})
    header = peek(path)
    assert header.path == path and header.metadata == {"key": "v\u00e4lue"}
    assert header.shapes == {"a.weight": (2, 3), "b": (4,), "scale": ()}
    assert header.dtypes == {"a.weight": "F32", "b": "F16", "scale": "BF16"}
    assert same(load(path), tensors())
    assert list(load(path, ["b"])) == ["b"]
    assert peek(str(path)).shapes == header.shapes


@pytest.mark.parametrize("suffix", [".bin", ".pth", ".pt", ".ckpt"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_torch_files_with_plain_tensors_are_read(folder: Path, suffix: str, nested: bool, zipped: bool) -> None:
    path = folder / f"x{suffix}"
    content: dict[str, Any] = {"state_dict": tensors(), "epoch": 3} if nested else {**tensors(), "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    header = peek(path)
    assert header.shapes == {"a.weight": (2, 3), "b": (4,), "scale": ()}
    assert header.dtypes == {"a.weight": "float32", "b": "float16", "scale": "bfloat16"}
    assert header.metadata == {}
    assert same(load(path), tensors()) and list(load(path, ["scale"])) == ["scale"]


class Runs:
    """Object that unpickles into a call that makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(folder: Path, zipped: bool) -> None:
    path, made = folder / "x.bin", folder / "made"
    torch.save({"w": torch.zeros(1), "code": Runs(made)}, path, _use_new_zipfile_serialization=zipped)
    for read in (peek, load):
        with pytest.raises(CheckpointError, match="can run code on your machine: get the .safetensors version"):
            read(path)
    assert not made.exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], torch.zeros(2), 7])
def test_a_torch_file_without_names_is_refused(folder: Path, content: object) -> None:
    torch.save(content, folder / "x.bin")
    with pytest.raises(CheckpointError, match=f"holds a {type(content).__name__}, not named tensors"):
        peek(folder / "x.bin")


def refusal(path: Path) -> str:
    """Message that both readers raise; no other error is allowed."""
    messages = []
    for read in (peek, load):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and messages[0].startswith(f"{path}: ")
    return messages[0]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_files_that_are_none_say_so(folder: Path, suffix: str) -> None:
    path = folder / f"x{suffix}"
    assert "no such file. Put it there" in refusal(path)
    path.write_bytes(b"")
    assert "is empty (0 bytes)" in refusal(path) and "Download it again" in refusal(path)
    path.unlink()
    path.mkdir()
    assert "is a folder, not a weight file" in refusal(path)


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), ValueError("odd")])
def test_a_file_that_cannot_be_opened_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    path = save(folder / "x.safetensors", tensors(), {})
    monkeypatch.setattr(safetensors_file, "stamp_of", raiser(error))
    assert str(error) in refusal(path)


def test_other_suffixes_are_refused(folder: Path) -> None:
    (folder / "x.txt").write_text("hello")
    assert "not a weight file; one of .safetensors" in refusal(folder / "x.txt")


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.99])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_truncated_file_is_refused_with_its_size(folder: Path, suffix: str, keep: float) -> None:
    path = folder / f"x{suffix}"
    content = {"w": torch.randn(64, 64), "v": torch.randn(64)}
    save(path, content, {}) if suffix == ".safetensors" else torch.save(content, path)
    length = int(path.stat().st_size * keep)
    os.truncate(path, length)
    message = refusal(path)
    assert (f"({length:,} bytes on disk)" in message and "truncated" in message) or "was not opened" in message


@pytest.mark.parametrize("length", [0, 7, 2**31, 2**63 - 1, 2**64 - 1])
def test_a_header_length_beyond_the_file_is_refused(folder: Path, length: int) -> None:
    path = folder / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"a":')
    assert "truncated or not a .safetensors file" in refusal(path)


# -- fuzzing ------------------------------------------------------------------------------------------------------

NUMBERS = st.integers(-2, 12) | st.sampled_from([2**31, 2**63, 2**64 - 1, -(2**63)]) | st.floats(allow_nan=False)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(DTYPES) | st.none(),
        "shape": st.lists(NUMBERS, max_size=4) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, max_size=3) | st.text(max_size=3),
    },
)
SOUND = st.integers(0, 4).map(lambda n: {"dtype": "U8", "shape": [n], "data_offsets": [0, n]})
TABLE = st.dictionaries(st.text(max_size=8), SOUND | ENTRY | st.none() | NUMBERS, max_size=4)
METADATA = st.dictionaries(st.text(max_size=4), st.text(max_size=4) | NUMBERS, max_size=2) | st.text(max_size=3)
HEADER = st.builds(
    lambda table, meta: {**table, **meta}, TABLE, st.fixed_dictionaries({}, optional={"__metadata__": METADATA})
)


def read_or_refuse(path: Path) -> None:
    """Read with both readers, which must agree: a header and its tensors, or CheckpointError.

    Anything else fails the test.
    """
    try:
        header = peek(path)
        assert {key: tuple(value.shape) for key, value in load(path).items()} == header.shapes
    except CheckpointError as error:
        assert str(error).startswith(f"{path}: ")


@FUZZ
@given(header=HEADER, body=st.binary(max_size=24), shift=st.sampled_from([0, 0, 0, -1, 1, 1000]))
def test_any_safetensors_header_is_read_or_refused(tmp_path: Path, header: Any, body: bytes, shift: int) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", max(0, len(text) + shift)) + text + body)
    read_or_refuse(path)


@FUZZ
@given(content=st.binary(min_size=1, max_size=64), suffix=st.sampled_from([".safetensors", ".bin", ".pt"]))
def test_any_bytes_are_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    read_or_refuse(path)


@FUZZ
@given(place=st.floats(0, 1), change=st.binary(min_size=1, max_size=8), zipped=st.booleans())
def test_any_damage_to_a_torch_file_is_read_or_refused(
    tmp_path: Path, place: float, change: bytes, zipped: bool
) -> None:
    path = tmp_path / "x.bin"
    torch.save(tensors(), path, _use_new_zipfile_serialization=zipped)
    content = bytearray(path.read_bytes())
    at = int(place * (len(content) - len(change)))
    content[at : at + len(change)] = change
    path.write_bytes(content)
    read_or_refuse(path)


# -- strict loading -----------------------------------------------------------------------------------------------


def test_strict_loading_takes_all_or_nothing() -> None:
    net = nn.Linear(3, 2, device="meta")
    good = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    for bad, words in (
        ({"weight": good["weight"]}, "1 missing: bias"),
        ({**good, "more": torch.zeros(1)}, "1 unexpected: more"),
        ({**good, "bias": torch.zeros(5)}, "1 of another shape: bias [5] (expected [2])"),
        ({f"n{i}": torch.zeros(1) for i in range(8)}, "8 unexpected: n0, n1, n2, n3, n4 and 3 more"),
    ):
        with pytest.raises(CheckpointError) as caught:
            load_strict(net, bad, "a file")
        assert str(caught.value).startswith("a file: ") and words in str(caught.value)
        assert net.weight.is_meta and net.bias.is_meta
    load_strict(net, good, "a file")
    assert net.weight.data_ptr() == good["weight"].data_ptr()


# -- saving -------------------------------------------------------------------------------------------------------


def raiser(error: BaseException) -> Any:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    return fail


def writes_then(error: BaseException) -> Any:
    """Stand-in for save_file that leaves half a file behind, as a full disk does."""

    def fail(tensors: Any, name: str, metadata: Any) -> None:
        Path(name).write_bytes(b"half")
        raise error

    return fail


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("where", "what", "raised"),
    [
        ("save_file", writes_then(FULL), CheckpointError),
        ("os.fsync", raiser(FULL), CheckpointError),
        ("os.replace", raiser(PermissionError(errno.EACCES, "in use")), CheckpointError),
        ("os.replace", raiser(KeyboardInterrupt()), KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize("existed", [False, True])
def test_a_save_that_fails_leaves_the_folder_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str, what: Any, raised: type, existed: bool
) -> None:
    path = folder / "x.safetensors"
    if existed:
        save(path, tensors(), {"version": "old"})
    monkeypatch.setattr(f"{checkpoint.__name__}.{where}", what)
    with pytest.raises(raised) as caught:
        save(path, {"new": torch.zeros(9)}, {"version": "new"})
    monkeypatch.undo()
    if raised is CheckpointError:
        assert "could not be saved" in str(caught.value) and "nothing that was there has changed" in str(caught.value)
    assert [p.name for p in folder.iterdir()] == (["x.safetensors"] if existed else [])
    if existed:
        assert peek(path).metadata == {"version": "old"} and same(load(path), tensors())


def test_a_save_takes_the_place_of_the_old_file(folder: Path) -> None:
    path = save(folder / "x.safetensors", tensors(), {})
    save(path, {"new": torch.arange(6).reshape(2, 3).T}, {})  # not contiguous
    assert same(load(path), {"new": torch.arange(6).reshape(2, 3).T})
    assert [p.name for p in folder.iterdir()] == ["x.safetensors"]


def test_a_folder_that_cannot_be_made_is_named(folder: Path) -> None:
    (folder / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be saved"):
        save(folder / "file" / "x.safetensors", tensors(), {})


# -- identity -----------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_content() -> None:
    kept = fingerprint(tensors())
    assert kept == fingerprint(dict(reversed(tensors().items())))
    transposed = tensors()["a.weight"].T.contiguous().T  # the same numbers, laid out otherwise
    assert not transposed.is_contiguous() and kept == fingerprint({**tensors(), "a.weight": transposed})
    bit = tensors()
    bit["b"].view(torch.int16)[2] ^= 1
    renamed = {("c" if key == "b" else key): value for key, value in tensors().items()}
    retyped = {**tensors(), "b": tensors()["b"].view(torch.int16)}
    reshaped = {**tensors(), "b": tensors()["b"].reshape(2, 2)}
    with_empty = {**tensors(), "e": torch.zeros(0)}
    others = [fingerprint(changed) for changed in (bit, renamed, retyped, reshaped, with_empty)]
    assert len({kept, *others}) == 6
