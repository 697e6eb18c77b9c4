"""`python run.py bench report`: the tables of docs/performance.md and docs/gpu_day.md that come from GPUs.

Sources are benchmarks/results/gpu_day_*.json, written by `run.py gpu-day`; figures that none of them has are marked as
owed. Standard library only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .environment import ROOT, SetupError
from .gpu_day import NAME, rows_of
from .gpu_parts import PARTS

RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
GOALS_PAGE, PARTS_PAGE = "performance.md", "gpu_day.md"
BEGIN, END = "<!-- gpu-day: `run.py bench report` writes from here -->", "<!-- gpu-day: to here -->"
OWED = "owed"


@dataclass(frozen=True)
class Goal:
    """Target for one figure, with the cell of a part's table that holds it."""

    what: str
    limit: float
    part: str
    row: str
    """Content of the first column in the figure's row."""
    column: str = "wall"
    at_least: bool = False


_FIRST, _SECOND = "ControlNeXt, first run", "ControlNeXt, second run"
_OURS = "ours, fp16 file"
GOALS = (
    Goal("SD1.5 512, ControlNeXt, first run", 1.03, "step-sd15", _FIRST),
    Goal("SD1.5 512, ControlNeXt, second run", 1.005, "step-sd15", _SECOND),
    Goal("SD1.5 512, ControlNet-XS 53m", 1.10, "step-sd15", "ControlNet-XS 53m, second run"),
    Goal("SDXL 1024, ControlNeXt, first run", 1.02, "step-sdxl", _FIRST),
    Goal("SDXL 1024, ControlNeXt, second run", 1.005, "step-sdxl", _SECOND),
    Goal("SDXL 1024, ControlNet-XS 20m", 1.10, "step-sdxl", "ControlNet-XS 20m, second run"),
    Goal("SDXL 1024, ControlNet-XS 48m", 1.10, "step-sdxl", "ControlNet-XS 48m, second run"),
    Goal("SVD 14 x 576x1024, ControlNeXt v2, first run", 1.03, "step-svd", "ControlNeXt v2, first run"),
    Goal("SVD 14 x 576x1024, ControlNeXt v1, first run", 1.03, "step-svd", "ControlNeXt v1, first run"),
    Goal("training, pictures a second over the plain loop's", 1.3, "train", _OURS, "speed against plain", True),
    Goal("training, memory over the plain loop's", 0.7, "train", _OURS, "memory against plain"),
)
SHOWN = ("memory", "profile", "candidates", "train")
"""Parts whose complete tables are on their page."""


def write_report(taken: Path | None, results: Path = RESULTS, docs: Path = DOCS) -> Path:
    """Write the part between BEGIN and END of both pages; taken: a folder of gpu-day whose results are stored first."""
    if taken is not None:
        keep(taken, results)
    found = days(results)
    fill(docs / PARTS_PAGE, "\n".join(["", *parts_of(found)]))
    return fill(docs / GOALS_PAGE, "\n".join([*goals_of(found), ""]))


def fill(page: Path, new: str) -> Path:
    """Replace the text between the page's two marker lines. Raises SetupError where they are missing."""
    text = page.read_text("utf-8")
    if BEGIN not in text or END not in text:
        raise SetupError(f"{page}: the lines {BEGIN} and {END} are missing; put them where the tables belong.")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{new}{END}{after}", encoding="utf-8", newline="\n")
    return page


def keep(folder: Path, results: Path) -> Path:
    """Store the results of a day in `results`, under the name of its GPU and month. Raises SetupError for a dry run."""
    path = folder / f"{NAME}.json"
    if not path.is_file():
        raise SetupError(f"--folder {folder}: no {NAME}.json there. Name the --out of run.py gpu-day.")
    day = json.loads(path.read_text("utf-8"))
    if day["dry_run"]:
        raise SetupError(f"{path}: was a dry run on the CPU, whose figures mean nothing.")
    gpu = re.sub(r"\W+", "-", gpu_of(day).lower()).strip("-")
    target = results / f"{NAME}_{gpu}_{day['machine']['date'][:7].replace('-', '')}.json"
    target.write_text(json.dumps(day, indent=1) + "\n", encoding="utf-8", newline="\n")
    return target


def days(results: Path) -> list[dict[str, Any]]:
    """Stored results, the newest first."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(results.glob(f"{NAME}_*.json"))]
    return sorted(found, key=lambda day: str(day["machine"]["date"]), reverse=True)


def gpu_of(day: Mapping[str, Any]) -> str:
    return str(day["machine"]["gpu"]).partition(",")[0]


def heads_of(found: list[dict[str, Any]]) -> list[str]:
    return [f"{gpu_of(day)}, {day['machine']['date']}" for day in found] or ["GPU"]


def goals_of(found: list[dict[str, Any]]) -> list[str]:
    """Lines of the table of goals."""
    heads = heads_of(found)
    return rows_of({"rows": [{"figure": g.what, "goal": _limit(g)} | _cells(heads, found, g) for g in GOALS]})


def parts_of(found: list[dict[str, Any]]) -> list[str]:
    """Lines of the table of parts, and of the tables of SHOWN."""
    heads = heads_of(found)
    lines = rows_of({"rows": [{"part": p.name, "asks": p.question} | _states(heads, found, p.name) for p in PARTS]})
    for table in (t for day in found for name in SHOWN for t in day["parts"].get(name, {}).get("tables", [])):
        lines += ["", f"{table['title']} ({table['facts']}; {table['settings']}):", "", *rows_of(table)]
    return [*lines, "", ""]


def _limit(goal: Goal) -> str:
    return f"{'at least' if goal.at_least else 'at most'} {goal.limit:g}"


def _cells(heads: list[str], found: list[dict[str, Any]], goal: Goal) -> dict[str, str]:
    cells = [verdict(value_of(day, goal), goal) for day in found] or [OWED]
    return dict(zip(heads, cells, strict=True))


def _states(heads: list[str], found: list[dict[str, Any]], name: str) -> dict[str, str]:
    cells = [day["parts"].get(name, {}).get("status", OWED) for day in found] or [OWED]
    return dict(zip(heads, cells, strict=True))


def value_of(day: Mapping[str, Any], goal: Goal) -> str | None:
    """Cell with the figure of the goal; None where the day lacks it."""
    for table in day["parts"].get(goal.part, {}).get("tables", []):
        for row in table["rows"]:
            if next(iter(row.values())) == goal.row and goal.column in row:
                return str(row[goal.column])
    return None


def verdict(value: str | None, goal: Goal) -> str:
    """Figure with its verdict on the goal; OWED without a figure."""
    number = re.match(r"[\d.]+", value or "")
    if value is None or number is None:
        return OWED
    met = float(number[0]) >= goal.limit if goal.at_least else float(number[0]) <= goal.limit
    return f"{value}, {'met' if met else 'MISSED'}"
