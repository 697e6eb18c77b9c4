"""Where a benchmark's lines go: to the screen, and with hardware, versions and date into benchmarks/results."""

from __future__ import annotations

import datetime
import os
import platform
import re
from pathlib import Path

import torch

FOLDER = Path(__file__).with_name("results")


class Report:
    """Lines of one run of a benchmark."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.lines = [
            f"{hardware()}; Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}; "
            f"{datetime.date.today().isoformat()}",
            "",
        ]
        print(self.lines[0] + "\n")

    def line(self, text: str = "") -> None:
        """Print a line and keep it."""
        print(text)
        self.lines.append(text)

    def save(self) -> Path:
        """Write results/<what>_<hardware>_<yyyymm>.md, in place of an earlier run of that month."""
        FOLDER.mkdir(exist_ok=True)
        name = re.sub(r"\W+", "-", hardware().lower()).strip("-")
        path = FOLDER / f"{self.what}_{name}_{datetime.date.today():%Y%m}.md"
        text = "\n".join(line.rstrip() for line in self.lines[2:])
        path.write_text(f"# {self.what}\n\n{self.lines[0]}\n\n```\n{text}\n```\n", encoding="utf-8", newline="\n")
        return path


def hardware() -> str:
    """The GPU's name, or the processor's and its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    processor = found[1] if found else platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores {processor}"
