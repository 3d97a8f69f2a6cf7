"""Looks at everything that waits, a few times a second.

A timer for each would cost every request more than its authentication does, and nearly all of them
are answered before the first look.

    sweep = Sweep()
    sweep.add(watch)          # watch.look(now_s) is called from now on
    sweep.discard(watch)
"""

from __future__ import annotations

import asyncio
from contextvars import Context
from typing import Protocol

_PERIOD_S = 0.2


class Watched(Protocol):
    """What is looked at."""

    def look(self, now_s: float) -> None:
        """Called at the event loop's time `now_s`; must not raise."""


class Sweep:
    """Those who wait in one event loop; no timer runs while nobody does."""

    def __init__(self) -> None:
        self._watched: set[Watched] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, watched: Watched) -> None:
        self._watched.add(watched)
        if self._timer is None:
            self._begin()

    def discard(self, watched: Watched) -> None:
        self._watched.discard(watched)

    def _look(self) -> None:
        self._timer = None
        now_s = asyncio.get_running_loop().time()
        for watched in list(self._watched):
            watched.look(now_s)
        if self._watched and self._timer is None:
            self._begin()

    def _begin(self) -> None:
        # In a context of its own: that of the first request would stay for as long as any comes.
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_PERIOD_S, self._look, context=Context())
