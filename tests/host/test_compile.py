"""torch.compile: the stock TorchCompileModel node over controlled models, with a backend that needs no C++ compiler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.sampling_fixtures import Studio, picture, relative
from comfyui_controlnext.tools.tiny_models import make_controlnet_xs
from torch._dynamo.utils import counters

pytestmark = [pytest.mark.comfy, pytest.mark.long, pytest.mark.filterwarnings("ignore")]

BACKEND = "eager"
STEPS = 2
OURS = "Skip calling `torch.compiler.disable()`d function"
BREAKS = {"bare": 0, "ControlNeXt": 2, "stock Apply": 2, "ControlNet-XS": 3}
"""Graph breaks of this pack: where features are added or a ControlNet-XS starts, and the frame around each."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def controlled(studio: Studio, kind: str, folder: Path) -> tuple[Any, tuple[Any, ...]]:
    """MODEL and conditionings (or none) with a control of that kind."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

    if kind == "bare":
        return studio.model, ()
    if kind == "ControlNet-XS":
        control = load_controlnet_xs(make_controlnet_xs(folder / "xs.safetensors")).control
        return studio.ours(studio.model, control, picture()), ()
    loaded = studio.load()
    if kind == "stock Apply":
        return loaded.model, tuple(studio.stock(loaded.control, picture()))
    return studio.ours(loaded.model, loaded.control, picture()), ()


def compile_model(model: Any) -> Any:
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    return TorchCompileModel.execute(model, BACKEND)[0]


def our_breaks() -> int:
    return sum(number for reason, number in counters["graph_break"].items() if reason.startswith(OURS))


@pytest.mark.parametrize("kind", BREAKS)
def test_a_compiled_model_gives_the_same_with_the_breaks_that_there_must_be(
    studio: Studio, kind: str, tmp_path: Path
) -> None:
    model, conds = controlled(studio, kind, tmp_path)
    expected = studio.sample(model, *conds, steps=STEPS)
    compiled = compile_model(model)
    assert relative(studio.sample(compiled, *conds, steps=STEPS), expected) < 1e-5
    assert our_breaks() == BREAKS[kind]
    counters.clear()
    studio.sample(compiled, *conds, steps=STEPS, seed=9)
    assert counters["stats"]["unique_graphs"] == 0, "a second run compiles nothing"


def test_a_control_splits_the_compiled_unet_nowhere_but_at_its_site(studio: Studio, tmp_path: Path) -> None:
    graphs = {}
    for kind in ("bare", "ControlNeXt"):
        torch._dynamo.reset()
        counters.clear()
        model, _ = controlled(studio, kind, tmp_path)
        studio.sample(compile_model(model), steps=1)
        graphs[kind] = counters["stats"]["unique_graphs"]
    assert graphs["bare"] <= graphs["ControlNeXt"] <= graphs["bare"] + 2


def test_another_strength_or_hint_compiles_nothing_anew(studio: Studio) -> None:
    loaded = studio.load()
    compiled = compile_model(studio.ours(loaded.model, loaded.control, picture()))
    studio.sample(compiled, steps=STEPS)
    counters.clear()
    other = compile_model(studio.ours(loaded.model, loaded.control, picture(5), strength=0.3))
    assert (
        relative(
            studio.sample(other, steps=STEPS),
            studio.sample(studio.ours(loaded.model, loaded.control, picture(5), strength=0.3), steps=STEPS),
        )
        < 1e-5
    )
    assert counters["stats"]["unique_graphs"] <= 2
