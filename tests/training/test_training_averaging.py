"""Moving average in a thread beside the steps, and only on rank 0."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfyui_controlnext.controlnext_training import averaging
from comfyui_controlnext.controlnext_training.averaging import Ema
from comfyui_controlnext.controlnext_training.distributed import ProcessGroup
from comfyui_controlnext.tests.fixtures.training_fixtures import base_of, drawn, loop_on, small
from torch import Tensor, nn

if TYPE_CHECKING:
    from comfyui_controlnext.tests.fixtures.training_fixtures import Studio

SHAPES = [(3, 5), (64, 80), (), (7,)]


def weights_on(device: str = "cpu") -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {f"p{i}": nn.Parameter(torch.randn(shape, generator=generator).to(device)) for i, shape in enumerate(SHAPES)}


def moved(weights: Mapping[str, Tensor], step: int) -> None:
    for i, p in enumerate(weights.values()):
        p.detach().add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(p.device))


def after(ema: Ema, weights: Mapping[str, Tensor], steps: int) -> dict[str, Tensor]:
    for step in range(steps):
        ema.before_step()
        moved(weights, step)
        ema.update(weights)
    return ema.state_dict()


def test_an_average_behind_the_steps_is_the_same_bit_for_bit() -> None:
    one, other = weights_on(), weights_on()
    expected, found = after(Ema(one, 0.99), one, 20), after(Ema(other, 0.99, behind=True), other, 20)
    assert expected.keys() == found.keys() and all(torch.equal(t, found[name]) for name, t in expected.items())


def test_steps_do_not_wait_for_the_average_and_readers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    go, entered = threading.Event(), threading.Event()
    taken = averaging._take_in

    def slow(*given: Any) -> None:
        entered.set()
        assert go.wait(30)
        taken(*given)

    monkeypatch.setattr(averaging, "_take_in", slow)
    weights = weights_on()
    ema = Ema(weights, 0.5, behind=True)
    start = {name: t.clone() for name, t in ema.average.items()}
    moved(weights, 1)
    ema.update(weights)
    assert entered.wait(30)
    then = {name: p.detach().clone() for name, p in weights.items()}
    moved(weights, 2)  # the next step: the copies are of the one before
    assert all(torch.equal(ema.average[name], t) for name, t in start.items()), "the update still waits"
    threading.Timer(0.05, go.set).start()
    with ema.swapped(weights):
        expected = {name: start[name].lerp(then[name], 0.9) for name in start}
        assert all(torch.equal(weights[name], t) for name, t in expected.items())


def test_an_error_of_the_thread_is_raised_by_the_next_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(averaging, "_take_in", full)
    weights = weights_on()
    ema = Ema(weights, 0.5, behind=True)
    ema.update(weights)
    with pytest.raises(MemoryError, match="no room"):
        ema.state_dict()


@pytest.mark.gpu
def test_copies_from_a_gpu_are_of_the_step_that_they_follow() -> None:
    one, other = weights_on(), weights_on("cuda")
    ema = Ema(other, 0.99)
    assert ema._background is not None and all(t.is_pinned() for t in ema._background.copies.values())
    expected, found = after(Ema(one, 0.99), one, 20), after(ema, other, 20)
    assert all(torch.allclose(t, found[name], atol=1e-6) for name, t in expected.items())


class Alone(ProcessGroup):
    """Rank of two whose module is not wrapped, since no other process exists."""

    def wrap(self, module: nn.Module) -> nn.Module:
        return module


@pytest.mark.comfy
def test_the_first_process_alone_keeps_an_average(loaded_studio: Studio) -> None:
    config = small(ema_decay=0.9)
    kept = [loop_on(base_of(loaded_studio), config, drawn(), group=Alone(rank, 2)).ema for rank in (0, 1)]
    assert kept[0] is not None and kept[1] is None
