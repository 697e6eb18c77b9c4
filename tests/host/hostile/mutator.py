"""Hostile cases, each determined by a part, a seed and a number: the same three give the same bytes."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comfyui_controlnext.controlnext_core.specs import BUILDS, SPECS, config_of
from comfyui_controlnext.models.controlnext import ControlNeXt
from comfyui_controlnext.tests.fixtures.data_fixtures import coordinates, encoded

RECIPES = Path(__file__).resolve().parents[3] / "controlnext_training" / "recipes"
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    64,
    255,
    2**16,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    0.5,
    1e308,
    True,
    None,
]
TEXTS = [
    "",
    " ",
    "\0",
    "\ud800",
    "x" * 300,
    "x" * 20_000,
    "../../x",
    "a\nb",
    "\x1b[31m",
    "nan",
    "inf",
    "1e999",
    "-1",
    "{}",
]
NAMES = [
    *("module.", "unet.", "controlnext.", "control_to_base_for_conv_in.weight", "enc_zero_convs_in.0.0.weight"),
    *(
        "conv_in.weight",
        "conv_out.weight",
        "down_blocks.{}.resnets.{}.conv1.weight",
        "lora_up.{}",
        "mid_convs.{}.weight",
    ),
    *("control_model.input_blocks.{}.1.transformer_blocks.{}.x", "mid_block.resnets.{}.x", "a." * 200, "\ud800", ""),
]


def rng_of(part: str, seed: int, number: int) -> random.Random:
    return random.Random(f"{part} {seed} {number}")


def bytes_changed(content: bytes, rng: random.Random) -> bytes:
    """Content with a few bytes flipped, cut out, repeated or inserted."""
    found = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        at, length = rng.randrange(len(found) + 1), rng.choice([1, 1, 2, 8, 64, 1024])
        new = rng.choice(
            [b"", rng.randbytes(length), b"\xff" * length, b"\0" * length, bytes(found[at : at + length]) * 2]
        )
        found[at : at + rng.choice([0, length])] = new
    return bytes(found[: rng.randrange(len(found) + 1)] if rng.random() < 0.15 else found)


def changed(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """JSON value with one place changed."""
    if depth < 6 and rng.random() < 0.8:
        if isinstance(value, dict) and value:
            key = rng.choice(list(value))
            return {**value, key: changed(value[key], rng, depth + 1)}
        if isinstance(value, list) and value:
            at = rng.randrange(len(value))
            return [*value[:at], changed(value[at], rng, depth + 1), *value[at + 1 :]]
    nested: Any = 1
    for _ in range(rng.choice([1, 3, 200])):
        nested = [nested]
    return rng.choice([rng.choice(NUMBERS), rng.choice(TEXTS), [], {}, nested, [rng.choice(NUMBERS)] * 9])


# -- safetensors -------------------------------------------------------------------------------------------------------


def encoder_table(rng: random.Random) -> dict[str, Any]:
    """Header of a valid encoder."""
    spec = rng.choice([spec for spec in SPECS.values() if spec.build in BUILDS])
    net = ControlNeXt(config_of(spec), device="meta")
    return table_of({name: tuple(t.shape) for name, t in net.state_dict().items()})


def table_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    table, at = {}, 0
    for name, shape in shapes.items():
        length = 2 * int(torch.Size(shape).numel())
        table[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + length]}
        at += length
    return table


def renamed(table: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Header with added, changed or missing names."""
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    found = dict(table)
    for _ in range(rng.choice([1, 3, 400])):
        name = rng.choice(NAMES).format(rng.randrange(90), rng.randrange(90)) + rng.choice(["", "x", ".weight"])
        found[name] = entry
    prefix = rng.choice(["", "", "module.", "unet.", "module." * 60])
    kept = rng.random() + 0.3
    return {prefix + name: about for name, about in found.items() if rng.random() < kept}


def safetensors(path: Path, rng: random.Random) -> Path:
    """Safetensors file with the header of an encoder, or nearly so; its values are a hole in the file."""
    table = encoder_table(rng) if rng.random() < 0.8 else table_of({"a": (2,)})
    size = max((about["data_offsets"][1] for about in table.values()), default=0)
    for _ in range(rng.randint(0, 2)):
        table = renamed(table, rng) if rng.random() < 0.3 else changed(table, rng)
        table = table if isinstance(table, dict) else {"x": table}
    keys = ["spec", "gain", "normalization", "weights_kind", "weights_file", "xs_num_heads", "xs_norm_rule", "other"]
    if rng.random() < 0.4:
        table["__metadata__"] = {f"controlnext.{rng.choice(keys)}": rng.choice([*TEXTS, "sd15", "0.5", "8,8"])}
    text = json.dumps(table).encode()
    if rng.random() < 0.3:
        text = bytes_changed(text, rng)
    length = len(text) if rng.random() < 0.9 else rng.choice([0, 7, len(text) + 1, 2**31, 2**63, 2**64 - 1])
    path = path.with_suffix(".safetensors")
    path.write_bytes(struct.pack("<Q", length) + text)
    os.truncate(path, 8 + len(text) + (size if rng.random() < 0.9 else rng.choice([0, 1, size // 2, size + 1])))
    return path


# -- torch files -------------------------------------------------------------------------------------------------------

GLOBALS = [
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\nbytearray\n"),
    *(b"ctorch\nFloatStorage\n", b"ctorch\nTensor\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
]
PLAIN_OPERATIONS = [bytes([code]) for code in b"]})(012RbQNsuet.a\x81\x92\x94"]
OPERATIONS = [
    *(*PLAIN_OPERATIONS, *GLOBALS),
    *(b"\x80\x02", b"\x80\x05", b"\x82\x01", b"r\xff\xff\xff\x7f", b"q\x00", b"h\x00", b"K\x05", b"J\xff\xff\xff\x7f"),
    *(b"\x8a\x09" + b"\xff" * 9, b"\x96" + struct.pack("<Q", 2**40), b"\x8e" + struct.pack("<Q", 2**40)),
]


def torch_file(path: Path, rng: random.Random) -> Path:
    """Torch file with a changed pickle or archive."""
    path = path.with_suffix(rng.choice([".ckpt", ".bin", ".pth"]))
    big = torch.zeros(1).expand(rng.choice([1, 1000, 60_000]), rng.choice([1, 60_000]))
    content = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4).half(), rng.choice(TEXTS): big}
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=rng.random() < 0.7)
    whole = out.getvalue()
    if whole[:2] != b"PK" or rng.random() < 0.2:
        path.write_bytes(bytes_changed(whole, rng))
        return path
    with zipfile.ZipFile(out) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    for name in parts:
        if name.endswith("data.pkl") and rng.random() < 0.9:
            parts[name] = pickle_changed(parts[name], rng)
    kind = rng.choice([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, part in parts.items():
            if rng.random() < 0.97:
                archive.writestr(name, part)
    return path


def pickle_changed(content: bytes, rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.5:
        return bytes_changed(content, rng)
    made = b"".join(rng.choice(OPERATIONS) for _ in range(rng.choice([3, 30, 300])))
    at = rng.randrange(len(content))
    return made if kind < 0.7 else content[:at] + made + content[at:]


# -- recipes -----------------------------------------------------------------------------------------------------------

TOKENS = [
    "[",
    "]",
    "{",
    "}",
    "=",
    ".",
    '"',
    "'''",
    "\n",
    "#",
    "a.b.c",
    "re:",
    "9" * 30,
    "0x" + "f" * 40,
    "nan",
    "inf",
    "-1",
    "true",
]
LONG_TOKENS = ["a." * 3000, "[" * 3000, "{a=" * 3000, "9" * 5000, "x" * 70_000, "k.a=1\n" * 300, "'a'." * 2000]


def recipe(path: Path, rng: random.Random) -> Path:
    """Recipe of the pack with tokens changed."""
    text = rng.choice(sorted(RECIPES.glob("*.toml"))).read_text("utf-8")
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(text) + 1)
        new = rng.choice([*TOKENS, *TEXTS, rng.choice(LONG_TOKENS)])
        text = text[:at] + new + text[at + rng.choice([0, 0, 1, 20]) :]
    if rng.random() < 0.4:
        hostile = rng.choice(
            ["^(([a-z0-9_.])+)+!$", "(.*)*.*!", "(" * 90, "[z-a]", "a{99}{99}", ".?" * 99, "\\1", "(?=a)"]
        )
        text = f'trainable = "re:{hostile}"\n' if rng.random() < 0.5 else f'{text}\ntrainable = "re:{hostile}"\n'
    path = path.with_suffix(".toml")
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


# -- data --------------------------------------------------------------------------------------------------------------


def folder(path: Path, rng: random.Random) -> Path:
    """Folder of pictures, tables and shards, some of them changed."""
    path.mkdir()
    good = encoded(coordinates(64, 64), rng.choice(["png", "jpeg", "webp", "bmp"]))
    for number in range(rng.randint(1, 4)):
        name = rng.choice(["a", "b", "a_hint", "ä", "x" * 200, "a.hint"]) + str(number)
        content = good if rng.random() < 0.4 else bytes_changed(good, rng)
        (path / f"{name}{rng.choice(['.png', '.jpg', '.webp', '.bmp', '.mp4', '.txt'])}").write_bytes(content)
    for table in rng.sample(["metadata.jsonl", "metadata.csv", "prompt.json"], rng.randint(0, 2)):
        rows = [changed({"file_name": "a0.png", "text": "x", "hint": "b1.png"}, rng) for _ in range(3)]
        text = "\n".join(json.dumps(row) for row in rows).encode()
        (path / table).write_bytes(bytes_changed(text, rng) if rng.random() < 0.4 else text)
    if rng.random() < 0.3:
        (path / "s.tar").write_bytes(bytes_changed(shard(good), rng))
    if hasattr(os, "mkfifo") and rng.random() < 0.2:
        os.mkfifo(path / "p.png")
        (path / "l.png").symlink_to(path / rng.choice(["l.png", "absent", "p.png", "."]))
    return path


def shard(picture: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("a.png", "a.txt", "b.png"):
            member = tarfile.TarInfo(name)
            member.size = len(picture)
            tar.addfile(member, io.BytesIO(picture))
    return out.getvalue()


MAKERS: dict[str, Callable[[Path, random.Random], Path]] = {
    "safetensors": safetensors,
    "torch": torch_file,
    "recipes": recipe,
    "data": folder,
    "loader": safetensors,
}
