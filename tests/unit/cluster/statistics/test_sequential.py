"""Error odds with somebody looking all the time are checked by simulation, and so is the power."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from cluster.statistics.sequential import (
    Sample,
    Values,
    mean_above,
    mean_below,
    two_means_above,
    two_means_below,
)

ALPHA = 0.05
LEVEL = math.log(1 / ALPHA)
NUM_STREAMS = 300
# Three standard errors of a share of ALPHA over NUM_STREAMS.
TOLERANCE = 3 * (ALPHA * (1 - ALPHA) / NUM_STREAMS) ** 0.5

Draw = Callable[[np.random.Generator, float, int], Values]


def coins(random: np.random.Generator, mean: float, num: int) -> Values:
    return (random.random(num) < mean).astype(float)


def fractions(random: np.random.Generator, mean: float, num: int) -> Values:
    return random.beta(mean, 1 - mean, size=num)


def looks(values: Values, every: int) -> list[Sample]:
    """What somebody sees who looks after the first observation, and then again and again."""
    sums = values.cumsum()
    return [Sample(n + 1, float(sums[n])) for n in range(0, len(values), every)]


@pytest.mark.parametrize("draw", [coins, fractions])
@pytest.mark.parametrize(("test", "bound"), [(mean_above, 0.1), (mean_below, 0.1)])
def test_a_mean_at_the_bound_is_rarely_called_beyond_it(
    draw: Draw, test: Callable[[Sample, float], float], bound: float
) -> None:
    random = np.random.default_rng(0)
    alarms = 0
    for _ in range(NUM_STREAMS):
        seen = looks(draw(random, bound, 1000), 20)
        alarms += any(test(sample, bound) >= LEVEL for sample in seen)
    assert alarms / NUM_STREAMS <= ALPHA + TOLERANCE


@pytest.mark.parametrize("level", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("test", [two_means_above, two_means_below])
def test_two_means_a_margin_apart_are_rarely_called_further_or_closer(
    level: float, test: Callable[[Sample, Sample, float], float]
) -> None:
    random = np.random.default_rng(1)
    alarms, margin = 0, 0.05
    for _ in range(100):
        first = looks(coins(random, level + margin, 400), 20)
        second = looks(coins(random, level, 1600), 80)
        pairs = zip(first, second, strict=True)
        alarms += any(test(one, other, margin) >= LEVEL for one, other in pairs)
    assert alarms / 100 <= ALPHA + 3 * (ALPHA * (1 - ALPHA) / 100) ** 0.5


def first_alarm(decide: Callable[[int], float], level: float, limit: int) -> int:
    """The smallest number of observations after which the test has decided."""
    low, high = 0, limit
    assert decide(limit) >= level
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decide(middle) >= level else (middle, high)
    return high


@pytest.mark.parametrize(
    ("mean", "champion_mean", "margin", "at_most"),
    [(1.0, 0.0, 0.02, 8), (0.2, 0.0, 0.02, 60), (0.05, 0.0, 0.02, 700), (0.9, 0.02, 0.05, 12)],
)
def test_a_worse_arm_is_found_within_a_number_of_its_observations(
    mean: float, champion_mean: float, margin: float, at_most: int
) -> None:
    def decide(num: int) -> float:
        champion = Sample(3 * num, 3 * num * champion_mean)
        return two_means_above(Sample(num, num * mean), champion, margin)

    assert first_alarm(decide, math.log(32 / ALPHA), 1000) <= at_most


@pytest.mark.parametrize(
    ("mean", "bound", "at_most"), [(1.0, 0.1, 6), (0.3, 0.1, 75), (0.2, 0.1, 240)]
)
def test_a_mean_beyond_its_bound_is_found(mean: float, bound: float, at_most: int) -> None:
    def decide(num: int) -> float:
        return mean_above(Sample(num, num * mean), bound)

    assert first_alarm(decide, math.log(32 / ALPHA), 1000) <= at_most


@pytest.mark.parametrize(
    ("mean", "champion_mean", "margin", "at_most"),
    [(0.0, 0.0, 0.02, 420), (0.01, 0.01, 0.02, 1000), (0.02, 0.02, 0.05, 320), (0, 0.05, 0.05, 90)],
)
def test_an_equal_or_better_arm_is_shown_to_be_no_worse(
    mean: float, champion_mean: float, margin: float, at_most: int
) -> None:
    def decide(num: int) -> float:
        champion = Sample(3 * num, 3 * num * champion_mean)
        return two_means_below(Sample(num, num * mean), champion, margin)

    assert first_alarm(decide, LEVEL, 2000) <= at_most


def test_the_least_favourable_level_is_found() -> None:
    """Against the product of both arms' evidence at every level."""
    first, second, margin = Sample(400, 60.0), Sample(4000, 190.0), 0.03
    levels = np.linspace(0, 1 - margin, 20_001)
    least = min(mean_above(first, level + margin) + mean_below(second, level) for level in levels)
    assert two_means_above(first, second, margin) == pytest.approx(least, abs=1e-3)


def test_nothing_seen_says_nothing_and_much_stays_finite() -> None:
    nothing = Sample()
    assert two_means_above(nothing, nothing, 0.02) == pytest.approx(0.0)
    assert two_means_above(Sample(50, 50.0), nothing, 0.02) <= 0.0, "no champion to compare with"
    much = Sample(10**9, 10.0**9)
    assert two_means_above(much, Sample(10**9, 0.0), 0.02) > 1e8
    assert math.isfinite(two_means_below(much, Sample(10**9, 0.0), 0.02))
