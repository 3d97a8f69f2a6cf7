"""The reader's side of channels: answers put together from their own streams and from channels.

with channels.follow(request.request_id) as inbox:
    async for output in inbox.outputs():
        ...
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextvars import Context

from cluster.errors import HeliostatError, UpstreamFailedError
from serve_apps.llm.channels import MIN_ANSWERS, Channel, Part
from serve_apps.llm.engine import TokenOutput
from serve_apps.llm.placements import PLACEMENTS, Placement

logger = logging.getLogger(__name__)

Open = Callable[[str, Channel], AsyncGenerator[list[Part], None]]
"""Opens a channel of an application."""

_GRACE_S = 2.0
"""What an answer lacks when its own stream has ended is on its way in a channel, or lost."""


class Inbox:
    """Outputs of one answer in their order, however they come."""

    def __init__(self) -> None:
        self._parts: dict[int, TokenOutput] = {}
        self._num_given = 0
        self._arrived = asyncio.Event()
        self._is_complete = False
        self._error: Exception | None = None

    def put(self, part: Part) -> None:
        start, output = part
        self._parts[start] = output
        self._arrived.set()

    def end(self, error: Exception | None = None) -> None:
        """The answer's own stream has ended, or it is to end with an error."""
        self._is_complete = True
        self._error = self._error or error
        self._arrived.set()

    async def outputs(self) -> AsyncGenerator[TokenOutput, None]:
        """Ends with the last of the answer, or early where that never came.

        Raises:
            Exception: that the answer is to end with, after what came before.
            UpstreamFailedError: a part of it was lost.
        """
        while True:
            output = self._parts.pop(self._num_given, None)
            if output is not None:
                self._num_given += len(output.token_ids)
                yield output
                if output.finish_reason is not None:
                    return
            elif self._error is not None:
                raise self._error
            elif self._is_complete and not self._parts:
                return
            else:
                await self._wait()

    async def _wait(self) -> None:
        self._arrived.clear()
        try:
            async with asyncio.timeout(_GRACE_S if self._is_complete else None):
                await self._arrived.wait()
        except TimeoutError:
            raise UpstreamFailedError("a part of the answer was lost on its way") from None


class Channels:
    """Those of one process: a channel for each replica that has several of its answers."""

    def __init__(self, reader: str, open_channel: Open) -> None:
        self._reader = reader
        self._open_channel = open_channel
        self._inboxes: dict[str, Inbox] = {}
        self._replicas: dict[tuple[str, str], _Replica] = {}

    @contextlib.contextmanager
    def follow(self, request_id: str) -> Iterator[Inbox]:
        """Where an answer comes in that is asked for now."""
        inbox = self._inboxes[request_id] = Inbox()
        try:
            yield inbox
        finally:
            del self._inboxes[request_id]

    @contextlib.contextmanager
    def count(self, application: str, name: str, request_id: str) -> Iterator[None]:
        """While a replica generates an answer."""
        key = (application, name)
        replica = self._replicas.get(key)
        if replica is None:
            replica = self._replicas[key] = _Replica()
        replica.request_ids.add(request_id)
        if replica.listening is None and len(replica.request_ids) >= MIN_ANSWERS:
            # It outlives the request that it is opened for.
            replica.listening = asyncio.create_task(self._listen(key, replica), context=Context())
        try:
            yield
        finally:
            replica.request_ids.discard(request_id)
            if replica.listening is None:
                self._forget(key, replica)
            elif not replica.request_ids and not replica.is_open:
                # It takes nothing any more; one that may be writing is not interrupted.
                replica.listening.cancel()

    async def _listen(self, key: tuple[str, str], replica: _Replica) -> None:
        application, name = key
        channel = Channel(uuid.uuid4().hex, self._reader, name)
        failure: HeliostatError | None = None
        try:
            with PLACEMENTS.follow(channel.request_id, drain_s=math.inf) as replica.placement:
                messages = self._open_channel(application, channel)
                async with contextlib.aclosing(messages):
                    async for parts in messages:
                        for part in parts:
                            inbox = self._inboxes.get(part[1].request_id)
                            if inbox is not None:
                                inbox.put(part)
        except HeliostatError as error:
            failure = error
            logger.info("channel to replica %s of %s: %s", name, application, error)
        finally:
            # What it had taken is lost where it broke; where it never began there was nothing.
            if failure is not None and replica.is_open:
                for request_id in replica.request_ids:
                    self._inboxes[request_id].end(failure)
            replica.listening = replica.placement = None
            self._forget(key, replica)

    def _forget(self, key: tuple[str, str], replica: _Replica) -> None:
        if not replica.request_ids:
            self._replicas.pop(key, None)


class _Replica:
    def __init__(self) -> None:
        self.request_ids: set[str] = set()
        self.listening: asyncio.Task[None] | None = None
        self.placement: Placement | None = None

    @property
    def is_open(self) -> bool:
        """Whether the replica may have put something into the channel."""
        return self.placement is not None and self.placement.replica is not None
