"""Group commit: whatever queued up while a call was in flight goes to the model as one array.

No timer, so an idle model answers at once; under load batches grow by themselves. Knows arrays and
a function to call; nothing of HTTP, processing or Ray.

    batcher = Batcher(call, BatchLimits(max_batch_size=64))
    outputs = await batcher.submit({"pixels": pixels_NF})
"""

from __future__ import annotations

import asyncio
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
    timeout_s: float = 30.0
    can_join: bool = True
    """Whether the model takes samples of several requests in one call."""


@dataclass(eq=False)
class _Item:
    arrays: Arrays
    num_samples: int
    signature: tuple[object, ...]
    """Only requests with the same names, types and sample shapes can be joined."""
    future: asyncio.Future[Arrays]
    queued_s: float = field(default_factory=time.perf_counter)
    context: Context = field(default_factory=copy_context)


class Batcher:
    """The queue to one model version."""

    def __init__(
        self, call: Call, limits: BatchLimits | None = None, on_batch: OnBatch | None = None
    ) -> None:
        self._call = call
        self._on_batch = on_batch
        self.limits = limits or BatchLimits()
        self._queue: deque[_Item] = deque()
        self._in_flight: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    async def submit(self, arrays: Arrays) -> Arrays:
        """The model's outputs for these inputs, which must have been validated.

        Raises:
            OverloadedError: the queue is full.
            UpstreamTimeoutError, UpstreamFailedError: no replica answered.
        """
        if self._closed:
            raise UpstreamFailedError(
                "this model version was just taken down", hint="ask for another version"
            )
        if len(self._queue) >= self.limits.max_queued:
            raise OverloadedError(
                f"{len(self._queue)} requests are waiting for this model, the most allowed",
                hint="try again in a moment",
            )
        future: asyncio.Future[Arrays] = asyncio.get_running_loop().create_future()
        item = _Item(arrays, _count(arrays), _signature(arrays), future)
        self._queue.append(item)
        self._pump()
        try:
            return await future
        except asyncio.CancelledError:
            if item in self._queue:
                self._queue.remove(item)
            raise

    async def close(self, patience_s: float) -> None:
        """Refuse what comes; what waits is still asked for, for at most `patience_s`.

        Returns when all is answered; calls in flight at that moment still end.
        """
        self._closed = True
        deadline_s = time.monotonic() + patience_s
        while self._queue and self._in_flight and (left_s := deadline_s - time.monotonic()) > 0:
            await asyncio.wait(self._in_flight, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            # Landing is a callback of the task that was waited for.
            await asyncio.sleep(0)
        error = UpstreamFailedError("this model version was just taken down")
        while self._queue:
            _fail([self._queue.popleft()], error)

    def _pump(self) -> None:
        while self._queue and len(self._in_flight) < self.limits.max_in_flight:
            batch = self._take_batch()
            if not batch:
                continue
            task = asyncio.create_task(self._run(batch), context=batch[0].context)
            self._in_flight.add(task)
            task.add_done_callback(self._landed)

    def _landed(self, task: asyncio.Task[None]) -> None:
        self._in_flight.discard(task)
        self._pump()

    def _take_batch(self) -> list[_Item]:
        """The oldest requests that fit together, leaving out those whose client has gone."""
        batch: list[_Item] = []
        passed_over: list[_Item] = []
        num_samples = 0
        while self._queue:
            item = self._queue.popleft()
            if item.future.done():
                continue
            if batch and not self._fits(batch[0], item, num_samples):
                passed_over.append(item)
                if item.signature == batch[0].signature:
                    break  # never overtake a request of the same kind
                continue
            batch.append(item)
            num_samples += item.num_samples
            if not self.limits.can_join or num_samples >= self.limits.max_batch_size:
                break
        self._queue.extendleft(reversed(passed_over))
        return batch

    def _fits(self, first: _Item, item: _Item, num_samples: int) -> bool:
        room = self.limits.max_batch_size - num_samples
        return item.signature == first.signature and item.num_samples <= room

    async def _run(self, batch: Sequence[_Item]) -> None:
        """Answer a batch; if it fails, find the one at fault by asking for each alone."""
        if self._on_batch is not None:
            now_s = time.perf_counter()
            self._on_batch(
                [now_s - item.queued_s for item in batch],
                sum(item.num_samples for item in batch),
                [item.context for item in batch],
            )
        try:
            await self._answer(batch)
        except UpstreamTimeoutError as error:
            _fail(batch, error)
        except Exception as error:
            if len(batch) == 1 and not isinstance(error, UpstreamFailedError):
                _fail(batch, error)
                return
            logger.info("batch of %d failed, retrying one by one: %s", len(batch), error)
            for item in batch:
                await self._retry_alone(item)

    async def _retry_alone(self, item: _Item) -> None:
        try:
            await self._answer([item])
        except Exception as error:
            _fail([item], error)

    async def _answer(self, batch: Sequence[_Item]) -> None:
        timeout_s = self.limits.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                outputs = await self._call(_join(batch))
        except TimeoutError:
            raise UpstreamTimeoutError(
                f"the model did not answer within {timeout_s:g} s", hint="try again later"
            ) from None
        for item, part in zip(batch, _split(outputs, batch), strict=True):
            if not item.future.done():
                item.future.set_result(part)


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
