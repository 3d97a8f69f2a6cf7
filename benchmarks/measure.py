"""Timing two ways of doing one thing in interleaved pairs.

A pair runs both ways back to back, so that a machine whose speed drifts moves both; the order
alternates. What is reported is the median of the pairs' ratios with its quartiles.

    row = compare("load", ours=load_verified, peer=load_plain, peer_name="plain read", goal=1.5)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

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
    note: str = ""
    """What the figures do not say."""


def compare(
    metric: str,
    *,
    ours: Callable[[], object],
    peer: Callable[[], object],
    peer_name: str,
    at_most: float | None = None,
    before: Callable[[], object] = lambda: None,
    pairs: int = 9,
    clock: Callable[[], float] = time.perf_counter,
) -> Row:
    """Seconds of both ways, after one warm-up each.

    Args:
        at_most: the goal for the ratio; smaller is better.
        before: what puts things in order before each of them, untimed.
    """
    ours()
    peer()
    timed = (_timed(ours, before, clock), _timed(peer, before, clock))
    timings = [_pair(*timed, swapped=index % 2 == 1) for index in range(pairs)]
    return row_of(metric, pairs=timings, peer_name=peer_name, at_most=at_most)


def row_of(
    metric: str,
    *,
    pairs: Sequence[tuple[float, float]],
    peer_name: str,
    at_most: float | None = None,
    at_least: float | None = None,
    note: str = "",
) -> Row:
    """A row from measured pairs (ours, the peer's), at least two.

    Args:
        at_most: the goal for the ratio where smaller is better.
        at_least: the goal for the ratio where larger is better.
    """
    low, ratio, high = statistics.quantiles([mine / theirs for mine, theirs in pairs], n=4)
    goal, met = "", None
    if at_most is not None:
        goal, met = f"<= {at_most}", ratio <= at_most
    elif at_least is not None:
        goal, met = f">= {at_least}", ratio >= at_least
    return Row(
        metric=metric,
        ours=statistics.median(mine for mine, _ in pairs),
        peer=statistics.median(theirs for _, theirs in pairs),
        peer_name=peer_name,
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        goal=goal,
        met=met,
        note=note,
    )


def _pair(
    ours: Callable[[], float], peer: Callable[[], float], *, swapped: bool
) -> tuple[float, float]:
    if swapped:
        theirs = peer()
        return ours(), theirs
    mine = ours()
    return mine, peer()


def _timed(
    action: Callable[[], object], before: Callable[[], object], clock: Callable[[], float]
) -> Callable[[], float]:
    def seconds() -> float:
        before()
        started = clock()
        action()
        return clock() - started

    return seconds
