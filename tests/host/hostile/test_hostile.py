"""Hostile files, recipes and folders: each is opened, or refused in words that name it, soon and in little memory.

`python run.py test --only hostile --long -k 50000` makes the figures of docs/reliability.md, and writes the outcome of
each part to CONTROLNEXT_RESULTS, a folder, where that is set.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from comfyui_controlnext.controlnext_core.file_names import problem_of_prefix
from comfyui_controlnext.controlnext_core.hints.pose import parse_frames
from comfyui_controlnext.controlnext_core.schedule import parse_schedule
from comfyui_controlnext.controlnext_core.xs_specs import parse_heads
from comfyui_controlnext.controlnext_training.choices import parse_blocks
from comfyui_controlnext.controlnext_training.config import ConfigError
from comfyui_controlnext.tests.host.hostile.mutator import MAKERS, rng_of
from hypothesis import HealthCheck, given, settings

SEED = 26
SHORT = {"safetensors": 220, "torch": 150, "recipes": 120, "data": 80}
CHILD = Path(__file__).with_name("child.py")
ENDS = ("opened", "refused")
MANY = {"300": 300, "2000": 2000, "50000": 50_000}
OTHERS = ("host", "diffusers")


def run_cases(folder: Path, parts: dict[str, int], timeout: float, first: int = 0) -> list[dict[str, Any]]:
    """Results of a child's cases; that of a child that died is `died`."""
    wanted = [f"{part}:{first}:{count}" for part, count in parts.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, str(CHILD), str(folder), str(SEED), *wanted],
        capture_output=True,
        encoding="utf-8",
        env=environment,
        timeout=timeout,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    ended = [line for line in lines if "end" in line]
    if done.returncode:
        assert lines, f"the child ended before its first case: {done.stderr[-2000:]}"
        begun = lines[-1]
        ended.append(
            {**begun, "number": begun.get("begun"), "end": f"died ({done.returncode})", "text": done.stderr[-2000:]}
        )
    return ended


def assert_all_well(ended: list[dict[str, Any]], count: int) -> None:
    bad = [case for case in ended if case["end"] not in ENDS]
    assert not bad, f"{len(bad)} of {len(ended)}, first {json.dumps(bad[:3], indent=1)}"
    assert len(ended) == count
    seen = collections.Counter(case["end"] for case in ended)
    assert all(seen[end] for end in ENDS), f"the mutator makes cases of one kind alone: {seen}"


def test_hostile_files_recipes_and_folders_are_opened_or_refused(tmp_path: Path) -> None:
    assert_all_well(run_cases(tmp_path, SHORT, timeout=900), sum(SHORT.values()))


@pytest.mark.comfy
def test_the_loader_opens_or_refuses_in_the_real_host(tmp_path: Path) -> None:
    assert_all_well(run_cases(tmp_path, {"loader": 30}, timeout=900), 30)


@pytest.mark.long
@pytest.mark.parametrize("size", MANY)
@pytest.mark.parametrize("part", [*SHORT, pytest.param("loader", marks=pytest.mark.comfy)])
def test_many_hostile_cases(tmp_path: Path, part: str, size: str) -> None:
    started, ended = time.time(), []
    for first in range(0, MANY[size], 1000):  # a child for each thousand, as none may hold what others left
        ended += run_cases(tmp_path, {part: min(1000, MANY[size])}, timeout=3600, first=first)
        seen = collections.Counter(case["end"] for case in ended)
        result = {
            "part": part,
            "seed": SEED,
            "cases": len(ended),
            "ends": seen,
            "seconds": round(time.time() - started),
        }
        keep(f"hostile_{part}_{size}", result)  # each time: a run that is stopped has what it did
    assert_all_well(ended, MANY[size])


def keep(name: str, found: dict[str, Any]) -> None:
    """Write a result to the folder of results, where one is named."""
    if folder := os.environ.get("CONTROLNEXT_RESULTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, f"{name}.json").write_text(json.dumps(found), "utf-8")


def run_with_deaths(folder: Path, part: str, count: int) -> list[dict[str, Any]]:
    """Results as `run_cases`, with a further child after each case in which a child died."""
    ended: list[dict[str, Any]] = []
    while len(ended) < count:
        ended += run_cases(folder, {part: count - len(ended)}, timeout=3600, first=len(ended))
    return ended


@pytest.mark.comfy
@pytest.mark.long
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("part", ["safetensors", "torch"])
def test_readers_of_others_meet_the_same_files(tmp_path: Path, part: str, other: str) -> None:
    """A table for docs/reliability.md; asked of them is nothing but that each case has an end."""
    ended = run_with_deaths(tmp_path, f"{part}@{other}", 200)
    seen = collections.Counter(case["end"].partition(" ")[0] for case in ended)
    failed = [case for case in ended if case["end"].startswith(("raw", "refused"))]  # a ValueError is `refused`
    named = sum(f"case{case['number']}" in case["text"] for case in failed)
    result = {"part": part, "reader": other, "seed": SEED, "cases": len(ended), "ends": seen, "named": named}
    keep(f"hostile_{part}_{other}", result)
    assert len(ended) == 200 and seen["opened"] and set(seen) <= {"opened", "raw", "refused", "died", "slow"}


def test_the_same_seed_and_number_make_the_same_case(tmp_path: Path) -> None:
    for part in ("safetensors", "torch", "recipes"):
        made = [MAKERS[part](tmp_path / f"case{i}", rng_of(part, 3, 5)).read_bytes() for i in range(2)]
        other = MAKERS[part](tmp_path / "other", rng_of(part, 3, 6)).read_bytes()
        assert made[0] == made[1] != other


# -- texts of widgets, and keypoints -----------------------------------------------------------------------------------

QUICK = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=60)


@QUICK
@given(ANY_TEXT | st.text("0123456789.:,-e ", max_size=30))
def test_any_text_of_a_widget_is_read_or_refused(text: str) -> None:
    for read, refusals in ((parse_schedule, ValueError), (parse_heads, ValueError), (parse_blocks, ConfigError)):
        try:
            read(text)
        except refusals as error:
            assert len(str(error)) < 700 and type(error) in (ValueError, ConfigError)
    assert len(problem_of_prefix(text)) < 500


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=6)
    | st.dictionaries(st.sampled_from(["people", "pose_keypoints_2d", "canvas_width", "canvas_height", "x"]), inner),
    max_leaves=20,
)


@settings(QUICK, max_examples=100)
@given(JSON)
def test_any_keypoints_are_read_or_refused(value: Any) -> None:
    try:
        parse_frames(value, "driving_poses")
    except ValueError as error:
        assert str(error).startswith("driving_poses")
