"""Parameter groups of the optimizer, Adafactor, fused kernels, and states from before groups existed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfyui_controlnext.controlnext_training import optimizers, state
from comfyui_controlnext.controlnext_training.optimizers import MissingOptimizerError, build, grouped
from comfyui_controlnext.tests.fixtures.training_fixtures import Watcher, base_of, loop_on, run_in, small, take_steps
from torch import Tensor, nn

if TYPE_CHECKING:
    from comfyui_controlnext.tests.fixtures.training_fixtures import Studio

NUMBERS: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.5, "eps": 1e-8}
SHAPES = [(6, 4), (), (5,), (3, 4, 2, 2)]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_matrices_and_kernels_decay_and_norms_and_biases_do_not() -> None:
    """Weights without a gradient are changed by AdamW only by their decay: w (1 - rate * decay)."""
    ours = parameters()
    before = [p.detach().clone() for p in ours]
    optimizer = build("adamw", grouped(ours, 0.1, 0.5), **NUMBERS)
    for p in ours:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(ours, before, strict=True):
        expected = old * (1 - 0.1 * 0.5) if p.ndim > 1 else old
        assert torch.allclose(p, expected, rtol=1e-6, atol=0)
    assert torch.equal(ours[2], before[2]) and not torch.equal(ours[0], before[0])
    assert [len(group["params"]) for group in grouped(ours[:1], 0.1, 0.5)] == [1], "no empty group"
    assert [len(group["params"]) for group in grouped(ours, 0.1, 0.5, decay_all=True)] == [4]


def adafactor(weights: list[Tensor], gradients: list[list[Tensor]], rate: float, decay: float) -> list[Tensor]:
    """Adafactor of Shazeer and Stern 2018, algorithms 4 and 5 without momentum, in fp64: the decay of the second moment
    is 1 - t^-0.8, an update is clipped to a root mean square of 1, and the step is the rate (not relative).
    """
    weights, moments = [w.double().clone() for w in weights], [None] * len(weights)
    for t, of_step in enumerate(gradients, 1):
        keep = 1 - t**-0.8
        for i, gradient in enumerate(of_step):
            square = gradient.double() ** 2 + 1e-30
            if square.ndim > 1:
                rows, columns = square.sum(-1, keepdim=True), square.sum(-2, keepdim=True)
                old = moments[i] or (torch.zeros_like(rows), torch.zeros_like(columns))
                moments[i] = rows, columns = (
                    keep * old[0] + (1 - keep) * rows,
                    keep * old[1] + (1 - keep) * columns,
                )
                second = rows * columns / rows.sum(-2, keepdim=True)
            else:
                old = torch.zeros_like(square) if moments[i] is None else moments[i]
                moments[i] = second = keep * old + (1 - keep) * square
            update = gradient.double() / second.sqrt()
            update /= max(1.0, float(update.square().mean().sqrt()))
            size = max(1.0, float(weights[i].square().mean().sqrt()))
            weights[i] = weights[i] * (1 - rate * decay) - size * rate * update
    return weights


@pytest.mark.parametrize("size", [1.0, 1e-4], ids=["gradients of 1", "gradients of 1e-4"])
def test_adafactor_is_the_papers_at_the_configured_rate(size: float) -> None:
    ours = parameters()
    ours[0].detach().zero_()  # as a difference at its start
    before = [p.detach().clone() for p in ours]
    gradients = [
        [size * torch.randn(s, generator=torch.Generator().manual_seed(7 * t + i)) for i, s in enumerate(SHAPES)]
        for t in range(6)
    ]
    optimizer = build("adafactor", [{"params": ours, "lr": 1e-3}], **{**NUMBERS, "weight_decay": 0.1})
    for of_step in gradients:
        for p, gradient in zip(ours, of_step, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
    expected = adafactor(before, gradients, 1e-3, 0.1)
    for p, wanted in zip(ours, expected, strict=True):
        assert torch.allclose(p.detach().double(), wanted, rtol=1e-5, atol=1e-7)
    assert float((ours[0].detach() - before[0]).abs().mean()) > 1e-3, "six steps at the full rate"


def test_a_gradient_of_zero_leaves_adafactor_finite() -> None:
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = build("adafactor", [{"params": [p], "lr": 1e-3}], **{**NUMBERS, "weight_decay": 0.0})
    p.grad = torch.zeros(4, 4)
    optimizer.step()
    assert torch.equal(p, torch.ones(4, 4))


def test_adafactor_keeps_rows_and_columns() -> None:
    p = nn.Parameter(torch.randn(64, 32))
    optimizer = build("adafactor", [{"params": [p], "lr": 1e-3}], **NUMBERS)
    p.grad = torch.randn(64, 32)
    optimizer.step()
    held = sum(t.numel() for t in optimizer.state[p].values() if isinstance(t, Tensor))
    assert held == 64 + 32 + 1


def test_a_torch_without_adafactor_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Adafactor")
    with pytest.raises(MissingOptimizerError, match="adafactor came with torch 2.5, and this is torch"):
        optimizers.check_optimizer("adafactor", [1e-4])


def test_a_device_without_the_fused_kernel_gets_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = torch.optim.AdamW

    def refusing(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("fused"):
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of other devices")
        return theirs(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", refusing)
    made = build("adamw", grouped(parameters(), 0.1, 0.5), **NUMBERS)
    assert isinstance(made, theirs) and not made.param_groups[0]["fused"]


@pytest.mark.comfy
def test_a_state_of_before_the_groups_goes_on_bit_for_bit(loaded_studio: Studio, tmp_path: Path) -> None:
    from comfyui_controlnext.controlnext_training import training_run

    base, config = base_of(loaded_studio), small(steps=4, weight_decay=0.5, learning_rate=1e-3)
    old_rules = {key: None for key in training_run.RULES}
    straight = loop_on(base, config, rules=old_rules)
    reference = torch.optim.AdamW(
        [
            {"params": [p for name, p in straight.parameters.items() if name.startswith(kind)], "lr": rate}
            for kind, rate in (("control.", config.control_learning_rate), ("unet.", config.learning_rate))
        ],
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )
    for group, theirs in zip(straight.optimizer.param_groups, reference.param_groups, strict=True):
        assert {**group, "initial_lr": 0} == {**theirs, "initial_lr": 0}, "one group a rate, as that version had it"
    take_steps(straight, 2)
    files = run_in(tmp_path, base)
    files.folder.mkdir(parents=True)
    folder = training_run.save(straight, files)
    take_steps(straight, 2, 2)

    facts = json.loads((folder / state.FACTS).read_text("utf-8"))
    assert {facts.pop(key) for key in training_run.RULES} == {None}, "a run that goes on keeps its rules"
    (folder / state.FACTS).write_text(json.dumps(facts), "utf-8")
    found = state.latest(files.folder)
    assert found is not None and training_run.rules_of(found) == old_rules
    resumed = loop_on(base, config, rules=training_run.rules_of(found))
    training_run.resume(resumed, found, Watcher())
    take_steps(resumed, 2, 2)
    assert all(torch.equal(p, resumed.parameters[name]) for name, p in straight.parameters.items())
    new = loop_on(base, config)
    take_steps(new, 4)
    assert any(not torch.equal(p, new.parameters[name]) for name, p in straight.parameters.items())
