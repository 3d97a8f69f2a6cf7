"""Ends the work for a client that went away before its answer.

Ray Serve would do this with two tasks for every request, and keeps whole bodies in memory for it;
HAProxy is told to ask it not to (cluster/session/haproxy_wrapper.py).

    app = Departures(inner)
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_apps.gateway.http.sweep import Sweep

_FIRST_LOOK_S = 0.15
"""Most requests are answered by then."""


class Departures:
    """Cancels a request once its client has left."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._sweep = Sweep()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        if scope["type"] != "http" or task is None:
            await self._app(scope, receive, send)
            return
        watch = _Watch(receive, send, task)
        self._sweep.add(watch)
        try:
            await self._app(scope, watch.receive, watch.send)
        except asyncio.CancelledError:
            if not watch.has_left or task.uncancel():
                raise
        finally:
            self._sweep.discard(watch)
            watch.end()


class _Watch:
    """One request's client."""

    def __init__(self, receive: Receive, send: Send, task: asyncio.Task[None]) -> None:
        self._receive, self._send = receive, send
        self._request = task
        self._is_body_complete = False
        self._is_answered = False
        self._task: asyncio.Task[None] | None = None
        self._since_s = asyncio.get_running_loop().time()
        self.has_left = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._is_body_complete:
            # Whoever reads would take it for a fault of ours.
            self.has_left = True
            raise asyncio.CancelledError
        if not message.get("more_body", False):
            self._is_body_complete = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_answered = True
        await self._send(message)

    def end(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def look(self, now_s: float) -> None:
        """Listen for its leaving once nobody else does: whoever reads the body hears of it."""
        is_due = self._is_body_complete and now_s - self._since_s >= _FIRST_LOOK_S
        if is_due and self._task is None:
            self._task = asyncio.create_task(self._wait())

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        # Servers say so after each whole answer too.
        if not self._is_answered:
            self.has_left = True
            self._request.cancel()
