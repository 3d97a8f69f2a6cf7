"""Group commit: whatever queued up while a call was in flight goes to the model as one array.

No timer, so an idle model answers at once; under load batches grow by themselves, and what could
only be answered late is refused at once. Knows arrays and a function to call; nothing of HTTP,
processing or Ray.

    batcher = Batcher(call, BatchLimits(max_batch_size=64))
    outputs = await batcher.submit({"pixels": pixels_NF})
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field

import numpy as np

from cluster.errors import (
    HeliostatError,
    OverloadedError,
    UpstreamFailedError,
    UpstreamTimeoutError,
)
from cluster.processing import Array
from serve_apps.gateway.admission import Admission

logger = logging.getLogger(__name__)

Arrays = dict[str, Array]
Call = Callable[[Arrays], Awaitable[Arrays]]
OnBatch = Callable[[Sequence[float], int, Sequence[Context]], None]
"""Told of each batch before its call: the requests' waits in seconds, samples, contexts."""


@dataclass(frozen=True)
class BatchLimits:
    """Bounds of one batcher."""

    max_batch_size: int = 64
    """Samples in one call; a single larger request goes alone."""
    max_queued: int = 1024
    """Requests waiting; more are refused."""
    max_in_flight: int = 1
    """Calls at once: one for each replica, or what lets autoscaling see the demand."""
    max_wait_s: float = 0.1
    """Wait that a burst may cause; where a full call takes longer, that long."""
    timeout_s: float = 30.0
    """Longest wait in the queue, and longest call."""
    can_join: bool = True
    """Whether the model takes samples of several requests in one call."""


@dataclass(eq=False)
class _Item:
    arrays: Arrays
    num_samples: int
    signature: tuple[object, ...]
    """Only requests with the same names, types and sample shapes can be joined."""
    future: asyncio.Future[Arrays]
    deadline_s: float
    queued_s: float = field(default_factory=time.perf_counter)
    context: Context = field(default_factory=copy_context)
    batch: _Batch | None = None
    """The call that it is part of, once it is no longer queued."""


@dataclass(eq=False)
class _Batch:
    items: list[_Item] = field(default_factory=list)
    num_samples: int = 0
    num_wanted: int = 0
    """Items whose client still waits."""
    task: asyncio.Task[None] | None = None


class Batcher:
    """The queue to one model version."""

    def __init__(
        self, call: Call, limits: BatchLimits | None = None, on_batch: OnBatch | None = None
    ) -> None:
        self._call = call
        self._on_batch = on_batch
        self.limits = limits or BatchLimits()
        self._admission = Admission(
            max_queued=self.limits.max_queued,
            max_batch_size=self.limits.max_batch_size if self.limits.can_join else 1,
            max_parallel=self.limits.max_in_flight,
            max_wait_s=self.limits.max_wait_s,
        )
        self._queue: deque[_Item] = deque()
        self._num_queued = 0
        self._samples_queued = 0
        self._samples_in_flight = 0
        """All three without those whose client has gone."""
        self._in_flight: set[asyncio.Task[None]] = set()
        self._one_suspect = asyncio.Lock()
        self._closed = False

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return self._num_queued

    @property
    def num_in_flight(self) -> int:
        """Calls under way."""
        return len(self._in_flight)

    async def submit(self, arrays: Arrays) -> Arrays:
        """The model's outputs for these inputs, which must have been validated.

        Being cancelled takes the request out of the queue, and ends its call where nobody else
        waits for it.

        Raises:
            OverloadedError: the queue is full, or the answer would come too late.
            UpstreamTimeoutError, UpstreamFailedError: no replica answered.
        """
        if self._closed:
            raise UpstreamFailedError(
                "this model version was just taken down", hint="ask for another version"
            )
        loop = asyncio.get_running_loop()
        num_samples = _count(arrays) if self.limits.can_join else 1
        decision = self._admission.ask(
            loop.time(),
            num_samples,
            num_queued=self._num_queued,
            samples_ahead=self._samples_ahead(),
        )
        if not decision.admits:
            raise _overloaded(decision.reason)
        item = _Item(
            arrays,
            num_samples,
            _signature(arrays),
            loop.create_future(),
            loop.time() + self.limits.timeout_s,
        )
        self._enqueue(item)
        self._pump()
        try:
            # Its wait in the queue, its call, and another one if that fails: all in one limit.
            async with asyncio.timeout_at(item.deadline_s):
                return await self._outcome(item)
        except TimeoutError:
            raise self._too_late() from None

    async def _outcome(self, item: _Item) -> Arrays:
        try:
            return await item.future
        except asyncio.CancelledError:
            if item.future.cancelled():
                self._abandon(item)
            raise

    async def close(self, patience_s: float) -> None:
        """Refuse what comes; what waits is still asked for, for at most `patience_s`.

        Returns when all is answered; calls in flight at that moment still end.
        """
        self._closed = True
        now_s = asyncio.get_running_loop().time
        deadline_s = now_s() + patience_s
        while self._queue and self._in_flight and (left_s := deadline_s - now_s()) > 0:
            await asyncio.wait(self._in_flight, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            # Landing is a callback of the task that was waited for.
            await asyncio.sleep(0)
        error = UpstreamFailedError("this model version was just taken down")
        while self._queue:
            _fail([self._dequeue()], error)

    def _samples_ahead(self) -> float:
        """What a newcomer waits for; of what is under way, half is done on average."""
        if len(self._in_flight) < self.limits.max_in_flight:
            return self._samples_queued
        return self._samples_queued + self._samples_in_flight / 2

    def _enqueue(self, item: _Item) -> None:
        self._queue.append(item)
        self._num_queued += 1
        self._samples_queued += item.num_samples

    def _dequeue(self, *, newest: bool = False) -> _Item:
        item = self._queue.pop() if newest else self._queue.popleft()
        if not item.future.done():
            self._num_queued -= 1
            self._samples_queued -= item.num_samples
        return item

    def _abandon(self, item: _Item) -> None:
        batch = item.batch
        if batch is None:
            # It stays in the queue, to be passed over.
            self._num_queued -= 1
            self._samples_queued -= item.num_samples
            return
        batch.num_wanted -= 1
        if batch.num_wanted == 0 and batch.task is not None:
            batch.task.cancel()

    def _pump(self) -> None:
        while self._queue and len(self._in_flight) < self.limits.max_in_flight:
            batch = self._take_batch()
            if not batch.items:
                continue
            batch.task = task = asyncio.create_task(
                self._run(batch), context=batch.items[0].context
            )
            self._in_flight.add(task)
            self._samples_in_flight += batch.num_samples
            task.add_done_callback(functools.partial(self._landed, batch))
            self._shorten()

    def _landed(self, batch: _Batch, task: asyncio.Task[None]) -> None:
        self._in_flight.discard(task)
        self._samples_in_flight -= batch.num_samples
        self._pump()

    def _shorten(self) -> None:
        """Refuse the newest that turned out to have come with more than a burst."""
        while self._queue:
            newest = self._queue[-1]
            decision = self._admission.ask_to_stay(
                num_queued=self._num_queued,
                samples_ahead=self._samples_ahead() - newest.num_samples,
            )
            if decision.admits:
                return
            _fail([self._dequeue(newest=True)], _overloaded(decision.reason))

    def _take_batch(self) -> _Batch:
        """The oldest requests that fit together, leaving out those that nobody waits for."""
        batch = _Batch()
        passed_over: list[_Item] = []
        now_s = asyncio.get_running_loop().time()
        max_samples = self._admission.call_size
        while self._queue:
            item = self._queue[0]
            if item.future.done():
                self._dequeue()
                continue
            if now_s >= item.deadline_s:
                _fail([self._dequeue()], self._too_late())
                continue
            if batch.items and not _fits(batch, item, max_samples):
                if item.signature == batch.items[0].signature:
                    break  # never overtake a request of the same kind
                passed_over.append(self._queue.popleft())
                continue
            batch.items.append(self._dequeue())
            batch.num_samples += item.num_samples
            item.batch = batch
            if not self.limits.can_join or batch.num_samples >= max_samples:
                break
        self._queue.extendleft(reversed(passed_over))
        batch.num_wanted = len(batch.items)
        return batch

    async def _run(self, batch: _Batch) -> None:
        """Answer a batch; if it fails, find the one at fault by asking for each alone."""
        items, loop = batch.items, asyncio.get_running_loop()
        if self._on_batch is not None:
            now_s = time.perf_counter()
            self._on_batch(
                [now_s - item.queued_s for item in items],
                batch.num_samples,
                [item.context for item in items],
            )
        try:
            begun_s = loop.time()
            await self._answer(items)
        except (UpstreamTimeoutError, OverloadedError) as error:
            _fail(items, error)
        except Exception as error:
            if len(items) == 1 and not isinstance(error, UpstreamFailedError):
                _fail(items, error)
                return
            logger.info("batch of %d failed, retrying one by one: %s", len(items), error)
            for item in items:
                await self._retry_alone(item)
        else:
            if batch.num_samples <= self._admission.times.max_batch_size:
                self._admission.times.observe(batch.num_samples, loop.time() - begun_s)

    async def _retry_alone(self, item: _Item) -> None:
        # One of them may kill its replica: at no time is another suspect there to die with it,
        # for that one would have had its second chance already.
        async with self._one_suspect:
            if item.future.done():
                return
            if asyncio.get_running_loop().time() >= item.deadline_s:
                _fail([item], self._too_late())
                return
            try:
                await self._answer([item])
            except Exception as error:
                _fail([item], error)

    async def _answer(self, items: Sequence[_Item]) -> None:
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                outputs = await self._call(_join(items))
        except TimeoutError:
            raise self._too_late() from None
        for item, part in zip(items, _split(outputs, items), strict=True):
            if not item.future.done():
                item.future.set_result(part)

    def _too_late(self) -> UpstreamTimeoutError:
        return UpstreamTimeoutError(
            f"the model did not answer within {self.limits.timeout_s:g} s", hint="try again later"
        )


def _overloaded(reason: str) -> OverloadedError:
    return OverloadedError(reason, hint="try again in a moment")


def _fits(batch: _Batch, item: _Item, max_samples: int) -> bool:
    return (
        item.signature == batch.items[0].signature
        and batch.num_samples + item.num_samples <= max_samples
    )


def _count(arrays: Arrays) -> int:
    first = next(iter(arrays.values()))
    return int(first.shape[0]) if first.ndim else 1


def _signature(arrays: Arrays) -> tuple[object, ...]:
    return tuple((name, x.dtype.str, x.shape[1:]) for name, x in sorted(arrays.items()))


def _join(batch: Sequence[_Item]) -> Arrays:
    if len(batch) == 1:
        return batch[0].arrays
    names = batch[0].arrays
    return {name: np.concatenate([item.arrays[name] for item in batch]) for name in names}


def _split(outputs: Arrays, batch: Sequence[_Item]) -> list[Arrays]:
    if len(batch) == 1:
        return [outputs]
    total = sum(item.num_samples for item in batch)
    for name, x in outputs.items():
        if x.ndim == 0 or x.shape[0] != total:
            raise HeliostatError(
                f"output '{name}' has shape {list(x.shape)} for {total} samples",
                hint="the model does not keep samples apart",
            )
    parts: list[Arrays] = []
    start = 0
    for item in batch:
        end = start + item.num_samples
        parts.append({name: x[start:end] for name, x in outputs.items()})
        start = end
    return parts


def _fail(batch: Sequence[_Item], error: Exception) -> None:
    for item in batch:
        if not item.future.done():
            item.future.set_exception(error)
