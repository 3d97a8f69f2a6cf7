"""Drives batches from their lines to their files: one loop in each gateway replica.

All that it knows is in SQL and storage, so another replica, or the same one started again, goes on
where it was. Who begins a batch is decided by compare-and-set; its job has an id that every replica
gives it, and the job writes the same bytes however often it is started.

    driver = BatchDriver(parts, models, TextLimits())
    driver.step()        # every batch of this replica, one step further
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.batches import Batch, BatchStore, Status
from cluster.errors import ConflictError, GoneError, HeliostatError, NotFoundError
from cluster.storage import Storage
from cluster.tenant_files import TenantFiles
from serve_apps.gateway.batches.runner import JobRunner
from serve_apps.gateway.batches.work import BatchError, BatchOptions, BatchWork, batch_error
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.models import Models
from serve_apps.gateway.openai.schema import TextLimits

_logger = logging.getLogger(__name__)

_MAX_BROKEN = 30
_ENDS: dict[str, Status] = {"batch_expired": "expired", "insufficient_quota": "failed"}
"""How a batch ends that was ended early, by the reason."""


@dataclass(frozen=True)
class BatchParts:
    """What batches are made of."""

    files: TenantFiles
    store: BatchStore
    storage: Storage
    runner: JobRunner
    options: BatchOptions = field(default_factory=BatchOptions)


class BatchDriver:
    """The loop of one replica."""

    def __init__(
        self,
        parts: BatchParts,
        models: Models,
        limits: TextLimits,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.parts = parts
        self.models = models
        self._options = parts.options
        self._clock = clock
        self._work = BatchWork(parts.files, parts.storage, parts.options, limits)
        self._owner = uuid.uuid4().hex
        self._task: asyncio.Task[None] | None = None
        self._num_broken: Counter[str] = Counter()
        """Steps of a batch that nobody thought of, in a row."""
        self._is_wanted = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Begin the loop."""
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End the loop after its step, and let other replicas go on at once."""
        if self._task is None:
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._task = None
        with contextlib.suppress(HeliostatError):
            await asyncio.to_thread(self.parts.store.release, self._owner)

    def hurry(self) -> None:
        """There is something new to do."""
        self._is_wanted.set()

    async def _run(self) -> None:
        while True:
            step = asyncio.create_task(asyncio.to_thread(self.step))
            try:
                await asyncio.shield(step)
            except asyncio.CancelledError:
                await step
                raise
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_wanted.wait(), self._options.poll_s)
            self._is_wanted.clear()

    def step(self) -> None:
        """Take every batch that is this replica's one step further; never raises."""
        try:
            claimed = self.parts.store.claim(self._owner, lease_s=self._options.lease_s)
        except Exception as error:
            _logger.warning("batches wait, the database is away: %s", error)
            return
        for batch in claimed:
            try:
                self._advance(batch)
                self._num_broken.pop(batch.id, None)
            except ConflictError:
                continue  # a client or another replica was first; the next step sees what it did
            except HeliostatError as error:
                _logger.warning("batch %s waits: %s", batch.id, error)
            except Exception:
                _logger.exception("batch %s waits", batch.id)
                self._give_up_if_hopeless(batch)

    def _give_up_if_hopeless(self, batch: Batch) -> None:
        """A fault of ours would come again for ever."""
        self._num_broken[batch.id] += 1
        if self._num_broken[batch.id] < _MAX_BROKEN:
            return
        errors = [batch_error("server_error", "the batch cannot be worked on; ask the operator")]
        try:
            self._change(batch, status="failed", errors=errors)
            self.parts.runner.stop(batch.job_id)
            self._work.clear(batch)
            del self._num_broken[batch.id]
        except Exception as error:
            _logger.warning("batch %s cannot be given up now: %s", batch.id, error)

    def _advance(self, batch: Batch) -> None:
        match batch.status:
            case "validating":
                self._begin(batch)
            case "in_progress":
                self._follow(batch)
            case "cancelling":
                if self._has_stopped(batch):
                    self._finish(batch, "cancelled", "batch_cancelled")
            case "finalizing":
                self._finish(batch, _ENDS.get(batch.reason, "completed"), batch.reason)

    def _begin(self, batch: Batch) -> None:
        if self._is_late(batch):
            self._change(batch, status="finalizing", reason="batch_expired")
            return
        if "total" not in batch.counts:
            try:
                counts = self._work.translate(batch, self._find(batch.version))
            except BatchError as error:
                self._change(batch, status="failed", errors=error.errors)
                return
            except (NotFoundError, GoneError) as error:
                errors = [batch_error("model_not_found", error.message)]
                self._change(batch, status="failed", errors=errors)
                return
            batch = self._change(batch, counts=counts)
        if batch.counts["failed"] == batch.counts["total"]:
            self._change(batch, status="finalizing")
            return
        begun = self.parts.store.begin(batch, max_running=self._options.max_running)
        if begun is not None:
            _logger.info("batch %s begins with %s", batch.id, batch.version)
            self.parts.runner.start(begun.job_id, self._work.job(begun))

    def _find(self, version: str) -> ServedModel:
        """The model, from the thread of a step."""
        assert self._loop is not None, "batches are begun by a loop"
        return asyncio.run_coroutine_threadsafe(self.models.open(version), self._loop).result()

    def _follow(self, batch: Batch) -> None:
        if batch.reason:
            if self._has_stopped(batch):
                self._change(batch, status="finalizing")
            return
        if self._is_late(batch):
            self._follow(self._change(batch, reason="batch_expired"))
            return
        match self.parts.runner.state(batch.job_id):
            case "succeeded":
                reason = self._work.reason_of_gaps(batch)
                self._change(batch, status="finalizing", reason=reason)
            case "running":
                if (counts := self._work.counts(batch)) != batch.counts:
                    self._change(batch, counts=counts)
            case "unknown":
                self.parts.runner.start(batch.job_id, self._work.job(batch))
            case "failed" if batch.attempt + 1 < self._options.max_attempts:
                _logger.warning("job %s of a batch failed, and is tried again", batch.job_id)
                again = self._change(batch, attempt=batch.attempt + 1)
                self.parts.runner.start(again.job_id, self._work.job(again))
            case "failed":
                message = f"the job {batch.job_id} failed; ask the operator for its log"
                self._finish(batch, "failed", "", [batch_error("server_error", message)])

    def _has_stopped(self, batch: Batch) -> bool:
        """Whether no job of the batch is at work any more; asks it to stop."""
        if self.parts.runner.state(batch.job_id) != "running":
            return True
        self.parts.runner.stop(batch.job_id)
        return False

    def _finish(
        self, batch: Batch, status: Status, reason: str, errors: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Write the files of what was answered and of what was not, and end the batch."""
        output_id, error_id, counts = self._work.write_files(batch, reason)
        if reason == "insufficient_quota":
            errors = [batch_error(reason, "the tenant's budget of tokens for this month is spent")]
        self._change(
            batch,
            status=status,
            output_file_id=output_id,
            error_file_id=error_id,
            errors=list(errors),
            counts=counts,
        )
        _logger.info("batch %s is %s", batch.id, status)
        self._work.clear(batch)

    def _is_late(self, batch: Batch) -> bool:
        return self._clock() >= batch.moments["expires_at"]

    def _change(self, batch: Batch, **values: Any) -> Batch:
        return self.parts.store.change(batch, **values)
