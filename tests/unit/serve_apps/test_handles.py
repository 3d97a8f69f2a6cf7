"""What a failed call between applications means to its caller."""

from __future__ import annotations

import pytest

from cluster.errors import (
    HeliostatError,
    InputError,
    OverloadedError,
    UpstreamFailedError,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_errors_of_replicas_and_of_ray_become_ours() -> None:
    from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    from serve_apps.handles import as_heliostat_error

    ours = InputError("bad pixels", hint="send 64", param="pixels")
    assert as_heliostat_error(RayTaskError("f", "trace", ours).as_instanceof_cause(), "a") is ours
    theirs = RayTaskError("f", "trace", ValueError("odd\nsecond line"))
    found = as_heliostat_error(theirs, "a")
    assert type(found) is HeliostatError
    assert str(found) == "application 'a' failed: second line"
    for error, expected in [
        (ActorDiedError(), UpstreamFailedError),
        (ActorUnavailableError("gone", None), UpstreamFailedError),
        (DeploymentUnavailableError(None), UpstreamFailedError),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), OverloadedError),
    ]:
        assert type(as_heliostat_error(error, "a")) is expected
