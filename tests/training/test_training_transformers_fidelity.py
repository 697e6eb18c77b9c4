"""A control that is seen: on a narrow base that has learned drawn scenes, sampled latents follow their hints.

The scenes' silhouettes are the pictures and the hints; the base learns them without hints, then the control trains on
it. There is no autoencoder: latents are averaged pictures (`narrow_training.Averaging`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_training.drawn import DrawnDataset
from comfyui_controlnext.tests.fixtures.narrow_training import FAMILIES, base_on, config_for, correlation
from comfyui_controlnext.tests.fixtures.training_fixtures import SIDE, loop_on, take_steps
from comfyui_controlnext.tests.fixtures.transformer_fixtures import narrow_model

pytestmark = pytest.mark.comfy

SCENES, SEEDS = 256, 16
BASE_STEPS, BASE_BATCH, BASE_RATE = 160, 32, 3e-3
STEPS, BATCH, RATE = 60, 4, 2e-3
STANDARD_ERRORS = 3.0


class Silhouettes(DrawnDataset):
    """Scenes in black and white, all with one caption; the hint is the picture."""

    captions = ("a scene",) * SCENES

    def frame_keys(self, index: int, seed: int = 0, position: int = 0, variant: int = 0) -> tuple[str, ...]:
        return (f"silhouette {self.seed} {index}",)

    def load(self, index: int, seed: int = 0, position: int = 0) -> Any:
        sample = super().load(index, seed, position)
        return replace(sample, frames=sample.hints, caption=self.captions[index])


def silhouettes() -> Silhouettes:
    return Silhouettes("synthetic", "mask", SCENES, SIDE)


def learned_base(family: str) -> Any:
    """Narrow model trained on the scenes: every weight trained as a full difference, at control strength 0."""
    from comfyui_controlnext.controlnext_training.step import draw, losses

    base = base_on(narrow_model.__wrapped__(family), family)  # one that no other test has
    loop = loop_on(base, config_for(family, trainable="all", rank=0), silhouettes())
    samples = [loop.samples.store.sample(index, index) for index in range(SCENES)]
    trained = list(loop.controlled.differences.parameters.values())
    optimizer = torch.optim.AdamW(trained, lr=BASE_RATE)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, BASE_RATE, total_steps=BASE_STEPS)
    for step in range(BASE_STEPS):
        positions = range(step * BASE_BATCH, (step + 1) * BASE_BATCH)
        batch = draw([samples[p % SCENES] for p in positions], positions, loop.objective, loop.config, loop.controlled)
        optimizer.zero_grad()
        losses(loop.controlled, batch, loop.objective, loop.config, 0.0).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        decay.step()
    with torch.no_grad():
        for name, difference in loop.controlled.differences.tensors().items():
            base.model.model.diffusion_model.get_parameter(name).add_(difference)
    return base_on(base.model.model, family)


def fidelities(loop: Any, strength: float) -> torch.Tensor:
    """Correlation of the sampled latent with the scene's, for each of SEEDS scenes and noises."""
    from comfyui_controlnext.controlnext_training.base_model.preview import sample
    from comfyui_controlnext.controlnext_training.encoded import MemoryCache, Store
    from comfyui_controlnext.controlnext_training.step import conditions_of

    others = Silhouettes("synthetic", "mask", SEEDS, SIDE, seed=1)  # no training saw these
    store, found = Store(loop.samples.store.base, others, loop.config, MemoryCache()), []
    for index in range(SEEDS):
        scene = store.sample(index, index)
        noise = torch.randn(scene.latent.shape, generator=torch.Generator().manual_seed(index))
        text = [conditions_of(scene, scene.given, loop.controlled)]
        latent = sample(loop.controlled, noise, text, text, scene.hint, steps=5, cfg=1.0, strength=strength)
        found.append(correlation(latent, scene.latent))
    return torch.tensor(found)


def gain_in_standard_errors(loop: Any) -> float:
    """Gain from strength 0 to 1 in standard errors of its mean, over the same scenes and noises."""
    more = fidelities(loop, 1.0) - fidelities(loop, 0.0)
    return float(more.mean() / (more.std() / SEEDS**0.5))


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "sd3" else pytest.mark.long) for name in FAMILIES]
)
def test_a_trained_control_is_followed(family: str) -> None:
    settings = {"batch_size": BATCH, "steps": STEPS, "learning_rate": RATE, "control_learning_rate": RATE}
    loop = loop_on(learned_base(family), config_for(family, **settings), silhouettes())
    take_steps(loop, STEPS)
    assert gain_in_standard_errors(loop) > STANDARD_ERRORS
