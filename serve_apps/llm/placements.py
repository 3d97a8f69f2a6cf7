"""Where the streams that one process reads are generated, and which of their replicas have to go.

The router of requests tells; who reads a stream asks. Thread-safe without locks: each field is
written by one side alone. Knows nothing of Ray.

    with PLACEMENTS.follow(request.request_id, drain_s=60) as placement:
        async for output in outputs:
            yield output
            if placement.is_due:
                raise ReplicaLeavingError("…")
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

_SUSPECT_S = 5.0
"""In this time a replica whose engine broke is replaced."""


@dataclass(eq=False)
class Placement:
    """Where one request runs."""

    drain_s: float
    """How long it may go on at a replica that has to go."""
    application: str | None = None
    replica: str | None = None
    has_to_go_since_s: float = math.inf
    clock: Callable[[], float] = time.monotonic

    @property
    def is_due(self) -> bool:
        """Whether another replica is to go on now."""
        since_s = self.has_to_go_since_s
        return since_s < math.inf and self.clock() >= since_s + self.drain_s


class Placements:
    """The requests that are being followed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._followed: dict[str, Placement] = {}
        self._suspects: dict[tuple[str, str], float] = {}

    @contextlib.contextmanager
    def follow(self, request_id: str, drain_s: float) -> Iterator[Placement]:
        """Follow a request until its stream ends."""
        placement = self._followed[request_id] = Placement(drain_s, clock=self._clock)
        try:
            yield placement
        finally:
            del self._followed[request_id]

    def placed(self, request_id: str, application: str, replica: str) -> None:
        """A replica took the request."""
        placement = self._followed.get(request_id)
        if placement is not None:
            placement.application, placement.replica = application, replica

    def replicas_are(self, application: str, replicas: Collection[str]) -> None:
        """These take requests from now on. What runs at another one of the application is to go on
        at one of them, but may end where it is for its time to drain."""
        if not replicas:
            return  # nobody could go on
        now_s = self._clock()
        for placement in list(self._followed.values()):
            if placement.application == application and placement.replica not in replicas:
                placement.has_to_go_since_s = min(placement.has_to_go_since_s, now_s)

    def failed(self, placement: Placement) -> None:
        """The replica failed under a stream: for a while others are preferred."""
        if placement.application is not None and placement.replica is not None:
            now_s = self._clock()
            # Nobody asks again about one that is gone for good.
            self._suspects = dict(each for each in [*self._suspects.items()] if each[1] > now_s)
            self._suspects[placement.application, placement.replica] = now_s + _SUSPECT_S

    def is_suspect(self, application: str, replica: str) -> bool:
        """Whether it failed a moment ago."""
        until_s = self._suspects.get((application, replica))
        if until_s is None:
            return False
        if self._clock() < until_s:
            return True
        self._suspects.pop((application, replica), None)
        return False


PLACEMENTS = Placements()
"""Those of this process: Serve makes its routers itself."""
