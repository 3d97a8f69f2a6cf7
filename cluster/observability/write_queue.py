"""A bounded queue and the thread that writes it in batches; what cannot be written is counted.

For records that are worth less than the work they describe. Knows nothing of what it carries.

    writes = WriteQueue(lambda batch: client.log_batch(run_id, batch), name="metrics")
    writes.put(record)
    writes.close()
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_POLL_S = 0.2

_logger = logging.getLogger(__name__)
Item = TypeVar("Item")


class WriteQueue(Generic[Item]):
    """Calls `write` with batches from its own thread.

    Args:
        write: may block and may raise; a batch it refuses is lost.
        name: what is carried, for warnings.
    """

    def __init__(
        self,
        write: Callable[[list[Item]], None],
        *,
        name: str,
        max_items: int = 5_000,
        max_batch: int = 1_000,
    ) -> None:
        self._write = write
        self._name = name
        self._max_batch = max_batch
        self._queue: queue.Queue[Item] = queue.Queue(max_items)
        self._closing = threading.Event()
        self.num_lost = 0
        self._thread = threading.Thread(target=self._work, name=f"write-{name}", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Queue an item; never waits, a full queue loses it."""
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._lose(1, "they come faster than they are taken")

    def flush(self, timeout_s: float = 15.0) -> None:
        """Wait until what is queued has been written or lost, for at most `timeout_s`."""
        with self._queue.all_tasks_done:
            self._queue.all_tasks_done.wait_for(lambda: not self._queue.unfinished_tasks, timeout_s)

    def close(self, timeout_s: float = 15.0) -> None:
        """Write what is queued, for at most `timeout_s`, and end the thread."""
        self._closing.set()
        self._thread.join(timeout_s)
        if left := self._queue.qsize():
            self._lose(left, "they are taken too slowly")
        if self.num_lost:
            _logger.warning("%d %s were lost", self.num_lost, self._name)

    def _work(self) -> None:
        while not (self._closing.is_set() and self._queue.empty()):
            if not (batch := self._take()):
                continue
            try:
                self._write(batch)
            # Whatever the writer's client raises: these records are not worth stopping for.
            except Exception as error:
                self._lose(len(batch), (str(error) or type(error).__name__).splitlines()[0])
            for _ in batch:
                self._queue.task_done()

    def _take(self) -> list[Item]:
        batch: list[Item] = []
        with contextlib.suppress(queue.Empty):
            batch.append(self._queue.get(timeout=_POLL_S))
            while len(batch) < self._max_batch:
                batch.append(self._queue.get_nowait())
        return batch

    def _lose(self, count: int, reason: str) -> None:
        if not self.num_lost:
            _logger.warning("%s are being lost: %s", self._name, reason)
        self.num_lost += count
