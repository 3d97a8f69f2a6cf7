"""Paired tests of non-inferiority: is a model no worse than another by a margin, on the same rows?

Each gives the p-value of "worse by `margin` or more". Declaring non-inferiority where it is at most
alpha errs in at most that share of such cases. They know nothing of models and metrics.

    result = compare_means(candidate, champion, margin=0.01)     # higher is better
    result.p_value <= 0.05
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.errors import InputError

Values = npt.NDArray[np.float64]

MIN_ROWS = 30
"""Fewer rows say too little for a mean to be about normal."""


@dataclass(frozen=True)
class PairedResult:
    """What two models' values on the same rows say."""

    num_rows: int
    mean_difference: float
    """Of candidate minus champion."""
    p_value: float
    """Chance of a result this good for the candidate if it were worse by the margin."""


def compare_means(candidate: Values, champion: Values, *, margin: float) -> PairedResult:
    """Student's one-sided paired t-test on values of which higher is better.

    Raises:
        InputError: the rows are fewer than MIN_ROWS, unequal in number, or not finite.
    """
    differences = _differences(candidate, champion)
    num_rows, mean = len(differences), float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(num_rows)
    if error == 0.0:
        # No spread at all: what is seen is all there is.
        return PairedResult(num_rows, mean, 0.0 if mean > -margin else 1.0)
    from scipy.stats import t

    p_value = float(t.sf((mean + margin) / error, df=num_rows - 1))
    return PairedResult(num_rows, mean, p_value)


def compare_proportions(candidate: Values, champion: Values, *, margin: float) -> PairedResult:
    """Tango's score test (1998) on values that are 0 or 1, of which 1 is better.

    Where the two models seldom differ, the t-test finds them equal too easily; this one does not:
    its variance is that of models which differ by the margin.

    Raises:
        InputError: as `compare_means`, or a value is neither 0 nor 1.
    """
    differences = _differences(candidate, champion)
    if not np.isin(candidate, (0.0, 1.0)).all() or not np.isin(champion, (0.0, 1.0)).all():
        raise InputError(
            "a proportion's values must be 0 or 1", hint="compare means of other values instead"
        )
    num_rows = len(differences)
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    mean = (wins - losses) / num_rows
    variance = _variance_at_the_margin(wins, losses, num_rows, margin)
    if variance <= 0.0:
        return PairedResult(num_rows, mean, 1.0)
    from scipy.stats import norm

    score = (wins - losses + num_rows * margin) / math.sqrt(variance)
    return PairedResult(num_rows, mean, float(norm.sf(score)))


def _variance_at_the_margin(wins: int, losses: int, num_rows: int, margin: float) -> float:
    """Of wins - losses, with the share of losses most likely under the hypothesis."""
    gap = -margin
    a = 2.0 * num_rows
    b = -wins - losses + (2.0 * num_rows - wins + losses) * gap
    c = -losses * gap * (1.0 - gap)
    share_lost = (math.sqrt(max(b * b - 4.0 * a * c, 0.0)) - b) / (2.0 * a)
    return num_rows * (2.0 * share_lost + gap * (1.0 - gap))


def _differences(candidate: Values, champion: Values) -> Values:
    if candidate.shape != champion.shape or candidate.ndim != 1:
        raise InputError(
            f"paired values differ in number: {len(candidate)} and {len(champion)}",
            hint="measure both models on the same rows",
        )
    if len(candidate) < MIN_ROWS:
        raise InputError(
            f"{len(candidate)} rows are too few to compare two models",
            hint=f"give at least {MIN_ROWS}, e.g. a larger split",
        )
    differences: Values = candidate.astype(np.float64) - champion.astype(np.float64)
    if not np.isfinite(differences).all():
        row = int(np.flatnonzero(~np.isfinite(differences))[0])
        raise InputError(
            f"row {row} has a value that is not finite",
            hint="leave such rows out, or mend the model",
        )
    return differences
