"""The benchmark `convergence`: its places and the settings of its runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from comfyui_controlnext.benchmarks import convergence
from comfyui_controlnext.controlnext_training.config_files import make_config, read_recipe
from comfyui_controlnext.tools import bench


def test_the_door_before_a_block_adds_to_what_the_block_is_given() -> None:
    kept, options = object(), {"patches_replace": {"dit": {("double_block", 3): "theirs"}}}
    before = options["patches_replace"]["dit"]
    convergence.before_block(options, ("double_block", 0), lambda tokens, given: tokens + given["offset"])
    assert list(before) == [("double_block", 3)], "the host's dictionary was written to"
    blocks: Any = options["patches_replace"]["dit"]
    assert blocks[("double_block", 3)] == "theirs"
    args = {"img": torch.ones(2), "txt": kept, "transformer_options": {"offset": 4}}
    found = blocks[("double_block", 0)](args, {"original_block": lambda given: {**given, "img": 10 * given["img"]}})
    assert found["img"].tolist() == [50, 50] and found["txt"] is kept and args["img"].tolist() == [1, 1]


@dataclass(frozen=True)
class Spot:
    block: tuple[str, int]
    door: str = "own"


class Trained:
    """Control in training, reduced to the attributes used by `joined`: each join encodes later, as in the host's
    forward.
    """

    def __init__(self) -> None:
        self.place, self.encoded, self.spots, self.terms = Spot(("double_block", 0)), 0, [], []

    def _encode(self, hint: int) -> int:
        self.encoded += 1
        return 10 * hint

    def join(self, hint: int) -> None:
        self.spots.append(self.place)
        self.terms.append(lambda: self._encode(hint))


@pytest.mark.parametrize(("door", "blocks"), [(None, 4), ("before", 1)])
def test_blocks_share_one_map_in_a_forward(door: str | None, blocks: int) -> None:
    control, join = Trained(), convergence.joined(Trained.join, door, blocks)
    first = control.place
    for number, hint in enumerate((1, 2)):
        join(control, hint)
        assert [term() for term in control.terms[-blocks:]] == [10 * hint] * blocks
        assert control.encoded == number + 1
    expected = [replace(first, block=("double_block", number), door=door or "own") for number in range(blocks)]
    assert control.spots == 2 * expected and control.place == first


def test_cases_differ_in_what_they_say() -> None:
    recipe = read_recipe(convergence.RECIPE)
    first = make_config(convergence.COMMON, recipe)
    assert set(first.data).isdisjoint(first.validation_data) and first.ema_decay == 0
    assert first.data[0].rpartition(":")[2] != first.validation_data[0].rpartition(":")[2], "seen while training"
    for name, case in convergence.CASES.items():
        config = make_config({**convergence.COMMON, **case.settings}, recipe)
        others = {key for key, value in asdict(config).items() if value != asdict(first)[key]}
        assert others == set(case.settings), name
        assert len(others) + bool(case.place) == (name != "released"), name


def test_it_runs_by_name_only() -> None:
    assert "convergence" in bench.ON_REQUEST and "convergence" not in bench.BENCHMARKS
