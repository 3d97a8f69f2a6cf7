"""What a failed call between applications means to its caller."""

from __future__ import annotations

from collections.abc import AsyncIterator

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


async def test_calls_that_one_request_makes_at_once_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers to `n` 2: a router that keeps both under one id places one of them alone."""
    from ray import serve
    from ray.serve import context

    from serve_apps.handles import Handles

    seen: list[tuple[str, str]] = []

    class Handle:
        def options(self, *, stream: bool) -> Handle:
            return self

        @property
        def generate(self) -> Handle:
            return self

        def remote(self, item: str) -> AsyncIterator[str]:
            asked = context._get_serve_request_context()
            seen.append((asked.request_id, asked._internal_request_id))
            return self._items(item)

        async def _items(self, item: str) -> AsyncIterator[str]:
            yield item

    monkeypatch.setattr(serve, "get_app_handle", lambda _name: Handle())
    context._set_request_context(request_id="asked", _internal_request_id="one")
    handles = Handles()
    answers = [handles.stream("talker.v1", "generate", item) for item in "ab"]
    assert [item for answer in answers async for item in answer] == ["a", "b"]
    assert [request_id for request_id, _ in seen] == ["asked", "asked"]
    assert len({"one", *(internal_id for _, internal_id in seen)}) == 3
    assert context._get_serve_request_context()._internal_request_id == "one"
