"""Tests that may be looked at after every observation, and stopped whenever they are decided.

Observations are in [0, 1] and only their number and sum are needed. Each function returns the log
of an e-value: under its null hypothesis the chance that it *ever* reaches log(1 / alpha), however
often somebody looks, is at most alpha (Ville's inequality). Observations may depend on what came
before; the hypothesis is on their mean given that.

    log_e = two_means_above(Sample(200, 30.0), Sample(3800, 60.0), margin=0.02)
    if log_e >= math.log(1 / alpha): ...             # worse than the champion by more than 2 points

One mean: a mixture of likelihood ratios of Bernoulli variables, which bounds any variable in [0, 1]
with that mean (sub-Bernoulli: Howard, Ramdas, McAuliffe and Sekhon, Annals of Statistics 49(2),
2021; as bets on a mean: Waudby-Smith and Ramdas, JRSS B 86(1), 2024). Two means: the product of the
two arms' e-values at the least favourable common level (universal inference: Wasserman, Ramdas and
Balakrishnan, PNAS 117(29), 2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

_CASH = 0.5
"""Share of the stake that is never bet: what the null gains on the bets is lost only once."""
_STEPS = np.power(0.75, np.arange(32))
"""Alternatives bet on, as shares of the way from the null's bound to 1: dense near the bound."""
_EDGE = 1e-9
_GRID = 33
_REFINEMENTS = 4


@dataclass(frozen=True)
class Sample:
    """Observations in [0, 1] of one arm."""

    num: int = 0
    total: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.num if self.num else 0.0

    def flipped(self) -> Sample:
        """Of 1 - x in place of x."""
        return Sample(self.num, self.num - self.total)


def mean_above(sample: Sample, bound: float) -> float:
    """Log e-value against "the mean is at most `bound`"."""
    return float(_above(sample, np.array([bound]))[0])


def mean_below(sample: Sample, bound: float) -> float:
    """Log e-value against "the mean is at least `bound`"."""
    return mean_above(sample.flipped(), 1.0 - bound)


def two_means_above(first: Sample, second: Sample, margin: float) -> float:
    """Log e-value against "the first mean is at most `margin` above the second"."""
    low, high = max(0.0, -margin), min(1.0, 1.0 - margin)
    least = math.inf
    for _ in range(_REFINEMENTS):
        levels = np.linspace(low, high, _GRID)
        # At each level that the second mean may have, the evidence of both arms together.
        together = _above(first, levels + margin) + _above(second.flipped(), 1.0 - levels)
        at = int(np.argmin(together))
        least = min(least, float(together[at]))
        low, high = levels[max(at - 1, 0)], levels[min(at + 1, _GRID - 1)]
    return least


def two_means_below(first: Sample, second: Sample, margin: float) -> float:
    """Log e-value against "the first mean is at least `margin` above the second"."""
    return two_means_above(first.flipped(), second.flipped(), -margin)


def _above(sample: Sample, bounds: Values) -> Values:
    """Log e-values against "the mean is at most the bound", for several bounds."""
    bound = np.clip(bounds, _EDGE, 1.0 - _EDGE)[:, None]
    alternatives = np.minimum(bound + (1.0 - bound) * _STEPS, 1.0 - _EDGE)
    good, bad = sample.num - sample.total, sample.total
    ratios = bad * np.log(alternatives / bound) + good * np.log1p(
        (bound - alternatives) / (1.0 - bound)
    )
    largest = np.maximum(ratios.max(axis=1), 0.0)
    mixed = np.exp(ratios - largest[:, None]).mean(axis=1)
    values: Values = largest + np.log(_CASH * np.exp(-largest) + (1.0 - _CASH) * mixed)
    return values
