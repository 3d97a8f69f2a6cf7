"""Seconds of CPU and GPU that a run holds, handed to the ledger while it runs.

What is held is workers times time, from when they are asked for to the end of training, restarts
included. An entry covers a stretch of time and has a key of its own, so nothing counts twice; a
driver that is killed leaves out half a minute at most. A ledger that is gone costs a warning at the
end, never the training.

    with UsageMeter(ledger.record, config, run_id="4f1c", num_workers=2).running() as meter:
        launcher.run(job, meter.observe)
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

from cluster.ledger import Entry
from jobs.training.config import TrainConfig
from jobs.training.events import Event, Started

_BOOKING_INTERVAL_S = 30.0
_KIND = "training"
_logger = logging.getLogger(__name__)


class UsageMeter:
    """Of one driver's time with a run."""

    def __init__(
        self,
        record: Callable[[Sequence[Entry]], object],
        config: TrainConfig,
        *,
        run_id: str,
        num_workers: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._record = record
        self._config = config
        self._run_id = run_id
        self._num_workers = num_workers
        self._num_gpus = 0
        self._has_started = False
        self._clock = clock
        self._since = clock()
        self._session = uuid.uuid4().hex[:12]
        self._num_entries = 0
        self._unbooked: list[Entry] = []
        self._lock = threading.Lock()

    def observe(self, event: Event) -> None:
        """The workers may have become fewer or more."""
        if not isinstance(event, Started):
            return
        with self._lock:
            if self._has_started:
                self._close()
            # Until the first start, what was asked for is taken to be what was got.
            self._has_started = True
            self._num_workers = event.world_size
            self._num_gpus = event.world_size if event.device == "cuda" else 0

    def book(self) -> None:
        """Hand in what was held since the last time, and what was not taken then."""
        with self._lock:
            self._close()
            try:
                self._record(self._unbooked)
            # Whatever a database raises: the entries are handed in again, under the same keys.
            except Exception as error:
                _logger.info("the ledger took nothing: %s", error)
            else:
                self._unbooked = []

    @contextlib.contextmanager
    def running(self) -> Iterator[UsageMeter]:
        """Book from time to time, and at the end."""
        is_over = threading.Event()

        def book_on() -> None:
            while not is_over.wait(_BOOKING_INTERVAL_S):
                self.book()

        thread = threading.Thread(target=book_on, name="usage", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            is_over.set()
            thread.join()
            self.book()
            if self._unbooked:
                _logger.warning("the ledger lacks %d entries of this run", len(self._unbooked))

    def _close(self) -> None:
        """An entry up to now."""
        now = self._clock()
        seconds, self._since = now - self._since, now
        if seconds <= 0:
            return
        self._num_entries += 1
        self._unbooked.append(
            Entry(
                key=f"{_KIND}/{self._run_id}/{self._session}/{self._num_entries}",
                tenant=self._config.tenant,
                kind=_KIND,
                model=self._config.name,
                source=self._run_id,
                cpu_s=seconds * self._num_workers * self._config.threads_per_worker,
                gpu_s=seconds * self._num_gpus,
            )
        )
