"""What the release controller can do with Serve applications, and how Serve says they are.

`Applications` is the seam; `ServeApplications` the real thing. All of it blocks: call it in a
thread.

    applications = ServeApplications()
    applications.start(deployment, "graph")
    applications.statuses()["digits.v3"].phase
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Protocol

from ray import serve
from ray.serve.schema import ApplicationStatusOverview

from cluster.releases import Deployment
from serve_apps.options import DeploymentOptions

Phase = Literal["scheduling", "starting", "running", "failed", "deleting"]

_PHASES: dict[str, Phase] = {
    "NOT_STARTED": "scheduling",
    "DEPLOYING": "scheduling",
    "RUNNING": "running",
    # Serve calls an application unhealthy while it replaces a replica.
    "UNHEALTHY": "running",
    "DEPLOY_FAILED": "failed",
    "DELETING": "deleting",
}
_EXCEPTION_LINE = re.compile(r"^(?:[A-Za-z_]\w*\.)*([A-Za-z_]\w*(?:Error|Exception)): (.+)$")


@dataclass(frozen=True)
class ApplicationStatus:
    """One application as Serve reports it."""

    phase: Phase
    message: str = ""
    """Why it failed, in one line."""
    deployed_at_s: float = 0.0
    """Unix time of the last time it was asked for."""


class Applications(Protocol):
    """Starts, watches and deletes the applications of model versions."""

    def statuses(self) -> dict[str, ApplicationStatus]:
        """Every model application by name."""

    def start(self, deployment: Deployment, kind: str) -> None:
        """Ask for an application; returns before it runs."""

    def delete(self, application: str) -> None:
        """Ask for its end; returns before it is gone."""


class ServeApplications:
    """Applications of this cluster's Serve."""

    def statuses(self) -> dict[str, ApplicationStatus]:
        found = serve.status().applications
        return {name: _status(app) for name, app in found.items() if is_model_application(name)}

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


def is_model_application(name: str) -> bool:
    """Whether an application serves a model version, as `NAME.vVERSION` says."""
    return re.fullmatch(r".+\.v[1-9][0-9]*", name) is not None


def one_line_reason(message: str) -> str:
    """The error inside Serve's report of a failed constructor, without its traceback."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    for line in reversed(lines):
        match = _EXCEPTION_LINE.match(line)
        if match is not None and match[1] not in ("RayTaskError", "ActorDiedError"):
            return match[2] if match[2].strip() else line
    return lines[-1] if lines else "no reason was given"


def _status(overview: ApplicationStatusOverview) -> ApplicationStatus:
    phase = _PHASES[overview.status.value]
    messages = [overview.message, *(d.message for d in overview.deployments.values())]
    if phase == "scheduling" and _has_process(overview):
        phase = "starting"
    return ApplicationStatus(
        phase=phase,
        message=one_line_reason("\n".join(messages)) if phase == "failed" else "",
        deployed_at_s=overview.last_deployed_time_s,
    )


def _has_process(overview: ApplicationStatusOverview) -> bool:
    return any(
        state.value == "STARTING" and count > 0
        for deployment in overview.deployments.values()
        for state, count in deployment.replica_states.items()
    )
