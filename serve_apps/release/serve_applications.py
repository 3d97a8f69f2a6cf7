"""Model versions as applications of this cluster's Ray Serve.

applications = ServeApplications()
applications.start(deployment, "graph")
"""

from __future__ import annotations

from collections.abc import Sequence

import ray
from ray import serve
from ray.serve.schema import ApplicationStatusOverview, ReplicaState

from cluster.releases import Deployment
from serve_apps.options import DeploymentOptions
from serve_apps.release.applications import (
    ApplicationStatus,
    Node,
    Phase,
    is_model_application,
    one_line_reason,
)

_PHASES: dict[str, Phase] = {
    "NOT_STARTED": "scheduling",
    "DEPLOYING": "scheduling",
    "RUNNING": "running",
    # Serve calls an application unhealthy while it replaces a replica.
    "UNHEALTHY": "running",
    "DEPLOY_FAILED": "failed",
    "DELETING": "deleting",
}


class ServeApplications:
    """Applications of this cluster's Serve."""

    def nodes(self) -> Sequence[Node]:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return [Node(has.get("CPU", 0), has.get("GPU", 0)) for has in alive]

    def statuses(self) -> dict[str, ApplicationStatus]:
        found = serve.status().applications
        return {name: status_of(app) for name, app in found.items() if is_model_application(name)}

    def start(self, deployment: Deployment, kind: str) -> None:
        options = DeploymentOptions.model_validate(deployment.options)
        if kind == "graph":
            from serve_apps.predictor.deployment import build_predictor as build
        else:
            from serve_apps.llm.deployment import build_language_model as build
        target = serve.RunTarget(
            target=build(deployment.digest, options), name=deployment.application, route_prefix=None
        )
        serve.run_many(
            [target],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )

    def delete(self, application: str) -> None:
        serve.delete(application, _blocking=False)


def status_of(overview: ApplicationStatusOverview) -> ApplicationStatus:
    """Serve's report in the release policy's words."""
    phase = _PHASES[overview.status.value]
    messages = [overview.message, *(d.message for d in overview.deployments.values())]
    if phase == "scheduling" and _count(overview, ReplicaState.STARTING):
        phase = "starting"
    return ApplicationStatus(
        phase=phase,
        message=one_line_reason("\n".join(messages)) if phase == "failed" else "",
        num_replicas=_count(overview, ReplicaState.RUNNING),
    )


def _count(overview: ApplicationStatusOverview, wanted: ReplicaState) -> int:
    # Serve documents an enumeration here and gives its values.
    return sum(
        count
        for deployment in overview.deployments.values()
        for state, count in deployment.replica_states.items()
        if ReplicaState(state) == wanted
    )
