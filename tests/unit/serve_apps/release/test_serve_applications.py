"""What Serve reports, as the release policy understands it."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize(
    ("status", "replicas", "phase"),
    [
        ("NOT_STARTED", {}, "scheduling"),
        ("DEPLOYING", {}, "scheduling"),
        ("DEPLOYING", {"STARTING": 1}, "starting"),
        ("RUNNING", {"RUNNING": 1}, "running"),
        ("UNHEALTHY", {"STARTING": 1}, "running"),
        ("DEPLOY_FAILED", {}, "failed"),
        ("DELETING", {"STOPPING": 1}, "deleting"),
    ],
)
def test_serves_states_become_phases(status: str, replicas: dict[str, int], phase: str) -> None:
    from ray.serve.schema import (
        ApplicationStatus,
        ApplicationStatusOverview,
        DeploymentStatusOverview,
    )

    from serve_apps.release.serve_applications import status_of

    deployment = DeploymentStatusOverview(
        status="UPDATING", status_trigger="", replica_states=replicas, message="x.YError: broken"
    )
    found = status_of(
        ApplicationStatusOverview(
            status=ApplicationStatus(status),
            message="",
            last_deployed_time_s=5.0,
            deployments={"predictor": deployment},
        )
    )
    assert found.phase == phase
    assert found.message == ("broken" if phase == "failed" else "")
