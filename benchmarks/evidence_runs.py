"""Trainings of several kinds of control with the project's own trainer: the cases and their runs.

A finished run is a JSON file that names its settings and base; it is skipped while both are unchanged. A run that
was stopped goes on from its last state.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tools.environment import ROOT
from .recording import facts

if TYPE_CHECKING:
    from ..controlnext_training.base_model.encode import BaseWithEncoders
    from ..controlnext_training.config import TrainConfig

RECIPES = ROOT / "controlnext_training" / "recipes"
STEPS, BATCH, LOOKS = 500, 2, 5
SCENES, SCENE_SEED = 1000, 21
"""So many scenes of that seed train: few enough for encoding them in minutes."""
FIGURES = ("loss", "loss_without", "fidelity", "fidelity_without", "distance", "distance_without")
"""Figures of a validation."""


@dataclass(frozen=True)
class Case:
    """One way of control."""

    title: str
    settings: Mapping[str, Any]
    """Settings that differ from the recipe."""
    recipe: str = "demo_edges"
    seeds: tuple[int, ...] = (0,)
    stock: bool = False
    """A stock-style copy of the base's encoder, and not a control of this pack."""


CASES = {
    "released": Case("ControlNeXt as released", {"fusion": "released"}, seeds=(0, 1, 2)),
    "zero_conv": Case("ControlNeXt with a zero convolution", {"fusion": "zero_conv"}, seeds=(0, 1, 2)),
    "paper": Case("ControlNeXt with equation 10", {"fusion": "paper"}),
    "add": Case("ControlNeXt with plain addition", {"fusion": "add"}),
    "stock": Case("ControlNet copy", {"trainable": "none", "control_learning_rate": 1e-4}, stock=True),
    "xs": Case("ControlNet-XS", {}, recipe="demo_xs"),
}
"""Name -> case, in the order in which they are run: the pair that matters most comes first.

With so few pictures in a step the copy at the encoder's rate (1.5e-3) ended worse than no control (validation loss
0.013, without control 0.0056), so it trains at 1e-4.
"""


@dataclass(frozen=True)
class Plan:
    """Settings shared by all runs."""

    folder: Path
    """Of the results, with the runs, the trained files and the encoded scenes below it."""
    base: Path
    steps: int = STEPS
    batch: int = BATCH
    scenes: int = SCENES
    pictures: int = 8
    sampler_steps: int = 8
    looks: int = LOOKS
    """Number of validations of a run."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings that differ for all, such as the size of the scenes."""


def config_of(name: str, seed: int, plan: Plan) -> TrainConfig:
    """The configuration of a run: the demo's recipe over all blocks, at a constant rate and without an average."""
    from ..controlnext_training.config_files import make_config, read_recipe

    case = CASES[name]
    recipe = read_recipe(RECIPES / f"{case.recipe}.toml")
    common = {
        "base": plan.base.name,
        "output_name": f"{name}_{seed}",
        "blocks": "",
        "steps": plan.steps,
        "batch_size": plan.batch,
        "data": (f"synthetic:edges:{plan.scenes}:{SCENE_SEED}",),
        "schedule": "constant",
        "ema_decay": 0.0,
        "seed": seed,
        "keep_states": 1,
        "validate_every": max(1, plan.steps // plan.looks),
        "validation_samples": plan.pictures,
        "validation_steps": plan.sampler_steps,
    }
    return make_config(plan.changes, case.settings, common, recipe)


def chosen(words: Sequence[str]) -> Iterator[tuple[str, int]]:
    """(case, seed) of `released` or `released:0`; without words all. Raises SystemExit for a name that there is not."""
    wanted = words or tuple(CASES)
    for word in wanted:
        name, _, seed = word.partition(":")
        if name not in CASES or (seed and not seed.isdecimal()):
            raise SystemExit(f"--cases {word}: there are {', '.join(CASES)}, each with :SEED where wanted.")
        for number in (int(seed),) if seed else CASES[name].seeds:
            yield name, number


def key_of(config: TrainConfig, base: BaseWithEncoders) -> str:
    """Key of a result: a digest of its settings and weights."""
    parts = (config.to_json(), *(base.identity(what) for what in ("model", "vae", "text")))
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=6).hexdigest()


def result_file(plan: Plan, name: str, seed: int) -> Path:
    return plan.folder / f"{name}_{seed}.json"


def result_of(plan: Plan, name: str, seed: int) -> dict[str, Any] | None:
    """Result of a finished run, or None."""
    path = result_file(plan, name, seed)
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else None


def run_case(name: str, seed: int, plan: Plan, base: BaseWithEncoders, watch: Any) -> dict[str, Any]:
    """Train as `run.py train` does, unless that is done; the result. Raises what `train` raises."""
    from ..controlnext_training.command import open_data
    from ..controlnext_training.results import RunFiles
    from ..controlnext_training.train import train

    config = config_of(name, seed, plan)
    key, done = key_of(config, base), result_of(plan, name, seed)
    if done is not None and done["key"] == key:
        watch.say(f"{name}:{seed} is done: {result_file(plan, name, seed)}")
        return done
    watch.say(f"== {name}:{seed}, {CASES[name].title}")
    run = RunFiles(
        folder=plan.folder / "runs" / f"{name}_{seed}-{key}",
        cache=plan.folder / "encoded",
        target=plan.folder / "files" / f"{name}_{seed}-{key}",
        base=base.identity("model"),
        base_name=plan.base.name,
    )
    data, held_out = open_data(config.data, config), open_data(config.validation_data, config)
    if CASES[name].stock:
        from .stock_copy import copy_of

        train(base, data, held_out, config, run, watch, make=copy_of(base.model))
    else:
        train(base, data, held_out, config, run, watch)
    result = read_result(name, seed, config, run.folder) | {"base": run.base, "key": key}
    path = result_file(plan, name, seed)
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    for state in run.folder.glob("state-*"):
        shutil.rmtree(state, ignore_errors=True)  # large, and of no more use
    return result


def read_result(name: str, seed: int, config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Result of a finished run from its log."""
    from ..controlnext_training import journal

    seconds = journal.read(folder, "step", "seconds_per_step").values()
    (trained,) = set(journal.read(folder, "dry_run", "trained").values())
    return {
        "case": name,
        "seed": seed,
        "steps": config.steps,
        "batch": config.batch_size,
        "precision": config.precision,
        "learning_rate": config.learning_rate,
        "control_learning_rate": config.control_learning_rate,
        "trained": int(trained),
        "seconds_per_step": statistics.median(seconds),
        "figures": {figure: journal.read(folder, "validation", figure) for figure in FIGURES},
        "facts": facts(),
    }


def quick(plan: Plan) -> Plan:
    """A look: that everything runs, not what comes of it."""
    return replace(plan, steps=4, batch=2, scenes=8, pictures=2, sampler_steps=2, looks=2)
