"""Stopping in order: a signal asks, workers end together at a step's end, with a checkpoint.

It knows nothing of workers; whoever places them carries the request to them.

    with stop_on_signals() as request:
        run_worker(job, sink, is_stopping=request.is_set)
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from cluster.errors import StoppedError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
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
def stop_on_signals() -> Iterator[StopRequest]:
    """SIGTERM or Ctrl-C makes the request, and is the exit code of the StoppedError that comes of
    it; a second one, or one that nothing came of, does what it did before. Outside of the main
    thread, which alone gets signals, nothing is changed."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
    asked_by = signal.SIGTERM

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal asked_by
        asked_by = signal.Signals(number)
        put_back()
        request.make()

    for number in _SIGNALS:
        signal.signal(number, ask)
    try:
        yield request
    except StoppedError as error:
        error.exit_code = 128 + asked_by
        raise
    finally:
        put_back()
    if request.is_set():
        signal.raise_signal(asked_by)
