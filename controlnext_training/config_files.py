"""Configurations from files and from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from ..controlnext_core.encodable import cut, is_encodable
from .config import OF_SOURCES, SETTINGS, ConfigError, TrainConfig
from .data.samples import Share

MAX_RECIPE = 64 * 1024
"""Largest length of a recipe in characters; those of the pack have two thousand."""
MAX_DOTS = 64
"""Largest number of dots in one key: Python's reader takes time by the square of their number."""
MAX_KEY, MAX_TEXT = 100, 8192
"""Largest lengths, in characters, of a key that is compared with the known ones, and of a value."""

FOREIGN: dict[str, str] = {
    "lr": "learning_rate (the base's weights) and control_learning_rate (the control)",
    "unet_lr": "learning_rate",
    "controlnet_lr": "control_learning_rate",
    "epochs": "steps: samples / batch_size steps are one epoch",
    "num_train_epochs": "steps: samples / batch_size steps are one epoch",
    "max_train_epochs": "steps: samples / batch_size steps are one epoch",
    "max_train_steps": "steps",
    "train_steps": "steps",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "gradient_checkpointing": "checkpointing",
    "mixed_precision": "precision",
    "ema": "ema_decay, such as 0.999",
    "use_ema": "ema_decay, such as 0.999",
    "optimizer_type": "optimizer",
    "lr_scheduler": "schedule",
    "lr_warmup_steps": "warmup_steps",
    "lr_num_cycles": "schedule_cycles",
    "lr_power": "schedule_power",
    "snr_gamma": "min_snr_gamma",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_weight_decay": "weight_decay",
    "adam_epsilon": "adam_eps",
    "max_train_samples": "max_samples",
    "checkpointing_steps": "save_every",
    "checkpoints_total_limit": "keep_states",
    "resume_from_checkpoint": "resume",
    "output_dir": "output_folder",
    "train_data_dir": "data",
    "dataset": "data",
    "pretrained_model_name_or_path": "base",
    "base_model": "base",
    "controlnext_scale": "gain",
    "controlnet_model_name_or_path": "init_control",
    "proportion_empty_prompts": "caption_dropout",
    "network_dim": "rank",
    "lora_rank": "rank",
    "num_workers": "workers",
    "dataloader_num_workers": "workers",
}
"""Settings of other trainers -> the settings to write in their place."""

OF_SOURCE = dict(zip(Share._fields, OF_SOURCES, strict=True))
"""Key of a source's table -> setting that holds its values for all sources."""
KINDS: dict[str, type] = get_type_hints(TrainConfig)
"""Key -> its type."""
LISTS: dict[Any, type] = {tuple[str, ...]: str, tuple[int, ...]: int, tuple[float, ...]: float, tuple[bool, ...]: bool}
"""Type of a list -> type of its elements."""
NAMES_OF_LISTS = dict(zip(LISTS, ("texts", "whole numbers", "numbers", "true or false"), strict=True))


def read_recipe(path: Path) -> dict[str, Any]:
    """Settings in a recipe file. Raises ConfigError naming the file."""
    try:
        if path.stat().st_size > 4 * MAX_RECIPE:
            raise ConfigError(f"is {path.stat().st_size:,} bytes long, and is not a recipe.")
        return parse_recipe(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file. Name a recipe (.toml) that is there.") from error
    except (OSError, ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def parse_recipe(text: str) -> dict[str, Any]:
    """Settings in a recipe (TOML), under any headings. Raises ConfigError naming the key."""
    if len(text) > MAX_RECIPE:
        raise ConfigError(f"is {len(text):,} letters long. A recipe has no more than {MAX_RECIPE:,}.")
    if any(len(re.findall(r"[^.\s]\s*\.", part)) > MAX_DOTS for part in re.split(r"[,=\n\[\]{}]", text)):
        raise ConfigError(f"nests more than {MAX_DOTS} tables with dots. Write lines such as steps = 1000.")
    try:
        return _settings_of(_toml().loads(text))
    except RecursionError:
        raise ConfigError("is nested too deep. Write lines such as steps = 1000.") from None
    except ConfigError:
        raise
    except ValueError as error:  # TOMLDecodeError is one
        raise ConfigError(f"is not TOML ({cut(str(error))}). Write lines such as steps = 1000.") from error


def _settings_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a parsed recipe, under any headings."""
    found: dict[str, Any] = {}

    def take(values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if key == "data" and (tables := tables_of(value)):
                take(settings_of_sources(tables))
            elif isinstance(value, dict):
                take(value)
            elif key in found:
                raise ConfigError(f"{cut(key)}: stands there twice. Keep one.")
            else:
                found[key] = checked(key, value)

    take(document)
    return found


def tables_of(data: Any) -> list[dict[str, Any]]:
    """Sources of a recipe as tables; [] where none is a table. A text among tables is a path."""
    parts = [data] if isinstance(data, dict) and "path" in data else data
    if not isinstance(parts, list) or not any(isinstance(part, dict) for part in parts):
        return []
    return [part if isinstance(part, dict) else {"path": part} for part in parts]


def settings_of_sources(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Setting `data` and the settings of sources that the tables contain, with a value for each. Raises ConfigError."""
    found: dict[str, Any] = {"data": []}
    for number, table in enumerate(tables, 1):
        if unknown := [key for key in table if key not in ("path", *OF_SOURCE)]:
            known = ", ".join(OF_SOURCE)
            raise ConfigError(f"data: {cut(unknown[0])} of source {number} is unknown. A source has path, {known}.")
        if not isinstance(table.get("path"), str):
            raise ConfigError(f'data: source {number} names no file or folder. Write path = "faces".')
        found["data"].append(table["path"])
    for name, key in OF_SOURCE.items():
        if any(name in table for table in tables):
            found[key] = [table.get(name, getattr(Share(), name)) for table in tables]
    return found


def _toml() -> ModuleType:
    """Module tomllib, or tomli before Python 3.11."""
    try:
        import tomllib
    except ImportError:
        import tomli as tomllib
    return tomllib


def checked(key: str, value: Any) -> Any:
    """Convert a value to the type of its key. Raises ConfigError for an unknown key and for another type."""
    if key not in KINDS:
        if key in FOREIGN:
            raise ConfigError(f"{key}: is not a setting here. Write {FOREIGN[key]}.")
        close = difflib.get_close_matches(key[:MAX_KEY], KINDS, 1)
        raise ConfigError(f"{cut(key)}: is not a setting." + (f" Did you mean {close[0]}?" if close else ""))
    kind = KINDS[key]
    _refuse_extremes(key, value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in LISTS:
        parts = value if isinstance(value, (list, tuple)) else [value]
        wide = (int, float) if LISTS[kind] is float else LISTS[kind]
        if all(isinstance(part, wide) and isinstance(part, bool) == (wide is bool) for part in parts):
            return tuple(map(LISTS[kind], parts))
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", **NAMES_OF_LISTS}[kind]
    raise ConfigError(f"{key}: {cut(repr(value))} is not {wanted}.")


def _refuse_extremes(key: str, value: Any) -> None:
    """Raise ConfigError for numbers and texts beyond the limits of this file."""
    for part in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(part, int) and abs(part) >= 2**64:
            raise ConfigError(f"{key}: is a number of more than 64 bits.")
        if isinstance(part, str) and len(part) > MAX_TEXT:
            raise ConfigError(f"{key}: is a text of {len(part):,} letters; no more than {MAX_TEXT:,} are taken.")
        if isinstance(part, str) and (not is_encodable(part) or "\0" in part):
            raise ConfigError(f"{key}: {cut(repr(part))} has a character that texts cannot have. Remove it.")


def make_config(*sources: Mapping[str, Any]) -> TrainConfig:
    """Configuration from several sources, of which earlier ones take precedence; the rest are the defaults."""
    merged: dict[str, Any] = {}
    for source in reversed(sources):
        merged |= source
    return TrainConfig(**merged)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per setting: --steps 1000, --no-resume, --data A B."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for key, kind in KINDS.items():
        flag = f"--{key.replace('_', '-')}"
        text = SETTINGS[key].doc.replace("%", "%%") + f" (default {defaults[key]!r})".replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif kind in LISTS:
            name, read = NAMES_OF_FLAGS.get(LISTS[kind], ("NUMBER", LISTS[kind]))
            parser.add_argument(flag, nargs="+", type=read, metavar=name, help=text)
        else:
            parser.add_argument(flag, type=kind, choices=SETTINGS[key].choices or None, metavar=key.upper(), help=text)


def true_or_false(text: str) -> bool:
    """Parse the value of a flag. Raises ValueError."""
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


NAMES_OF_FLAGS: dict[type, tuple[str, Any]] = {str: ("PATH", str), bool: ("true|false", true_or_false)}
"""Type of a list's elements -> (name in help, function that parses one); others are numbers."""


def flags_given(options: argparse.Namespace) -> dict[str, Any]:
    """Settings whose flags were given, from the parsed options."""
    values = {key: getattr(options, key, None) for key in KINDS}
    return {key: checked(key, value) for key, value in values.items() if value is not None}


def as_toml(config: TrainConfig) -> str:
    """Configuration as a recipe, each key under its description."""
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
