"""Blocks of the base under torch.compile: the same losses, every block compiled, a message where it fails."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch._dynamo
from comfyui_controlnext.tests.fixtures.narrow_training import config_for, narrow_base, scenes
from comfyui_controlnext.tests.fixtures.training_fixtures import Watcher, base_of, loop_on, small, take_steps, train_in
from torch import Tensor, nn
from torch._dynamo.utils import counters

if TYPE_CHECKING:
    from pathlib import Path

    from comfyui_controlnext.tests.fixtures.training_fixtures import Studio

pytestmark = pytest.mark.comfy

LOSS = 1e-5
"""Relative difference of losses: compiled code adds up in another order."""


@pytest.fixture
def fresh_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Separate folder for compiled code: a run that was killed leaves half a file in the shared one."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))


def losses_of(make: Any) -> tuple[list[float], int]:
    """Losses of three steps, and the number of graphs that were compiled for them."""
    torch._dynamo.reset()
    counters.clear()
    return take_steps(make(), 3), counters["stats"]["unique_graphs"]


@pytest.mark.long
@pytest.mark.usefixtures("fresh_code")
@pytest.mark.filterwarnings("default")
def test_a_unet_of_compiled_blocks_has_the_same_losses(loaded_studio: Studio) -> None:
    plain, none = losses_of(lambda: loop_on(base_of(loaded_studio), small()))
    found, graphs = losses_of(lambda: loop_on(base_of(loaded_studio), small(compile=True)))
    assert none == 0 and graphs > 0 and found == pytest.approx(plain, rel=LOSS)


@pytest.mark.long
@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.usefixtures("fresh_code")
@pytest.mark.filterwarnings("default")
def test_a_transformer_of_compiled_blocks_has_the_same_losses(family: str) -> None:
    base = narrow_base(family)
    plain, none = losses_of(lambda: loop_on(base, config_for(family), scenes()))
    found, graphs = losses_of(lambda: loop_on(base, config_for(family, compile=True), scenes()))
    assert none == 0 and graphs > 0 and found == pytest.approx(plain, rel=LOSS)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_every_block_of_a_kind_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve blocks of other widths share one forward, of which torch compiles eight and no more by itself."""
    from comfyui_controlnext.controlnext_training.base_model import blocks

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for name in blocks.LIMITS:
        if hasattr(torch._dynamo.config, name):
            monkeypatch.setattr(torch._dynamo.config, name, 8)
    torch._dynamo.reset()
    counters.clear()
    network = nn.ModuleList(Block(width) for width in range(2, 14))
    inputs = [torch.randn(3, width) for width in range(2, 14)]
    expected = [block(x) for block, x in zip(network, inputs, strict=True)]
    assert blocks.prepare_blocks(network, (Block,), recompute=False, compiles=True) == 12
    found = [block(x) for block, x in zip(network, inputs, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert counters["stats"]["unique_graphs"] == 12


def test_a_machine_without_a_compiler_is_told_before_anything_is_encoded(
    loaded_studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("Failed to find C++ compiler. Please specify via CXX environment variable.\nmore")

    monkeypatch.setattr(torch, "compile", missing)
    watch = Watcher()
    with pytest.raises(ValueError, match=r"^compile: torch.compile does not work here \(Failed to find C\+\+ compiler"):
        train_in(tmp_path, base_of(loaded_studio), small(compile=True), watch)
    assert watch.lines == []
