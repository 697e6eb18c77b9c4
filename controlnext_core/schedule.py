"""Strength schedule over a run: `percent:strength` pairs, and percent from sigma."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .encodable import cut

ITERATIONS = 60
"""Steps of the bisection; an interval of 1 becomes 1e-18, below the resolution of a double."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Strength as a piecewise linear function of the host's percent."""

    points: tuple[tuple[float, float], ...]
    """Pairs (percent in 0..1, strength), percents ascending; empty = 1 everywhere."""

    def at(self, percent: float) -> float:
        """Strength at a percent; constant beyond the first and the last pair."""
        if not self.points:
            return 1.0
        if percent <= self.points[0][0]:
            return self.points[0][1]
        for (p0, s0), (p1, s1) in zip(self.points, self.points[1:], strict=False):
            if percent <= p1:
                return s0 + (s1 - s0) * (percent - p0) / (p1 - p0)
        return self.points[-1][1]


def parse_schedule(text: str) -> Schedule:
    """Parse a text such as `0:1, 0.4:1, 0.8:0.2`; an empty text is 1 everywhere.

    Raises ValueError naming the pair: not two numbers, a percent outside 0..1 or not ascending, a strength below 0.
    """
    points: list[tuple[float, float]] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            percent, strength = (float(number) for number in part.split(":"))
        except ValueError:
            raise ValueError(
                f"schedule: '{cut(part)}' is not a percent:strength pair. Write pairs such as 0:1, 0.4:1, 0.8:0.2"
            ) from None
        if not 0 <= percent <= 1:
            raise ValueError(f"schedule: percent {percent:g} in '{part}' is outside 0..1 (0 start, 1 end of sampling).")
        if not 0 <= strength < float("inf"):
            raise ValueError(f"schedule: strength {strength:g} in '{part}' must be a number of 0 or more.")
        if points and percent <= points[-1][0]:
            raise ValueError(
                f"schedule: percent {percent:g} in '{part}' does not come after {points[-1][0]:g}. Put the pairs in "
                "rising order, each percent once."
            )
        points.append((percent, strength))
    return Schedule(tuple(points))


def percent_of(sigma: float, percent_to_sigma: Callable[[float], float]) -> float:
    """Percent of sampling at this sigma, by bisection: the host's `percent_to_sigma` decreases and has no inverse.

    Returns 0..1; sigmas beyond either end give that end.
    """
    low, high = 0.0, 1.0
    for _ in range(ITERATIONS):
        middle = (low + high) / 2
        if percent_to_sigma(middle) > sigma:
            low = middle
        else:
            high = middle
    return (low + high) / 2
