"""`FakeApplications`: Serve's part in a release, played by hand, for tests and rehearsals.

applications = FakeApplications()
applications.set_phase("digits.v1", "running")
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.releases import Deployment
from serve_apps.release.applications import ApplicationStatus, Node, Phase


class FakeApplications:
    """Applications that do what they are told."""

    def __init__(self, nodes: Sequence[Node] = (Node(num_cpus=2, num_gpus=0),)) -> None:
        self._nodes = nodes
        self._statuses: dict[str, ApplicationStatus] = {}
        self.started: list[str] = []
        self.deleted: list[str] = []
        self.start_errors: list[Exception] = []
        """Raised by the next starts, one by one."""

    def nodes(self) -> Sequence[Node]:
        return self._nodes

    def statuses(self) -> dict[str, ApplicationStatus]:
        return dict(self._statuses)

    def start(self, deployment: Deployment, kind: str) -> None:
        # As in Serve, one that is there gets new replicas, whatever it did until now.
        self.started.append(f"{deployment.application} {kind}")
        if self.start_errors:
            raise self.start_errors.pop(0)
        self._statuses[deployment.application] = ApplicationStatus("scheduling")

    def delete(self, application: str) -> None:
        self.deleted.append(application)
        if application in self._statuses:
            self.set_phase(application, "deleting")

    def set_phase(self, application: str, phase: Phase, message: str = "") -> None:
        """Say what became of an application."""
        self._statuses[application] = ApplicationStatus(
            phase, message, num_replicas=1 if phase == "running" else 0
        )

    def vanish(self, application: str) -> None:
        """The application is gone."""
        self._statuses.pop(application, None)
