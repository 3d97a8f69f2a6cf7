"""The phases in which a version is compared with the champion: pure, from the evidence so far.

shadow: answers mirrored requests; canary: answers a growing share of the customers'. What the
evidence speaks against is rolled back in any phase, paused or not. What it shows to be no worse
goes on to the next phase, and after the last one to champion.

    decision = ComparisonPolicy().begin(row, has_champion=True, reason="golden outputs reproduced")
    decision = ComparisonPolicy().decide(seen)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.deployments import Deployment
from serve_apps.options import read_stored_options
from serve_apps.release.decisions import Decision, Observation
from serve_apps.release.judgement import Verdict, judge
from serve_apps.release.options import ReleaseOptions


@dataclass(frozen=True)
class Phase:
    """One part of a comparison."""

    state: Literal["shadow", "canary"]
    share: float = 0.0
    """Of the name's traffic."""


@dataclass(frozen=True)
class ComparisonPolicy:
    """Decides on versions that answer beside a champion."""

    def begin(self, row: Deployment, *, has_champion: bool, reason: str) -> Decision:
        """The first phase of a version that has shown that it answers, or none at all."""
        if row.strategy != "direct" and not has_champion:
            return Decision("promote", f"{reason}; there is no champion to compare it with")
        return _go_on(row, 0, reason)

    def decide(self, seen: Observation) -> Decision:
        """What becomes of a version whose application runs, beside a champion."""
        row, options = seen.deployment, read_stored_options(seen.deployment.options).release
        num_phases = len(phases_of(row, options))
        verdict = judge(seen.evidence, options, num_phases=num_phases)
        if verdict.kind == "worse":
            return Decision("roll_back", f"{row.stage}: {verdict.reason}")
        if row.is_paused:
            return Decision("wait", "paused")
        is_enough = verdict.num >= options.min_observations
        if verdict.kind == "no_worse" and is_enough:
            return _go_on(row, row.step, f"{row.stage}: {verdict.reason}")
        if seen.seconds_in_state > options.max_duration_s:
            return _end_phase(row, options, verdict)
        return Decision("wait", verdict.reason)


def phases_of(row: Deployment, options: ReleaseOptions) -> tuple[Phase, ...]:
    """All phases of its release, in their order."""
    canary = tuple(Phase("canary", share) for share in options.steps)
    return {"direct": (), "canary": canary, "shadow": (Phase("shadow"), *canary)}[row.strategy]


def _end_phase(row: Deployment, options: ReleaseOptions, verdict: Verdict) -> Decision:
    """A phase that took as long as it may, and decided nothing."""
    told = f"{row.stage}: nothing decided within {options.max_duration_s:g} s, {verdict.reason}"
    if verdict.num >= options.min_observations or options.without_traffic == "promote":
        return _go_on(row, row.step, told)
    if options.without_traffic == "roll_back":
        return Decision("roll_back", told)
    return Decision("wait", f"{told}; at least {options.min_observations} are needed")


def _go_on(row: Deployment, step: int, reason: str) -> Decision:
    """The phase after `step` phases, or the end of the comparison."""
    options = read_stored_options(row.options).release
    phases = phases_of(row, options)
    if step >= len(phases):
        return Decision("promote", reason)
    phase = phases[step]
    return Decision(
        "compare", reason, phase.state, share=phase.share, mirror_share=options.mirror_share
    )
