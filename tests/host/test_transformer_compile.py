"""torch.compile: the stock TorchCompileModel node over controlled transformers, with the backend `eager`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.sampling_fixtures import picture, relative
from comfyui_controlnext.tests.fixtures.transformer_stage import each
from comfyui_controlnext.tests.host.test_compile import compile_model, our_breaks
from torch._dynamo.utils import counters

log = logging.getLogger(__name__)
pytestmark = [pytest.mark.comfy, pytest.mark.long, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("door", ["stock", "ours"])
@each
def test_a_compiled_model_gives_the_same_and_a_second_run_compiles_nothing(family: str, door: str, stage: Any) -> None:
    at = stage(family)
    control = at.load().control
    model, conds = (at.model, at.stock(control, picture())) if door == "stock" else (at.ours(control, picture()), None)
    expected, plain = at.sample(model, conds), at.sample()
    compiled = compile_model(model)
    found = at.sample(compiled, conds)
    log.info("%s, %s: %d graphs, %d breaks of ours", family, door, counters["stats"]["unique_graphs"], our_breaks())
    assert relative(found, expected) < 1e-5
    assert relative(found, plain) > 0.01
    counters.clear()
    assert relative(at.sample(compiled, conds), expected) < 1e-5
    assert counters["stats"]["unique_graphs"] == 0, "a second run compiles nothing"
    assert torch.equal(at.sample(), plain)
