"""What a failed call between applications means to its caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from types import SimpleNamespace

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


async def test_calls_of_one_request_are_not_taken_for_one_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Serve's router would find the first alone, and the others would wait for ever."""
    from ray import serve
    from ray.serve import context
    from ray.serve._private.default_impl import get_request_metadata
    from ray.serve._private.handle_options import DynamicHandleOptions, InitHandleOptions

    from serve_apps.handles import Handles

    ids: list[str] = []

    class Method:
        def remote(self, number: int) -> Awaitable[None] | AsyncGenerator[int, None]:
            options = InitHandleOptions(), DynamicHandleOptions()
            ids.append(get_request_metadata(*options).internal_request_id)
            return self.items(number) if number else asyncio.sleep(0)

        async def items(self, number: int) -> AsyncGenerator[int, None]:
            yield number

    handle = SimpleNamespace(generate=Method(), describe=Method())
    handle.options = lambda stream: handle
    monkeypatch.setattr(serve, "get_app_handle", lambda application: handle)
    context._serve_request_context.set(context._RequestContext(_internal_request_id="request"))
    handles = Handles()
    assert [item async for item in handles.stream("a", "generate", 1)] == [1]
    assert [item async for item in handles.stream("a", "generate", 2)] == [2]
    await handles.call("a", "describe", 0)
    assert len({"request", *ids}) == 4
