"""Work that is done beside the customers', in what they leave over, or else not at all.

One piece at a time, only while there is room, and never more than a quarter of the time: the
customers' answers come first. What cannot wait is dropped before anything else is.

    mirror = Mirror(has_room=lambda: batcher.num_waiting == 0, on_dropped=count)
    mirror.offer(work, size_bytes=4096)
    mirror.close()
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import NamedTuple

logger = logging.getLogger(__name__)

_MAX_QUEUED = 32
_MAX_BYTES = 64 * 1024**2
_MAX_AGE_S = 5.0
_LOOK_S = 0.01
_REST = 3.0
"""As many times as long as a piece took, nothing is done after it, …"""
_MAX_REST_S = 0.5
"""… for at most this long."""

Work = Callable[[], Awaitable[None]]


class _Piece(NamedTuple):
    work: Work
    size_bytes: int
    offered_s: float


class Mirror:
    """A bounded queue and the task that works it off. For one event loop.

    Args:
        has_room: whether the customers leave anything over at this moment.
        on_dropped: told of each piece that was not done.
    """

    def __init__(self, has_room: Callable[[], bool], on_dropped: Callable[[], None]) -> None:
        self._has_room = has_room
        self._on_dropped = on_dropped
        self._queue: deque[_Piece] = deque()
        self._queued_bytes = 0
        self._task: asyncio.Task[None] | None = None

    def offer(self, work: Work, size_bytes: int) -> None:
        """Do this when there is room for it."""
        is_full = len(self._queue) >= _MAX_QUEUED or self._queued_bytes + size_bytes > _MAX_BYTES
        if is_full:
            self._on_dropped()
            return
        self._queue.append(_Piece(work, size_bytes, time.monotonic()))
        self._queued_bytes += size_bytes
        if self._task is None or self._task.done():
            # In no request's context: it is part of nobody's trace, and nobody's caller.
            self._task = asyncio.create_task(self._work_off(), context=Context())

    def close(self) -> None:
        """Forget what waits, and end what is under way."""
        self._queue.clear()
        self._queued_bytes = 0
        if self._task is not None:
            self._task.cancel()

    async def _work_off(self) -> None:
        while self._queue:
            piece = self._queue.popleft()
            if await self._room_came(piece):
                begun_s = time.monotonic()
                try:
                    await piece.work()
                except Exception:
                    logger.exception("mirrored work failed")
                await asyncio.sleep(min(_MAX_REST_S, _REST * (time.monotonic() - begun_s)))
            else:
                self._on_dropped()
            self._queued_bytes -= piece.size_bytes

    async def _room_came(self, piece: _Piece) -> bool:
        while not self._has_room():
            if time.monotonic() - piece.offered_s > _MAX_AGE_S:
                return False
            await asyncio.sleep(_LOOK_S)
        return True
