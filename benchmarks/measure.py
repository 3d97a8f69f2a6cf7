"""Timing two ways of doing one thing in interleaved pairs.

A pair runs both ways back to back, so that a machine whose speed drifts moves both; the order
alternates. What is reported is the median of the pairs' ratios with its quartiles.

    row = compare("load", ours=load_verified, peer=load_plain, peer_name="plain read", goal=1.5)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from cluster.config import StrictModel


class Row(StrictModel):
    """One line of a benchmark. `ratio` is ours over the peer's, pair by pair."""

    metric: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    ratio_low: float
    """First quartile of the pairs' ratios."""
    ratio_high: float
    """Third quartile of the pairs' ratios."""
    goal: str
    met: bool | None
    """None where the row has no goal."""


def compare(
    metric: str,
    *,
    ours: Callable[[], object],
    peer: Callable[[], object],
    peer_name: str,
    at_most: float | None = None,
    pairs: int = 9,
    clock: Callable[[], float] = time.perf_counter,
) -> Row:
    """Seconds of both ways, after one warm-up each.

    Args:
        at_most: the goal for the ratio; smaller is better.
    """
    ours()
    peer()
    timings = [_pair(ours, peer, clock, swapped=index % 2 == 1) for index in range(pairs)]
    ratios = [mine / theirs for mine, theirs in timings]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return Row(
        metric=metric,
        ours=statistics.median(mine for mine, _ in timings),
        peer=statistics.median(theirs for _, theirs in timings),
        peer_name=peer_name,
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        goal="" if at_most is None else f"<= {at_most}",
        met=None if at_most is None else ratio <= at_most,
    )


def _pair(
    ours: Callable[[], object],
    peer: Callable[[], object],
    clock: Callable[[], float],
    *,
    swapped: bool,
) -> tuple[float, float]:
    if swapped:
        theirs = _seconds_of(peer, clock)
        return _seconds_of(ours, clock), theirs
    mine = _seconds_of(ours, clock)
    return mine, _seconds_of(peer, clock)


def _seconds_of(action: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    action()
    return clock() - started
