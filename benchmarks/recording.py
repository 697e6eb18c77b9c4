"""Output of benchmarks: on the screen and, with hardware, versions and date, in benchmarks/results."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).with_name("results")


class Report:
    """Report of one run of a benchmark, line by line."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.lines = [facts(), ""]
        print(self.lines[0] + "\n")

    def line(self, text: str = "") -> None:
        """Print a line and record it."""
        print(text)
        self.lines.append(text)

    def save(self) -> Path:
        """Write results/<what>_<hardware>_<yyyymm>.md, replacing an earlier run of that month."""
        path = result_path(self.what)
        text = "\n".join(line.rstrip() for line in self.lines[2:])
        path.write_text(f"# {self.what}\n\n{self.lines[0]}\n\n```\n{text}\n```\n", encoding="utf-8", newline="\n")
        return path


def append_table(
    what: str,
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[Any]],
    settings: str,
    json_file: Path | None = None,
    keep: bool = True,
) -> None:
    """Print a Markdown table, and append it to results/<what>_<hardware>_<yyyymm>.md unless `keep` is False.

    settings: settings of the measurement beside hardware and versions (dtype, threads, repeats).
    """
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    text = f"## {title}\n\n{facts()}; {settings}\n\n" + "\n".join(lines) + "\n"
    print(text, flush=True)
    if json_file is not None:
        entry = {"what": what, "title": title, "facts": facts(), "settings": settings}
        entry["rows"] = [dict(zip(head, row, strict=True)) for row in rows]  # type: ignore[assignment]
        with json_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
    if keep:
        path = result_path(what)
        before = path.read_text("utf-8") if path.is_file() else f"# {what}\n"
        path.write_text(f"{before}\n{text}", encoding="utf-8", newline="\n")


def spread(ratios: Sequence[float]) -> str:
    """Median and range as text: `1.012 (1.008 to 1.019)`."""
    middle = f"{statistics.median(ratios):.3f}"
    return middle if len(ratios) == 1 else f"{middle} ({min(ratios):.3f} to {max(ratios):.3f})"


def result_path(what: str) -> Path:
    """Path of this benchmark's results, for this hardware and month."""
    FOLDER.mkdir(exist_ok=True)
    name = re.sub(r"\W+", "-", hardware().lower()).strip("-")
    return FOLDER / f"{what}_{name}_{datetime.date.today():%Y%m}.md"


def facts() -> str:
    """Hardware, versions and date, as text."""
    return (
        f"{hardware()}; Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}; "
        f"{datetime.date.today().isoformat()}"
    )


def hardware() -> str:
    """Name of the GPU, or name and number of cores of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    processor = found[1] if found else platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores {processor}"
