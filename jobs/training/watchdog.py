"""The watchdog: ends this process when it has shown no sign of life for too long.

A worker that hangs keeps its peers waiting inside a collective operation, where no exception of
ours reaches them, whatever their process groups' own timeouts. Each worker therefore watches
itself: the peers of a hung one end, and whoever placed the workers replaces them all. It knows
nothing of what the process does.

    with Watchdog(timeout_s=600, on_hang=say) as watchdog:
        watchdog.beat()                   # at every step
        watchdog.rest()                   # waiting long is no fault until the next one
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from types import TracebackType

HUNG_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: trying again may help."""
_CHECKS_PER_TIMEOUT = 10
_REPORT_TIMEOUT_S = 5


class Watchdog:
    """A thread that looks at the time of the last beat; it does so from the first one on.

    Args:
        on_hang: told how many seconds it has been, before the process ends.
    """

    def __init__(
        self,
        timeout_s: float,
        on_hang: Callable[[float], object],
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._timeout_s, self._on_hang, self._end = timeout_s, on_hang, end
        self._beaten_at: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._closed.set()

    def beat(self) -> None:
        """A sign of life."""
        self._beaten_at = time.monotonic()

    def rest(self) -> None:
        """Waiting long is no fault until the next beat."""
        self._beaten_at = None

    def _watch(self) -> None:
        while not self._closed.wait(self._timeout_s / _CHECKS_PER_TIMEOUT):
            beaten_at = self._beaten_at
            if beaten_at is not None and time.monotonic() - beaten_at > self._timeout_s:
                self._report(time.monotonic() - beaten_at)
                self._end(HUNG_EXIT_CODE)
                return

    def _report(self, seconds: float) -> None:
        # Whatever comes of it, and however long it takes, the process ends.
        thread = threading.Thread(target=self._on_hang, args=(seconds,), daemon=True)
        thread.start()
        thread.join(_REPORT_TIMEOUT_S)
