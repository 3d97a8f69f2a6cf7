"""The gateway's models over Ray Serve, and its way to the release controller.

backend = ServeBackend()
outputs = await backend.predict("digits.v3", {"pixels": pixels})
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator
from typing import Any, cast

from cluster.errors import HeliostatError, ReplicaLeavingError, UpstreamFailedError
from cluster.observability.tracing import Tracing
from serve_apps.gateway.admin import Steering
from serve_apps.gateway.backend import Arrays
from serve_apps.gateway.channels import Channels, Inbox
from serve_apps.handles import Handles
from serve_apps.llm.channels import Channel, Part
from serve_apps.llm.engine import EngineRequest, TokenOutput
from serve_apps.llm.placements import PLACEMENTS

CONTROLLER_APPLICATION = "controller"
_CONTROL_TIMEOUT_S = 60.0


class ServeBackend:
    """A ModelBackend whose replicas are Serve's. Time limits are the caller's."""

    def __init__(self, tracing: Tracing | None = None) -> None:
        self._handles = Handles()
        self._name = uuid.uuid4().hex
        self._channels = Channels(self._name, self._listen)
        self._tracing = tracing or Tracing()

    async def predict(self, application: str, arrays: Arrays) -> Arrays:
        traceparent = self._tracing.traceparent()
        arguments = (arrays,) if traceparent is None else (arrays, traceparent)
        return cast(Arrays, await self._handles.call(application, "predict", *arguments))

    async def generate(
        self, application: str, request: EngineRequest, *, drain_s: float
    ) -> AsyncGenerator[TokenOutput, None]:
        with (
            self._channels.follow(request.request_id) as inbox,
            PLACEMENTS.follow(request.request_id, drain_s) as placement,
            contextlib.ExitStack() as counted,
        ):
            own = asyncio.create_task(self._read(application, request, inbox))
            is_counted = False
            try:
                async for output in inbox.outputs():
                    if not is_counted and placement.replica is not None:
                        is_counted = True
                        counted.enter_context(
                            self._channels.count(application, placement.replica, request.request_id)
                        )
                    yield output
                    if placement.is_due and output.finish_reason is None:
                        raise ReplicaLeavingError(
                            f"replica {placement.replica} of '{application}' has to go"
                        )
            except ReplicaLeavingError:
                raise
            except UpstreamFailedError:
                PLACEMENTS.failed(placement)
                raise
            finally:
                own.cancel()
                await asyncio.wait({own})

    async def _read(self, application: str, request: EngineRequest, inbox: Inbox) -> None:
        """The answer's own stream."""
        parts = self._handles.stream(application, "generate", request, self._name)
        try:
            async with contextlib.aclosing(parts):
                async for part in parts:
                    inbox.put(part)
        except Exception as error:
            inbox.end(error)
        else:
            inbox.end()

    def _listen(self, application: str, channel: Channel) -> AsyncGenerator[list[Part], None]:
        return self._handles.stream(application, "listen", channel)

    async def prepare(self, application: str) -> None:
        # Serve's controller is asked at the first call, and it may be away by then.
        with contextlib.suppress(HeliostatError):
            await self._handles.call(application, "describe", timeout_s=_CONTROL_TIMEOUT_S)

    def forget(self, application: str) -> None:
        self._handles.forget(application)


class ServeControl:
    """A ReleaseControl in another application."""

    def __init__(self) -> None:
        self._handles = Handles()

    async def deploy(
        self, ref: str, strategy: str, options: dict[str, Any], actor: str
    ) -> dict[str, Any]:
        return cast(dict[str, Any], await self._call("deploy", ref, strategy, options, actor))

    async def undeploy(
        self, name: str, version: int | None, notice_s: int | None, actor: str
    ) -> list[dict[str, Any]]:
        rows = await self._call("undeploy", name, version, notice_s, actor)
        return cast(list[dict[str, Any]], rows)

    async def steer(self, name: str, verb: Steering, actor: str) -> dict[str, Any]:
        return cast(dict[str, Any], await self._call(verb, name, actor))

    async def deployments(self, name: str | None) -> list[dict[str, Any]]:
        return cast(list[dict[str, Any]], await self._call("deployments", name))

    async def release(self, name: str) -> dict[str, Any]:
        return cast(dict[str, Any], await self._call("release", name))

    async def _call(self, method: str, *arguments: Any) -> Any:
        return await self._handles.call(
            CONTROLLER_APPLICATION, method, *arguments, timeout_s=_CONTROL_TIMEOUT_S
        )
