"""Settings: fields of a configuration that carry their description, bounds and choices."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Any

from ..controlnext_core.encodable import cut

OF_SOURCES = ("repeats", "weights", "crops", "flip")
"""Settings with a value for each source of the data, or one for all."""
EACH = "one for each of data or one for all; empty"
"""Description of the form of these settings."""


class ConfigError(ValueError):
    """Error for a setting that cannot be used. The message names the key, the value and the allowed values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Facts about one field of a configuration."""

    doc: str
    """Description for help, recipes and tooltips."""
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    """Allowed values of a text; (): any text."""
    fixed_on_resume: bool = False
    """True: a saved state with another value belongs to another run. False: the value may change on resume."""
    is_path: bool = False
    """True: names files or folders of this machine; shared files contain only its last part. False: no path."""

    def check(self, key: str, value: Any) -> None:
        """Raise ConfigError for a value that is not among the choices or is out of bounds."""
        if self.choices and value not in self.choices:
            raise ConfigError(f"{key}: {cut(repr(value))} is unknown. Choose one of {', '.join(self.choices)}.")
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, (int, float)) and not self.low <= part <= self.high:
                raise ConfigError(f"{key}: {cut(str(part))} is out of range. Set it to {self.low:g} to {self.high:g}.")


def setting(default: Any, doc: str, **facts: Any) -> Any:
    """Dataclass field with this default; doc and facts: the fields of its Setting."""
    return dataclasses.field(default=default, metadata={"setting": Setting(doc=doc, **facts)})


def settings_of(config: type) -> dict[str, Setting]:
    """Settings by key, for every field of a configuration, in order."""
    return {field.name: field.metadata["setting"] for field in dataclasses.fields(config)}


def last_names(value: str | tuple[str, ...]) -> Any:
    """Last part of a path of any system, or of each of several paths."""
    return PureWindowsPath(value).name if isinstance(value, str) else tuple(map(last_names, value))
