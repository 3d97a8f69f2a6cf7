"""What to do next with each deployment: pure, from what the table and Serve say.

decision = ReleasePolicy().decide(Observation(deployment, status, seconds_in_state=3.0))
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from cluster.releases import SERVING, STARTING, Deployment, State
from serve_apps.release.applications import ApplicationStatus

Action = Literal["wait", "start", "enter", "check", "fail", "delete", "forget"]


@dataclass(frozen=True)
class Observation:
    """One deployment and its application."""

    deployment: Deployment
    application: ApplicationStatus | None
    """None where Serve knows no such application."""
    seconds_in_state: float


@dataclass(frozen=True)
class Decision:
    """What the controller is to do.

    wait: nothing; start: ask Serve for the application; enter: move to `state`; check: call a
    replica and promote the version if it answers; fail: give the version up; delete: end the
    application; forget: drop the row.
    """

    action: Action
    reason: str = ""
    state: State | None = None


@dataclass(frozen=True)
class ReleasePolicy:
    """Decides for one deployment at a time."""

    drain_s: float = 2.0
    """From taking traffic away until deleting: gateways must have noticed by then."""
    start_timeout_s: float = 900.0
    """Longest that replicas may take to load."""

    def decide(self, seen: Observation) -> Decision:
        state = seen.deployment.state
        if state in STARTING:
            return self._towards_champion(seen)
        if state in SERVING:
            return _keep_serving(seen)
        return self._towards_nothing(seen)

    def _towards_champion(self, seen: Observation) -> Decision:
        row, application = seen.deployment, seen.application
        if application is not None and application.phase == "deleting":
            return Decision("wait", "an earlier application of this version is being deleted")
        if application is None or _is_older(application, row):
            return Decision("start", "replicas are being placed")
        if application.phase == "failed":
            return Decision("fail", application.message)
        if application.phase == "running":
            if row.state == "parity":
                return Decision("check")
            return Decision("enter", "golden outputs reproduced; asking a replica", "parity")
        if seen.seconds_in_state > self.start_timeout_s:
            return Decision("fail", f"it did not start within {self.start_timeout_s:g} s")
        if application.phase == "starting" and row.state == "deploying":
            return Decision("enter", "a replica is loading and replaying golden inputs", "warming")
        return Decision("wait")

    def _towards_nothing(self, seen: Observation) -> Decision:
        application = seen.application
        if application is None:
            return Decision("forget" if seen.deployment.state == "retiring" else "wait")
        if application.phase == "deleting":
            return Decision("wait")
        if seen.deployment.state == "retiring" and seen.seconds_in_state < self.drain_s:
            return Decision("wait", "draining")
        return Decision("delete")


def _keep_serving(seen: Observation) -> Decision:
    if seen.application is None:
        return Decision("start", "the cluster was restarted")
    if seen.application.phase == "failed":
        return Decision("fail", seen.application.message)
    return Decision("wait")


def _is_older(application: ApplicationStatus, row: Deployment) -> bool:
    """Whether an application was asked for before this deployment was: left from another try."""
    return application.deployed_at_s < datetime.fromisoformat(row.created_at).timestamp()
