"""What a failed call between applications means to its caller."""

from __future__ import annotations

from collections.abc import AsyncGenerator

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


async def test_calls_of_one_request_are_apart_to_serves_router(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two with the same id that wait at once, one would never get a replica."""
    from ray.serve import context
    from ray.serve._private.default_impl import get_request_metadata
    from ray.serve._private.handle_options import DynamicHandleOptions, InitHandleOptions

    from serve_apps import handles

    seen: list[str] = []

    class Handle:
        """Makes ids as Serve's handles do."""

        def options(self, **_: object) -> Handle:
            return self

        @property
        def generate(self) -> Handle:
            return self

        def remote(self) -> AsyncGenerator[int, None]:
            metadata = get_request_metadata(InitHandleOptions(), DynamicHandleOptions())
            seen.append(metadata.internal_request_id)
            return self._items()

        async def _items(self) -> AsyncGenerator[int, None]:
            yield 1

    monkeypatch.setattr(handles.serve, "get_app_handle", lambda _name: Handle())
    context._set_request_context(request_id="mine", _internal_request_id="one")
    found = handles.Handles()
    for _ in range(2):
        assert [item async for item in found.stream("talker.v1", "generate")] == [1]
    assert len({*seen, "one"}) == 3
