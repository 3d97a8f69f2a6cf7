"""Calls between Serve applications: handles fetched off the loop, time limits, errors of our own.

Used by the gateway and the release controller, always from inside a replica.

    handles = Handles()
    answer = await handles.call("controller", "deployments", None, timeout_s=10)
"""

from __future__ import annotations

import asyncio
import contextvars
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.context import _set_request_context
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)

from cluster.errors import (
    HeliostatError,
    OverloadedError,
    UpstreamFailedError,
    UpstreamTimeoutError,
)


class Handles:
    """Handles to applications by name."""

    def __init__(self) -> None:
        self._handles: dict[str, asyncio.Task[Any]] = {}

    async def call(
        self, application: str, method: str, *arguments: Any, timeout_s: float | None = None
    ) -> Any:
        """The result of one call.

        Raises:
            HeliostatError: as the replica raised it; UpstreamFailedError if the replica is gone,
                UpstreamTimeoutError if it is silent.
        """
        handle = await self._get(application)
        response = _as_request_of_its_own(getattr(handle, method).remote, *arguments)
        try:
            async with asyncio.timeout(timeout_s):
                return await response
        except TimeoutError:
            response.cancel()
            raise UpstreamTimeoutError(
                f"application '{application}' did not answer within {timeout_s:g} s",
                hint="try again later",
            ) from None
        except asyncio.CancelledError:
            response.cancel()
            raise
        except (RayError, RayServeException) as error:
            raise as_heliostat_error(error, application) from None

    async def stream(
        self, application: str, method: str, *arguments: Any
    ) -> AsyncGenerator[Any, None]:
        """The items of a streaming method; closing the generator ends the call."""
        handle = await self._get(application)
        call = getattr(handle.options(stream=True), method).remote
        items = _as_request_of_its_own(call, *arguments)
        is_exhausted = False
        try:
            async for item in items:
                yield item
            is_exhausted = True
        except (RayError, RayServeException) as error:
            raise as_heliostat_error(error, application) from None
        finally:
            if not is_exhausted:
                items.cancel()

    def forget(self, application: str) -> None:
        """Drop the handle: after its application is deleted, calls through it would hang."""
        self._handles.pop(application, None)

    async def _get(self, application: str) -> Any:
        task = self._handles.get(application)
        if task is None:
            # Fetching blocks for milliseconds, or for as long as Serve's controller is away.
            task = asyncio.create_task(asyncio.to_thread(serve.get_app_handle, application))
            self._handles[application] = task
        try:
            return await asyncio.shield(task)
        except (RayError, RayServeException) as error:
            self._handles.pop(application, None)
            raise as_heliostat_error(error, application) from None


def _as_request_of_its_own(call: Callable[..., Any], *arguments: Any) -> Any:
    """The call, which Serve can tell from others that the same HTTP request makes meanwhile.

    All of them would have that request's internal id, by which a router like ours keeps what it has
    to place: of two at once it would forget one, which then waits for ever.
    """

    def begin() -> Any:
        _set_request_context(_internal_request_id=uuid.uuid4().hex)
        return call(*arguments)

    return contextvars.copy_context().run(begin)


def as_heliostat_error(error: Exception, application: str) -> HeliostatError:
    """What a failed call means to the one who made it."""
    cause = getattr(error, "cause", None)
    if isinstance(error, RayTaskError) and isinstance(cause, HeliostatError):
        return cause
    if isinstance(error, BackPressureError):
        return OverloadedError(
            f"application '{application}' has no room now", hint="try again in a moment"
        )
    if isinstance(error, (RayActorError, ReplicaUnavailableError)):
        return UpstreamFailedError(
            f"a replica of '{application}' went away under the request", hint="try again"
        )
    if isinstance(error, (DeploymentUnavailableError, RayServeException)):
        return UpstreamFailedError(
            f"application '{application}' is not running", hint="see `heliostat releases list`"
        )
    shown = str(cause or error).strip().splitlines() or [type(error).__name__]
    return HeliostatError(f"application '{application}' failed: {shown[-1][:300]}")
