"""Observations about releases under way, added up until they are handed to the database.

Sums, not rows: what was counted within about a second is one delta for each arm and metric. While
the database is away they only grow, and are handed in when it is back.

    evidence = Evidence(store.add_evidence)
    await evidence.start()
    evidence.observe(release, "candidate", "errors", 1.0)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

from cluster.errors import first_line
from cluster.release_evidence import Arm, EvidenceDelta, Metric
from serve_apps.gateway.releases.release import Release
from serve_apps.gateway.telemetry.instruments import Instruments, ModelLabel

logger = logging.getLogger(__name__)

_PERIOD_S = 0.8
_MAX_SUMS = 2_000
"""Of releases that came and went while the database was away."""

AddEvidence = Callable[[Sequence[EvidenceDelta]], None]
"""Adds to the sums in the database; blocking."""

_Key = tuple[str, int, str, int, Arm, Metric]


class Evidence:
    """What one gateway replica has seen. For one event loop."""

    def __init__(self, add: AddEvidence, instruments: Instruments | None = None) -> None:
        self._add = add
        self._instruments = instruments or Instruments()
        self._sums: dict[_Key, tuple[int, float]] = {}
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._is_failing = False

    def observe(self, release: Release, arm: Arm, metric: Metric, value: float) -> None:
        """Count one observation, from 0 (good) to 1 (bad)."""
        # A rounding error beyond them would spoil the whole sum.
        value = min(1.0, max(0.0, value))
        key = (release.id, release.step, release.name, release.candidate, arm, metric)
        self._put(key, 1, value)
        self._instruments.observed(_label(release), arm, metric, value)

    def count_mirrored(self, release: Release, outcome: str) -> None:
        """Not evidence, but worth seeing: what became of a mirrored request."""
        self._instruments.mirrored(_label(release), outcome)

    def count_failed_over(self, release: Release) -> None:
        """Likewise: a request that the candidate failed and the champion answered."""
        self._instruments.failed_over.labels(*_label(release)).inc()

    async def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Hand in what is left."""
        self._stopping.set()
        if self._task is not None:
            await self._task
            self._task = None
        await self.flush()

    async def flush(self) -> None:
        """Hand in what was counted, in a thread; what is refused is kept."""
        if not self._sums:
            return
        counted, self._sums = self._sums, {}
        deltas = [EvidenceDelta(*key, num, total) for key, (num, total) in counted.items()]
        try:
            await asyncio.to_thread(self._add, deltas)
            self._is_failing = False
        # Whatever the database raises: it is asked again.
        except Exception as error:
            if not self._is_failing:
                logger.warning("evidence waits for the database: %s", first_line(error))
            self._is_failing = True
            for key, (num, total) in counted.items():
                self._put(key, num, total)

    def _put(self, key: _Key, num: int, total: float) -> None:
        if key not in self._sums and len(self._sums) >= _MAX_SUMS:
            return
        num_before, total_before = self._sums.get(key, (0, 0.0))
        self._sums[key] = num_before + num, total_before + total

    async def _run(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PERIOD_S):
                    await self._stopping.wait()
            await self.flush()


def _label(release: Release) -> ModelLabel:
    return ModelLabel(release.name, str(release.candidate))
