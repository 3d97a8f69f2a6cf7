"""Stopping in order: SIGTERM asks, workers end together at a step's end, with a checkpoint.

It knows nothing of workers; whoever places them carries the request to them.

    with stop_on_sigterm() as request:
        run_worker(job, sink, is_stopping=request.is_set)
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

IsStopping = Callable[[], bool]


class StopRequest:
    """Made once, by a signal or another process, and asked at every step."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def make(self) -> None:
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self) -> None:
        self._event.wait()


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """SIGTERM makes the request; a second one, or one that nothing came of, does what it did
    before. Outside of the main thread, which alone gets signals, nothing is changed."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: Any = signal.getsignal(signal.SIGTERM)

    def ask(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        request.make()

    signal.signal(signal.SIGTERM, ask)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
    if request.is_set():
        signal.raise_signal(signal.SIGTERM)
