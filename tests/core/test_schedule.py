"""Strength schedule: the `percent:strength` syntax, and percent from the host's sigmas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from comfyui_controlnext.controlnext_core.schedule import Schedule, parse_schedule, percent_of


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("", ()),
        ("  ", ()),
        ("0:1", ((0.0, 1.0),)),
        ("0:1, 0.4:1, 0.8:0.2", ((0.0, 1.0), (0.4, 1.0), (0.8, 0.2))),
        (" 0 : 1 ,\n1:0,", ((0.0, 1.0), (1.0, 0.0))),
        ("1e-1:2.5", ((0.1, 2.5),)),
    ],
)
def test_pairs_are_read(text: str, points: tuple[tuple[float, float], ...]) -> None:
    assert parse_schedule(text) == Schedule(points)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0.5", "'0.5' is not a percent:strength pair"),
        ("0:1:2", "'0:1:2' is not a percent:strength pair"),
        ("0:1; 1:0", "'0:1; 1:0' is not a percent:strength pair"),
        ("a:b", "'a:b' is not a percent:strength pair"),
        (":", "':' is not a percent:strength pair"),
        ("0:1, 1.5:0", "percent 1.5 in '1.5:0' is outside 0..1"),
        ("-0.1:1", "percent -0.1 in '-0.1:1' is outside 0..1"),
        ("nan:1", "percent nan in 'nan:1' is outside 0..1"),
        ("0:-1", "strength -1 in '0:-1' must be a number of 0 or more"),
        ("0:nan", "strength nan in '0:nan' must be a number of 0 or more"),
        ("0:inf", "strength inf in '0:inf' must be a number of 0 or more"),
        ("0.5:1, 0.5:0", "percent 0.5 in '0.5:0' does not come after 0.5"),
        ("0.5:1, 0.2:0", "percent 0.2 in '0.2:0' does not come after 0.5"),
    ],
)
def test_a_bad_pair_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match="^schedule: ") as caught:
        parse_schedule(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("percent", "strength"),
    [(0.0, 1.0), (0.2, 1.0), (0.3, 0.75), (0.4, 0.5), (0.6, 0.3), (0.8, 0.1), (0.9, 0.1), (1.0, 0.1)],
)
def test_strength_is_linear_between_pairs_and_holds_beyond_them(percent: float, strength: float) -> None:
    schedule = parse_schedule("0.2:1, 0.4:0.5, 0.8:0.1")
    assert schedule.at(percent) == pytest.approx(strength)


def test_no_pairs_mean_one_everywhere_and_one_pair_a_constant() -> None:
    assert [parse_schedule("").at(p) for p in (0.0, 0.5, 1.0)] == [1.0] * 3
    assert [parse_schedule("0.5:0.3").at(p) for p in (0.0, 0.5, 1.0)] == [0.3] * 3


def test_percent_is_found_by_inverting_a_falling_function() -> None:
    def sigma(percent: float) -> float:
        return 700 * (0.002 / 700) ** percent

    for percent in (0.0, 0.001, 0.25, 0.5, 0.999, 1.0):
        assert percent_of(sigma(percent), sigma) == pytest.approx(percent, abs=1e-9)
    assert percent_of(1e9, sigma) == pytest.approx(0.0, abs=1e-12)
    assert percent_of(0.0, sigma) == pytest.approx(1.0, abs=1e-12)


def host_sampling(kind: str) -> Callable[[float], float]:
    """Function `percent_to_sigma` of one of the host's sampling classes, with its defaults."""
    from comfy import model_sampling

    return getattr(model_sampling, kind)().percent_to_sigma


@pytest.mark.comfy
@pytest.mark.parametrize("kind", ["ModelSamplingDiscrete", "ModelSamplingContinuousEDM", "ModelSamplingDiscreteFlow"])
def test_percent_inverts_the_hosts_percent_to_sigma(kind: str) -> None:
    to_sigma = host_sampling(kind)
    for percent in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        assert percent_of(float(to_sigma(percent)), to_sigma) == pytest.approx(percent, abs=1e-5)
    assert percent_of(0.0, to_sigma) == pytest.approx(1.0, abs=1e-6)
    first = float(to_sigma(1e-6))
    assert percent_of(first, to_sigma) < 2e-3 and percent_of(first * 1.01, to_sigma) < 2e-3


@pytest.mark.comfy
def test_percent_of_the_models_own_steps_rises() -> None:
    from comfy import model_sampling, samplers

    sampling = model_sampling.ModelSamplingDiscrete()
    percents = [percent_of(float(s), sampling.percent_to_sigma) for s in samplers.normal_scheduler(sampling, 12)]
    assert percents == sorted(percents) and len(set(percents)) == len(percents)
    assert percents[0] < 1e-3 and percents[-1] == pytest.approx(1.0)
    assert math.isclose(percents[6], 0.5, abs_tol=0.06)
