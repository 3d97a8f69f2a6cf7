"""What is observed of one release's two versions: each observation lies between 0 and 1.

observer = Observer(release, evidence)
observer.observe("candidate", "errors", 0.0)
observer.wait("candidate", "slow", num_samples, seconds)
"""

from __future__ import annotations

from cluster.errors import HeliostatError, OverloadedError
from cluster.release_evidence import Arm, Metric
from serve_apps.gateway.releases.evidence import Evidence
from serve_apps.gateway.releases.release import Release
from serve_apps.gateway.releases.slowness import Slowness


class Observer:
    """Puts what happens into the evidence's words."""

    def __init__(self, release: Release, evidence: Evidence) -> None:
        self.release = release
        self._evidence = evidence
        self._slowness = Slowness()
        self.failed_requests: set[str] = set()
        """Ids of streams under way of which a replica's failure was observed."""

    def observe(self, arm: Arm, metric: Metric, value: float) -> None:
        self._evidence.observe(self.release, arm, metric, value)

    def failure(self, arm: Arm, error: Exception, wait: Metric) -> None:
        """Unless the client is to blame. A refusal for want of room is an endless wait."""
        if isinstance(error, OverloadedError):
            self.observe(arm, wait, 1.0)
        elif not isinstance(error, HeliostatError) or error.http_status >= 500:
            self.observe(arm, "errors", 1.0)

    def wait(self, arm: Arm, metric: Metric, size: int, seconds: float) -> None:
        """`size` is what waits depend on: samples, or tokens of the prompt."""
        is_slow = self._slowness.judge(metric, size, seconds)
        if is_slow is not None:
            self.observe(arm, metric, float(is_slow))
        if arm == "champion":
            self._slowness.learn(metric, size, seconds)

    def abandoned(self, arm: Arm, metric: Metric, size: int, seconds: float) -> None:
        """A client has left after so long, which is known to be slow or says nothing."""
        if self._slowness.judge(metric, size, seconds):
            self.observe(arm, metric, 1.0)

    def mirrored(self, outcome: str) -> None:
        """A request to the candidate that no customer made was compared, failed or dropped."""
        self._evidence.count_mirrored(self.release, outcome)

    def failed_over(self) -> None:
        """The champion has answered what the candidate failed."""
        self._evidence.count_failed_over(self.release)
