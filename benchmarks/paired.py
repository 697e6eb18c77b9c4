"""Paired cases and a bare model, interleaved: a ratio is a case's step over the bare step of the same repeat.

`own` is the ratio of a step's processor time to the same time without the part in this pack's code. Both are of one
step, so that the noise of other programs cancels. It is measured only on the CPU: on a GPU the code only launches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .host_start import Options
from .recording import append_table, spread
from .sampling import Cost, QueueRun, Setup, forget, queue

HEAD = ("case", "goal GPU / CPU", "wall", "processor time", "own", "s/step")
RUN_STEPS = 20
"""Steps of a queue run on a GPU, over which one-time work is spread."""
CPU_STEPS = 2
"""Steps of a first run on a CPU: one-time work weighs ten times as much as in a real run. Other runs have one step."""


@dataclass
class Case:
    """Case of the table. first: no feature of its hints is cached; second: it runs after another run with its hints."""

    name: str
    setup: Setup
    first: bool = False
    second: bool = False
    goal: str = ""


def measure(what: str, title: str, cases: Sequence[Case], options: Options) -> None:
    """Run the cases, the bare model first among them, and write a table."""
    if len(cases) < 2:
        return
    steps = _first_steps(options)
    length = {case.name: steps if case.first or not options.cpu else 1 for case in cases}
    for case in cases:  # kernels are chosen and memory is allocated in a process's first runs
        if case is cases[0] or case.second or not options.cpu:
            queue(case.setup, length[case.name] if case.second else min(2, length[case.name]), seed=99)
    found: dict[str, list[tuple[QueueRun, QueueRun]]] = {case.name: [] for case in cases}
    began, done = time.monotonic(), 0
    for repeat in range(options.repeats):
        if repeat and options.left < (time.monotonic() - began) / repeat:
            break
        done += 1
        bare = queue(cases[0].setup, length[cases[0].name], seed=repeat)
        found[cases[0].name].append((bare, bare))
        for case in cases[1:]:
            if case.first:
                forget(case.setup)
            found[case.name].append((queue(case.setup, length[case.name], seed=repeat), bare))
    rows = [row(case, found[case.name], options) for case in cases]
    _write(what, title, HEAD, rows, f"{done} interleaved repeats, first runs of {steps} steps", options)


def measure_own(what: str, title: str, cases: Sequence[Case], options: Options) -> None:
    """Measure without the bare model, each case once, for steps that take minutes."""
    rows, ran = [], set()
    for case in cases[1:]:
        if case.first:
            forget(case.setup)
        elif id(case.setup) not in ran:  # its first run is not among the requested cases
            queue(case.setup, 1)
        ran.add(id(case.setup))
        steps = _first_steps(options) if case.first else 1
        cost = queue(case.setup, steps).per_step(steps)
        rows.append((case.name, case.goal, spread([_own(cost)]), f"{cost.wall:.1f}"))
    settings = f"each once, a second run after a first one, first runs of {_first_steps(options)} steps"
    _write(what, title, (*HEAD[:2], *HEAD[-2:]), rows, settings, options)


def _first_steps(options: Options) -> int:
    return CPU_STEPS if options.cpu else RUN_STEPS


def _write(
    what: str, title: str, head: Sequence[str], rows: Sequence[Sequence[str]], settings: str, options: Options
) -> None:
    settings = f"{str(options.dtype)[6:]}, {settings}"
    if options.cpu:
        settings += f", {torch.get_num_threads()} threads"
    append_table(what, title, head, rows, settings, options.json, keep=not options.quick)


def _own(cost: Cost) -> float:
    """Ratio of a step to its time without this pack's code."""
    return cost.cpu / (cost.cpu - cost.own)


def row(case: Case, runs: Sequence[tuple[QueueRun, QueueRun]], options: Options) -> tuple[str, ...]:
    """Row of the table; runs: pairs of the case and the bare model."""
    steps = _first_steps(options)
    costs = [(run.per_step(steps), bare.per_step(steps)) for run, bare in runs]
    own = [_own(cost) for cost, _ in costs]
    return (
        case.name,
        case.goal,
        spread([cost.wall / bare.wall for cost, bare in costs]),
        spread([cost.cpu / bare.cpu for cost, bare in costs]),
        spread(own) if options.cpu and max(own) > 1 else "",
        f"{min(cost.wall for cost, _ in costs):.3f}",
    )
