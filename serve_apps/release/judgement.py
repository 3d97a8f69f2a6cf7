"""What the evidence of one phase says of a version: pure, with the numbers in its reason.

Each metric has a test of "worse by more than the margin". Whoever looks at several tests in several
phases is wrong more often, so each gets its part of alpha: alpha / (metrics x phases). "No worse"
needs no such part: a version that is beyond one margin must pass that metric's test in every phase.

    judge(store.evidence(row), options, num_phases=4).kind       # worse, no_worse or undecided
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cluster.release_evidence import METRICS, Evidence, Metric
from cluster.statistics.sequential import (
    Sample,
    mean_above,
    mean_below,
    two_means_above,
    two_means_below,
)
from serve_apps.release.options import ReleaseOptions

_NOTHING = Sample()


@dataclass(frozen=True)
class Verdict:
    """What is known of a version after one look."""

    kind: Literal["worse", "no_worse", "undecided"]
    reason: str
    num: int
    """Answers of the version that it rests on."""


@dataclass(frozen=True)
class _Comparison:
    log_worse: float
    log_no_worse: float
    shown: str


def judge(evidence: Evidence, options: ReleaseOptions, *, num_phases: int) -> Verdict:
    """Decide on all that one phase has shown so far."""
    num = evidence.get(("candidate", "errors"), _NOTHING).num
    found = [
        comparison
        for metric in METRICS
        if (comparison := _compare(evidence, metric, getattr(options.margins, metric))) is not None
    ]
    alarm = math.log(len(METRICS) * num_phases / options.alpha)
    worst = max(found, key=lambda comparison: comparison.log_worse, default=None)
    if worst is not None and worst.log_worse >= alarm:
        odds = f"{math.exp(-worst.log_worse):.1g}"
        return Verdict("worse", f"{worst.shown}: worse, by chance in at most {odds} of cases", num)
    shown = "; ".join(comparison.shown for comparison in found)
    is_enough = math.log(1 / options.alpha)
    if num and all(comparison.log_no_worse >= is_enough for comparison in found):
        # Where gateways are too busy to mirror, only the phase's end may go on without this.
        if not any(arm == "pair" for arm, _ in evidence):
            return Verdict("undecided", f"{num} requests, no answers compared yet: {shown}", num)
        return Verdict("no_worse", f"no worse in {num} requests: {shown}", num)
    return Verdict("undecided", f"{num} requests so far: {shown}" if found else "no requests", num)


def _compare(evidence: Evidence, metric: Metric, margin: float) -> _Comparison | None:
    """None where nothing was observed of it."""
    pair = evidence.get(("pair", metric))
    if pair is not None:
        shown = f"{_name(metric)} {pair.mean:.1%} of {pair.num}, limit {margin:.0%}"
        above, below = mean_above(pair, margin), mean_below(pair, margin)
        return _Comparison(above, below, shown)
    candidate = evidence.get(("candidate", metric))
    if candidate is None:
        return None
    champion = evidence.get(("champion", metric), _NOTHING)
    shown = (
        f"{_name(metric)} {candidate.mean:.1%} of {candidate.num}, the champion's "
        f"{champion.mean:.1%} of {champion.num}, margin {margin:.0%}"
    )
    above = two_means_above(candidate, champion, margin)
    below = two_means_below(candidate, champion, margin)
    return _Comparison(above, below, shown)


def _name(metric: str) -> str:
    return metric.replace("_", " ")
