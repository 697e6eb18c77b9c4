"""Configurations from files and from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from .config import SETTINGS, ConfigError, TrainConfig

KINDS: dict[str, type] = get_type_hints(TrainConfig)
"""Key -> its type."""


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a recipe file. Raises ConfigError naming the file."""
    try:
        return parse_recipe(path.read_text("utf-8"))
    except (OSError, ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_recipe(text: str) -> dict[str, Any]:
    """The keys of a recipe (TOML), whatever headings they stand under. Raises ConfigError naming the key."""
    try:
        document = _toml().loads(text)
    except ValueError as error:  # TOMLDecodeError is one
        raise ConfigError(f"is not TOML ({error}). Write lines such as steps = 1000.") from error
    found: dict[str, Any] = {}

    def take(values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                take(value)
            elif key in found:
                raise ConfigError(f"{key}: stands there twice. Keep one.")
            else:
                found[key] = checked(key, value)

    take(document)
    return found


def _toml() -> ModuleType:
    """tomllib, or its forerunner before Python 3.11."""
    try:
        import tomllib
    except ImportError:
        import tomli as tomllib
    return tomllib


def checked(key: str, value: Any) -> Any:
    """The value in the type of its key. Raises ConfigError for an unknown key and for another type."""
    if key not in KINDS:
        close = difflib.get_close_matches(key, KINDS, 1)
        raise ConfigError(f"{key}: is no setting." + (f" Did you mean {close[0]}?" if close else ""))
    kind = KINDS[key]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind == tuple[str, ...]:
        value = [value] if isinstance(value, str) else value
        if isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value):
            return tuple(value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}.get(kind, "texts")
    raise ConfigError(f"{key}: {value!r} is not {wanted}.")


def make_config(*sources: Mapping[str, Any]) -> TrainConfig:
    """The configuration of several sources, of which the earlier wins; the rest are the defaults."""
    merged: dict[str, Any] = {}
    for source in reversed(sources):
        merged |= source
    return TrainConfig(**merged)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per setting: --steps 1000, --no-resume, --data A B."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for key, kind in KINDS.items():
        flag = f"--{key.replace('_', '-')}"
        text = SETTINGS[key].doc.replace("%", "%%") + f" (default {defaults[key]!r})".replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif kind == tuple[str, ...]:
            parser.add_argument(flag, nargs="+", metavar="PATH", help=text)
        else:
            parser.add_argument(flag, type=kind, choices=SETTINGS[key].choices or None, metavar=key.upper(), help=text)


def flags_given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings among parsed options that were given."""
    values = {key: getattr(options, key, None) for key in KINDS}
    return {key: checked(key, value) for key, value in values.items() if value is not None}


def as_toml(config: TrainConfig) -> str:
    """The whole configuration as a recipe, each key under its description."""
    lines: list[str] = []
    for key, value in dataclasses.asdict(config).items():
        lines += [f"# {SETTINGS[key].doc}", f"{key} = {_toml_value(value)}", ""]
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml_value(part) for part in value)}]"
    if isinstance(value, str):
        return '"' + "".join(_escaped(letter) for letter in value) + '"'
    return repr(value)


def _escaped(letter: str) -> str:
    if letter in '"\\':
        return f"\\{letter}"
    return letter if letter >= " " and letter != "\x7f" else f"\\u{ord(letter):04x}"
