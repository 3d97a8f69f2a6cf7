"""What to do next with each deployment: pure, from what the table and Serve say.

decision = ReleasePolicy().decide(Observation(deployment, status, seconds_in_state=3.0))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.releases import SERVING, STARTING, Deployment, State
from serve_apps.release.applications import ApplicationStatus

Action = Literal["wait", "start", "enter", "check", "promote", "fail", "delete", "forget"]


@dataclass(frozen=True)
class StartTries:
    """Tries to ask Serve for an application that all failed, since the last one that did not."""

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
    standby: Deployment | None = None
    """The champion before, where its application runs."""


@dataclass(frozen=True)
class Decision:
    """What the controller is to do.

    wait: nothing; start: ask Serve for the application; enter: move to `state`; check: call a
    replica and promote the version if it answers; promote: make it the champion as it is; fail:
    give the version up, `successor` takes its traffic and alias; delete: end the application;
    forget: drop the row.
    """

    action: Action
    reason: str = ""
    state: State | None = None
    successor: Deployment | None = None


@dataclass(frozen=True)
class ReleasePolicy:
    """Decides for one deployment at a time."""

    drain_s: float = 2.0
    """From taking traffic away until deleting: gateways must have noticed by then."""
    start_timeout_s: float = 900.0
    """Longest that replicas may take to load."""
    max_starts: int = 6
    """Tries to ask Serve for a new version, where it cannot be asked."""
    first_retry_s: float = 0.5
    """Until the second try; doubled with each one."""
    longest_retry_s: float = 30.0

    def decide(self, seen: Observation) -> Decision:
        state = seen.deployment.state
        if state in STARTING:
            return self._towards_champion(seen)
        if state in SERVING:
            return self._keep_serving(seen)
        return self._towards_nothing(seen)

    def _towards_champion(self, seen: Observation) -> Decision:
        row, application = seen.deployment, seen.application
        if application is None:
            return self._start(seen, "replicas are being placed")
        if row.started_at is None or application.phase == "deleting":
            return self._make_way(seen, application)
        if application.phase == "failed":
            return Decision("fail", application.message)
        if application.phase == "running":
            if row.state == "parity":
                return self._ask(seen)
            return Decision("enter", "golden outputs reproduced; asking a replica", "parity")
        if seen.seconds_since_start > self.start_timeout_s:
            return Decision("fail", f"it did not start within {self.start_timeout_s:g} s")
        if application.phase == "starting" and row.state == "deploying":
            return Decision("enter", "a replica is loading and replaying golden inputs", "warming")
        return Decision("wait")

    def _ask(self, seen: Observation) -> Decision:
        if seen.seconds_in_state > self.start_timeout_s:
            return Decision("fail", f"no replica answered within {self.start_timeout_s:g} s")
        return Decision("check", "is it the package that was deployed?")

    def _make_way(self, seen: Observation, application: ApplicationStatus) -> Decision:
        """What an earlier deployment of the version left ends before the new one begins."""
        if seen.seconds_in_state > self.start_timeout_s:
            limit = f"{self.start_timeout_s:g} s"
            return Decision("fail", f"its earlier application did not end within {limit}")
        if application.phase == "deleting" or seen.seconds_in_state < self.drain_s:
            return Decision("wait", "an earlier application of this version ends first")
        return Decision("delete", "an earlier application of this version makes way")

    def _keep_serving(self, seen: Observation) -> Decision:
        if seen.application is None:
            return self._start(seen, "the cluster was restarted")
        if seen.application.phase == "failed":
            return _give_up(seen, seen.application.message)
        is_left_alone = seen.deployment.state == "standby" and not seen.has_champion
        if is_left_alone and seen.application.phase == "running":
            return Decision("promote", "the model had no champion any more")
        return Decision("wait")

    def _start(self, seen: Observation, reason: str) -> Decision:
        tries = seen.tries
        # What served must come back whenever Serve does; what is new has somebody waiting for it.
        is_enough = seen.deployment.state in STARTING and tries.count >= self.max_starts
        if tries.count and (is_enough or not tries.may_pass):
            return _give_up(seen, tries.reason)
        if tries.count and tries.seconds_since_last < self._pause_s(tries.count):
            return Decision("wait", "trying again soon")
        return Decision("start", reason)

    def _pause_s(self, num_tries: int) -> float:
        return min(self.first_retry_s * 2.0 ** min(num_tries - 1, 30), self.longest_retry_s)

    def _towards_nothing(self, seen: Observation) -> Decision:
        application = seen.application
        if application is None:
            return Decision("forget" if seen.deployment.state == "retiring" else "wait")
        if application.phase == "deleting":
            return Decision("wait")
        if seen.deployment.state == "retiring" and seen.seconds_in_state < self.drain_s:
            return Decision("wait", "draining")
        return Decision("delete")


def _give_up(seen: Observation, reason: str) -> Decision:
    successor = seen.standby if seen.deployment.state == "champion" else None
    return Decision("fail", reason, successor=successor)
