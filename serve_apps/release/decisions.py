"""What a release policy is shown of a deployment, and what it may decide.

Observation(deployment, status, seconds_in_state=3.0)
Decision("fail", "golden outputs are not reproduced")
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from cluster.deployments import CONTROLLER, Deployment, State
from cluster.release_evidence import Evidence
from cluster.release_writer import ReleaseWriter
from serve_apps.release.applications import ApplicationStatus

Action = Literal[
    "wait",
    "start",
    "start_again",
    "enter",
    "check",
    "compare",
    "promote",
    "hand_over",
    "roll_back",
    "fail",
    "retire",
    "delete",
    "forget",
]


@dataclass(frozen=True)
class StartTries:
    """Tries to start an application that all failed, since the last one that did not."""

    count: int = 0
    reason: str = ""
    """Why the last one failed."""
    may_pass: bool = True
    """Whether another try can end otherwise."""
    seconds_since_last: float = 0.0


@dataclass(frozen=True)
class Observation:
    """One deployment, its application, and what else of its model there is."""

    deployment: Deployment
    application: ApplicationStatus | None
    """None where Serve knows no such application."""
    seconds_in_state: float
    seconds_since_start: float = 0.0
    """Since Serve was first asked for the application; 0 where it was not yet."""
    tries: StartTries = StartTries()
    has_champion: bool = True
    """Whether some version of the model is champion."""
    successor: Deployment | None = None
    """Who could be champion in this one's place: the one before, or what is compared with it, where
    its application runs."""
    evidence: Evidence = field(default_factory=dict)
    """What the phase has shown in which it is compared with the champion."""
    seconds_to_sunset: float = math.inf
    """Until its users' notice is over."""


@dataclass(frozen=True)
class Decision:
    """What the controller is to do.

    wait: nothing; start: ask Serve for the application; start_again: likewise, for one that has
    failed; enter: move to `state`; check: call a replica and go on if it answers; compare: begin
    the phase `state`; promote: make it the champion as it is; hand_over: make `successor` the
    champion and this one the standby; roll_back, fail, retire: take it down, as worse than the
    champion, as broken, or because its notice is over, and `successor` takes its traffic and alias;
    delete: end the application; forget: drop the row.
    """

    action: Action
    reason: str = ""
    state: State | None = None
    successor: Deployment | None = None
    share: float = 0.0
    """Of the traffic, in the phase that begins."""
    mirror_share: float = 0.0
    """Of the champion's requests, in the phase that begins."""


def go_on(tables: ReleaseWriter, row: Deployment, decision: Decision) -> Deployment:
    """Write down what begins: the next phase beside the champion, or the champion's place."""
    reason = decision.reason
    if decision.action == "promote":
        actor = CONTROLLER if row.state == "standby" else row.requested_by
        return tables.promote(row, actor=actor, reason=reason)
    assert decision.state in ("shadow", "canary")
    mirror_share, share = decision.mirror_share, decision.share
    return tables.compare(row, decision.state, reason, mirror_share=mirror_share, share=share)
