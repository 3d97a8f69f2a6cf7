"""What to do next with each deployment: pure, from what the tables and Serve say.

decision = ReleasePolicy().decide(Observation(deployment, status, seconds_in_state=3.0))
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.deployments import COMPARED, SERVING, STARTING, Deployment
from serve_apps.release.applications import ApplicationStatus
from serve_apps.release.comparison import ComparisonPolicy
from serve_apps.release.decisions import Decision, Observation


@dataclass(frozen=True)
class ReleasePolicy:
    """Decides for one deployment at a time."""

    drain_s: float = 2.0
    """From taking traffic away until deleting: gateways must have noticed by then."""
    hand_over_s: float = 5.0
    """Before a champion's notice is over its traffic goes to another: nobody is to be told that
    the model is gone who only asked for its name."""
    start_timeout_s: float = 900.0
    """Longest that replicas may take to load."""
    max_starts: int = 6
    """Tries to ask Serve for a new version, where it cannot be asked."""
    first_retry_s: float = 0.5
    """Until the second try; doubled with each one."""
    longest_retry_s: float = 30.0
    comparison: ComparisonPolicy = field(default_factory=ComparisonPolicy)

    def decide(self, seen: Observation) -> Decision:
        state = seen.deployment.state
        if state in STARTING:
            return self._towards_champion(seen)
        if state in COMPARED:
            return self._beside_champion(seen)
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

    def _beside_champion(self, seen: Observation) -> Decision:
        application = seen.application
        if application is None:
            return self._start(seen, "the cluster was restarted")
        if application.phase == "failed":
            return Decision("fail", application.message)
        if application.phase != "running":
            return self._beside_nobody(seen)
        if not seen.has_champion:
            return Decision("promote", "the model had no champion any more")
        return self.comparison.decide(seen)

    def _beside_nobody(self, seen: Observation) -> Decision:
        """Its replicas may come; or never, and its customers wait for each answer of another."""
        decision = self.comparison.decide(seen) if seen.has_champion else Decision("wait")
        return decision if decision.action == "roll_back" else Decision("wait")

    def _ask(self, seen: Observation) -> Decision:
        if seen.deployment.is_paused:
            return Decision("wait", "paused")
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
        if seen.seconds_to_sunset <= 0:
            return Decision("retire", "its notice is over", successor=_heir(seen))
        if seen.seconds_to_sunset <= self.hand_over_s and (heir := _heir(seen)) is not None:
            shown = f"version {seen.deployment.version} ends at {seen.deployment.sunset_at}"
            return Decision("hand_over", shown, successor=heir)
        if seen.application is None:
            return self._start(seen, "the cluster was restarted")
        if seen.application.phase == "failed":
            return self._after_failure(seen, seen.application.message)
        if seen.application.phase == "running" and seen.tries.count:
            return Decision("enter", "it runs again", seen.deployment.state)
        is_left_alone = seen.deployment.state == "standby" and not seen.has_champion
        if is_left_alone and seen.application.phase == "running":
            return Decision("promote", "the model had no champion any more")
        return Decision("wait")

    def _after_failure(self, seen: Observation, reason: str) -> Decision:
        is_left = seen.deployment.state == "champion" and seen.successor is None
        if not is_left or not seen.tries.may_pass:
            return _give_up(seen, reason)
        # Nobody else answers for the model, and what it failed for may pass: storage that was away
        # while the cluster came back, or memory.
        if self._is_too_early(seen):
            return Decision("wait", "trying again soon")
        return Decision("start_again", reason)

    def _start(self, seen: Observation, reason: str) -> Decision:
        tries = seen.tries
        # What served must come back whenever Serve does; what is new has somebody waiting for it.
        is_new = seen.deployment.state in (*STARTING, *COMPARED)
        is_enough = is_new and tries.count >= self.max_starts
        if tries.count and (is_enough or not tries.may_pass):
            return _give_up(seen, tries.reason)
        if self._is_too_early(seen):
            return Decision("wait", "trying again soon")
        return Decision("start", reason)

    def _is_too_early(self, seen: Observation) -> bool:
        tries = seen.tries
        pause_s = self.first_retry_s * 2.0 ** min(tries.count - 1, 30)
        return tries.count > 0 and tries.seconds_since_last < min(pause_s, self.longest_retry_s)

    def _towards_nothing(self, seen: Observation) -> Decision:
        application, row = seen.application, seen.deployment
        if application is None and row.state == "retiring":
            if row.sunset_at is None:
                return Decision("forget")
            return Decision("enter", row.reason, "retired")
        if application is None or application.phase == "deleting":
            return Decision("wait")
        # What has failed answers nobody; what had traffic keeps it until all gateways know.
        if row.state != "failed" and seen.seconds_in_state < self.drain_s:
            return Decision("wait", "draining")
        return Decision("delete")


def _give_up(seen: Observation, reason: str) -> Decision:
    return Decision("fail", reason, successor=_heir(seen))


def _heir(seen: Observation) -> Deployment | None:
    return seen.successor if seen.deployment.state == "champion" else None
