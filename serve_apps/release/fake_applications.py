"""`FakeApplications`: Serve's part in a release, played by hand, for tests and rehearsals.

applications = FakeApplications()
applications.set_phase("digits.v1", "running")
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from cluster.releases import Deployment
from serve_apps.release.applications import ApplicationStatus, Node, Phase


class FakeApplications:
    """Applications that do what they are told."""

    def __init__(self, nodes: Sequence[Node] = (Node(num_cpus=2, num_gpus=0),)) -> None:
        self._nodes = nodes
        self._statuses: dict[str, ApplicationStatus] = {}
        self.started: list[str] = []
        self.deleted: list[str] = []

    def nodes(self) -> Sequence[Node]:
        return self._nodes

    def statuses(self) -> dict[str, ApplicationStatus]:
        return dict(self._statuses)

    def start(self, deployment: Deployment, kind: str) -> None:
        self.started.append(f"{deployment.application} {kind}")
        self._statuses[deployment.application] = ApplicationStatus(
            "scheduling", deployed_at_s=time.time()
        )

    def delete(self, application: str) -> None:
        self.deleted.append(application)
        self.set_phase(application, "deleting")

    def set_phase(self, application: str, phase: Phase, message: str = "") -> None:
        """Say what became of an application."""
        status = self._statuses.get(application) or ApplicationStatus(phase, deployed_at_s=0)
        self._statuses[application] = replace(status, phase=phase, message=message)

    def vanish(self, application: str) -> None:
        """The application is gone."""
        self._statuses.pop(application, None)
