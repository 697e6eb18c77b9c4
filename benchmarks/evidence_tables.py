"""Tables for docs/evidence.md and plots beside it, made from the results of finished runs."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..controlnext_training.plots import Line, line_chart
from ..tools.environment import ROOT
from .evidence_runs import CASES, Plan, result_of
from .recording import result_path

PAGE = ROOT / "docs" / "evidence.md"
SHORT = {
    "released": ("as released", (31, 94, 170)),
    "zero_conv": ("zero convolution", (214, 92, 20)),
    "paper": ("equation 10", (60, 150, 70)),
    "add": ("plain addition", (150, 70, 160)),
    "stock": ("ControlNet copy", (120, 120, 120)),
    "xs": ("ControlNet-XS", (200, 40, 60)),
}
"""Case -> its name and colour in a plot."""
HEARD = 0.3
"""Edge F1 from which on a control counts as heard."""
CHARTS = {"fidelity": "evidence_fidelity.png", "distance": "evidence_distance.png"}
PAIR_CHART = "evidence_pair.png"

Result = Mapping[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


ALIKE = ("base", "steps", "batch", "precision")
"""Facts that all runs of a table must share."""


def results(plan: Plan) -> dict[str, list[Result]]:
    """Case -> its results, one per seed that is done; cases without any are left out.

    Raises SystemExit where they are not of one base or one length: those of an earlier base are still there.
    """
    found: dict[str, list[Result]] = {
        name: [r for s in case.seeds if (r := result_of(plan, name, s)) is not None] for name, case in CASES.items()
    }
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for result in (result for many in found.values() for result in many):
        kinds.setdefault(tuple(result[key] for key in ALIKE), []).append(f"{result['case']}:{result['seed']}")
    if len(kinds) > 1:
        told = "; ".join(
            f"{', '.join(names)} with {dict(zip(ALIKE, kind, strict=True))}" for kind, names in kinds.items()
        )
        raise SystemExit(f"{plan.folder}: these runs cannot stand in one table: {told}. Run the older ones again.")
    return {name: many for name, many in found.items() if many}


def curve(result: Result, figure: str) -> dict[int, float]:
    """step -> value"""
    return {int(step): value for step, value in result["figures"][figure].items()}


def mean_curve(many: Sequence[Result], figure: str) -> dict[int, float]:
    """The mean over seeds at the steps that all have."""
    curves = [curve(result, figure) for result in many]
    steps = sorted(set.intersection(*(set(each) for each in curves)))
    return {step: statistics.fmean(each[step] for each in curves) for step in steps}


def last(many: Sequence[Result], figure: str, digits: int = 2) -> str:
    """The last value: the mean over seeds, and the range where there are several."""
    ends = [list(curve(result, figure).values())[-1] for result in many]
    middle = f"{statistics.fmean(ends):.{digits}f}"
    return middle if len(ends) == 1 else f"{middle} ({min(ends):.{digits}f} to {max(ends):.{digits}f})"


def heard_at(result: Result) -> int | None:
    """The first look at which the control counts as heard."""
    return next((step for step, value in curve(result, "fidelity").items() if value >= HEARD), None)


def summary(found: Mapping[str, Sequence[Result]]) -> Table:
    head = (
        "control",
        "seeds",
        "trains, M",
        "F1",
        "F1 at strength 0",
        "distance",
        "loss",
        f"F1 >= {HEARD} at step",
        "s/step",
    )
    rows = []
    for name, many in found.items():
        heard = [heard_at(result) for result in many]
        rows.append(
            (
                CASES[name].title,
                str(len(many)),
                f"{many[0]['trained'] / 1e6:.2f}",
                last(many, "fidelity"),
                last(many, "fidelity_without"),
                last(many, "distance", 3),
                last(many, "loss", 4),
                ", ".join("never" if step is None else str(step) for step in heard),
                f"{statistics.median(result['seconds_per_step'] for result in many):.2f}",
            )
        )
    return head, rows


def by_step(found: Mapping[str, Sequence[Result]], figure: str) -> Table:
    """One row per case, one column per look; means over seeds."""
    curves = {name: mean_curve(many, figure) for name, many in found.items()}
    steps = sorted({step for each in curves.values() for step in each})
    rows = [
        (CASES[name].title, *(f"{each[step]:.2f}" if step in each else "" for step in steps))
        for name, each in curves.items()
    ]
    return ("control", *(f"step {step}" for step in steps)), rows


def pair(found: Mapping[str, Sequence[Result]]) -> Table:
    """The main pair, seed by seed: F1 at each look."""
    rows: list[Sequence[str]] = []
    steps = sorted(
        {step for name in ("released", "zero_conv") for r in found.get(name, ()) for step in curve(r, "fidelity")}
    )
    for name in ("released", "zero_conv"):
        for result in found.get(name, ()):
            values = curve(result, "fidelity")
            cells = (f"{values[step]:.2f}" if step in values else "" for step in steps)
            rows.append((CASES[name].title, str(result["seed"]), *cells))
    return ("control", "seed", *(f"step {step}" for step in steps)), rows


def tables(plan: Plan) -> dict[str, Table]:
    """Name of a place in the page -> table."""
    from . import evidence_pairs

    found = results(plan)
    made: dict[str, Table] = {}
    if found:
        made |= {"summary": summary(found), "fidelity": by_step(found, "fidelity"), "pair": pair(found)}
    kept = plan.folder / evidence_pairs.FILE
    if kept.is_file():
        made |= evidence_pairs.tables(json.loads(kept.read_text("utf-8"))["rows"])
    return made


def markdown(table: Table) -> str:
    head, rows = table
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


def pasted(page: str, made: Mapping[str, Table]) -> str:
    """The page with each table between its markers, `<!-- table: NAME -->` and `<!-- end -->`.

    A table without a place is left out; a place without a table keeps its text.
    """

    def place(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- table: {name} -->\n{markdown(made[name])}\n<!-- end -->" if name in made else match[0]

    return re.sub(r"<!-- table: (\w+) -->\n(?:.*?\n)??<!-- end -->", place, page, flags=re.S)


def draw_charts(plan: Plan, folder: Path) -> list[Path]:
    """One chart per figure, and one of the main pair by seed; their paths."""
    found, made = results(plan), []
    for figure, name in CHARTS.items():
        lines: list[Line] = [
            (SHORT[case][0], list(mean_curve(many, figure).items()), SHORT[case][1]) for case, many in found.items()
        ]
        made.append(folder / name)
        _save(lines, made[-1])
    seeds: list[Line] = [
        (f"{SHORT[case][0]}, seed {result['seed']}", list(curve(result, "fidelity").items()), SHORT[case][1])
        for case in ("released", "zero_conv")
        for result in found.get(case, ())
    ]
    made.append(folder / PAIR_CHART)
    _save(seeds, made[-1])
    return made


def _save(lines: Sequence[Line], path: Path) -> None:
    line_chart(lines, (760, 400)).quantize(64).save(path, optimize=True)


def write(plan: Plan, page: Path = PAGE, keep: bool = True) -> list[Path]:
    """Tables into the page, plots beside it, and every number into benchmarks/results; what was written."""
    made = tables(plan)
    for name, table in made.items():
        print(f"{name}\n{markdown(table)}\n", flush=True)
    if not keep:
        return []
    page.write_text(pasted(page.read_text("utf-8"), made), "utf-8", newline="\n")
    numbers = result_path("convergence").with_suffix(".json")
    pairs = plan.folder / "pairs.json"
    every: dict[str, Any] = {f"{r['case']}:{r['seed']}": r for many in results(plan).values() for r in many}
    if pairs.is_file():
        every["pairs"] = json.loads(pairs.read_text("utf-8"))
    numbers.write_text(json.dumps(every, indent=1) + "\n", "utf-8", newline="\n")
    return [page, numbers, *draw_charts(plan, page.parent)]
