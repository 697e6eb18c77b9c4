"""Keyframes of Advanced-ControlNet: which one holds at a step, what it inherits, and objects that are none."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.keyframes import Keyframe, keyframe_of_steps, read_keyframes


def timesteps(*entries: dict[str, Any]) -> Any:
    """Group with the attributes of that pack's entries."""
    defaults = {"strength": 1.0, "control_weights": None, "latent_keyframes": None, "null_latent_kf_strength": 0.0}
    defaults |= {"inherit_missing": True, "guarantee_steps": 1, "mask_hint_orig": None}
    return SimpleNamespace(keyframes=[SimpleNamespace(**(defaults | entry)) for entry in entries])


def latents(**factors: float) -> Any:
    """Group of factors, by numbers such as i0 and i_1 (for -1)."""
    pairs = ((int(name[1:].replace("_", "-")), factor) for name, factor in factors.items())
    return SimpleNamespace(keyframes=[SimpleNamespace(batch_index=n, strength=factor) for n, factor in pairs])


class Stateful:
    """Machine with the same rule, asked in every step; that pack has it in this form."""

    def __init__(self, keyframes: list[Keyframe], starts: list[float], first: float) -> None:
        self.keyframes, self.starts, self.first = keyframes, starts, first
        self.index, self.used = -1, 0

    def least(self, index: int) -> int:
        return 0 if self.starts[index] > self.first else self.keyframes[index].steps

    def step(self, sigma: float) -> int:
        if self.index == -1 or self.used >= self.least(self.index):
            following = self.index + 1
            while following < len(self.keyframes) and self.starts[following] >= sigma:
                self.index, self.used = following, 0
                if self.least(following):
                    break
                following += 1
        self.used += 1
        return self.index


@pytest.mark.parametrize("seed", range(40))
def test_the_keyframe_of_each_step_is_that_of_a_machine_asked_step_by_step(seed: int) -> None:
    chance = random.Random(seed)
    starts = sorted((chance.choice([math.inf, *range(12)]) for _ in range(chance.randrange(1, 6))), reverse=True)
    keyframes = [Keyframe(steps=chance.choice([0, 0, 1, 1, 2, 5])) for _ in starts]
    sigmas = [float(sigma) for sigma in sorted(chance.sample(range(1, 13), chance.randrange(1, 9)), reverse=True)]
    machine = Stateful(keyframes, starts, sigmas[0])
    assert keyframe_of_steps(keyframes, starts, sigmas) == [machine.step(sigma) for sigma in sigmas]


def test_a_keyframe_keeps_its_steps_only_where_it_starts_within_the_run() -> None:
    keyframes = [Keyframe(steps=3), Keyframe(0.5, steps=1)]
    assert keyframe_of_steps(keyframes, [10.0, 9.0], [10, 8, 6, 4]) == [0, 0, 0, 1]
    assert keyframe_of_steps(keyframes, [11.0, 9.0], [10, 8, 6, 4]) == [0, 1, 1, 1]
    assert keyframe_of_steps(keyframes[:1], [5.0], [10, 8, 4]) == [-1, -1, 0]


def test_what_is_missing_is_inherited_unless_the_keyframe_says_otherwise() -> None:
    mask, own = torch.rand(1, 4, 4), latents(i0=0.5, i_1=2.0)
    group = timesteps(
        {"start_percent": 0.0, "guarantee_steps": 0},
        {"start_percent": 0.2, "strength": 0.3, "latent_keyframes": own, "mask_hint_orig": mask},
        {"start_percent": 0.4, "null_latent_kf_strength": 0.7, "guarantee_steps": 4},
        {"start_percent": 0.6, "inherit_missing": False},
    )
    found = read_keyframes(group)
    pairs = ((0, 0.5), (-1, 2.0))
    assert [(k.start, k.strength, k.steps, k.latents, k.rest) for k in found] == [
        (0.0, 1.0, 0, None, 0.0),
        (0.2, 0.3, 1, pairs, 0.0),
        (0.4, 1.0, 4, pairs, 0.7),
        (0.6, 1.0, 1, None, 0.0),
    ]
    assert [k.mask is mask for k in found] == [False, True, True, False]
    everywhere = read_keyframes(group, latents(i1=0.1))
    assert [k.latents for k in everywhere] == [((1, 0.1),)] * 4 and [k.rest for k in everywhere] == [0, 0, 0.7, 0]
    assert read_keyframes(None, latents(i1=0.1)) == (Keyframe(latents=((1, 0.1),)),)
    assert read_keyframes() == ()


def test_factors_are_those_of_the_pairs_and_the_rest_elsewhere() -> None:
    keyframe = Keyframe(latents=((0, 0.5), (-1, 2.0), (7, 3.0), (-9, 3.0)), rest=0.1)
    assert keyframe.factors(4) == [0.5, 0.1, 0.1, 2.0]
    assert keyframe.factors(1) == [2.0] and Keyframe().factors(3) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((3, None), "timestep_keyframes: is a int, which holds no keyframes. Connect a keyframe node"),
        ((latents(i0=1.0), None), "timestep_keyframes: is a SimpleNamespace, which holds no keyframes"),
        ((None, timesteps({"start_percent": 0.0})), "latent_keyframes: is a SimpleNamespace, which holds no keyframes"),
        ((timesteps({"start_percent": 1.5}), None), "timestep_keyframes: start_percent 1.5 is outside 0..1"),
        ((timesteps({"start_percent": 0.0, "strength": math.nan}), None), "strength nan is not a finite number"),
        ((None, latents(i0=math.inf)), "latent_keyframes: strength inf is not a finite number"),
    ],
)
def test_other_objects_and_numbers_are_refused(given: tuple[Any, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_keyframes(*given)


def test_weights_of_blocks_are_refused_and_plain_ones_are_not() -> None:
    plain = {name: None for name in ("weights_input", "weights_middle", "weights_output", "weight_func", "weight_mask")}
    plain |= {"base_multiplier": 1.0, "uncond_multiplier": 1.0, "extras": {}}
    others = (
        {"weights_output": [0.5] * 12},
        {"base_multiplier": 0.8},
        {"uncond_multiplier": 0.0},
        {"extras": {"a": 1}},
    )
    group = timesteps({"start_percent": 0.0, "control_weights": SimpleNamespace(**plain)})
    assert read_keyframes(group) == (Keyframe(steps=1),)
    for other in others:
        weights = SimpleNamespace(**(plain | other))
        with pytest.raises(ValueError, match="cn_weights are for blocks that this control does not have"):
            read_keyframes(timesteps({"start_percent": 0.0, "control_weights": weights}))
