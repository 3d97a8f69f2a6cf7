"""Ends the work for a client that went away before its answer.

Ray Serve would do this with two tasks for every request, and keeps whole bodies in memory for it;
HAProxy is told to ask it not to (cluster/session/haproxy_wrapper.py). Most requests are answered
long before the first look here, and cost one timer.

    app = Departures(inner)
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_FIRST_LOOK_S = 0.2


class Departures:
    """Cancels a request once its client has left."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        if scope["type"] != "http" or task is None:
            await self._app(scope, receive, send)
            return
        watch = _Watch(receive, task)
        try:
            await self._app(scope, watch.receive, send)
        except asyncio.CancelledError:
            if not watch.has_left or task.uncancel():
                raise
        finally:
            watch.end()


class _Watch:
    """One request's client."""

    def __init__(self, receive: Receive, task: asyncio.Task[None]) -> None:
        self._receive = receive
        self._request = task
        self._is_body_complete = False
        self._task: asyncio.Task[None] | None = None
        self.has_left = False
        self._look_later()

    async def receive(self) -> Message:
        message = await self._receive()
        if not message.get("more_body", False):
            self._is_body_complete = True
        return message

    def end(self) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_FIRST_LOOK_S, self._look)

    def _look(self) -> None:
        if self._is_body_complete:
            self._task = asyncio.create_task(self._wait())
        else:
            # Parts of the body are the reader's; one that waits for them sees the client leave.
            self._look_later()

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.has_left = True
        self._request.cancel()
