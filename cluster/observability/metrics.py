"""Hands what a process has counted to Ray's metrics agent, which Prometheus scrapes on each node.

A process counts with `prometheus_client`; from time to time every value is copied into a gauge of
Ray's. Gauges for counters and histograms too: Ray's own histogram is replayed by its agent one
observation after the other, at the middle of its bucket, which costs as much as the requests and
falsifies the sum; and its counters outlive the replica that counted.

    registry = CollectorRegistry()
    Counter("heliostat_shed", "Requests refused", ["reason"], registry=registry)
    MetricsExport(registry).flush()
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry

from cluster.errors import first_line

logger = logging.getLogger(__name__)

FLUSH_PERIOD_S = 5.0
"""Half the time in which Ray's processes report to its agent."""


class GaugeLike(Protocol):
    """What is used of `ray.util.metrics.Gauge`."""

    def set(self, value: float, tags: dict[str, str]) -> None: ...


MakeGauge = Callable[[str, str, tuple[str, ...]], GaugeLike]


class MetricsExport:
    """Copies a registry into gauges; Ray adds its prefix `ray_` and says which worker it was."""

    def __init__(self, registry: CollectorRegistry, make_gauge: MakeGauge | None = None) -> None:
        self._registry = registry
        self._make_gauge = make_gauge or _ray_gauge
        self._gauges: dict[str, GaugeLike] = {}

    def flush(self) -> None:
        """Copy every value; what is no longer set disappears from the agent by itself."""
        for family in self._registry.collect():
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                gauge = self._gauge(sample.name, family.documentation, tuple(sample.labels))
                gauge.set(sample.value, sample.labels)

    def _gauge(self, name: str, documentation: str, labels: tuple[str, ...]) -> GaugeLike:
        gauge = self._gauges.get(name)
        if gauge is None:
            gauge = self._gauges[name] = self._make_gauge(name, documentation, labels)
        return gauge


async def flush_for_ever(export: MetricsExport, also: Sequence[Callable[[], None]] = ()) -> None:
    """Flush periodically, off the loop, each time after calling what `also` holds."""
    failed: set[Callable[[], None]] = set()
    while True:
        for action in (*also, export.flush):
            try:
                await asyncio.to_thread(action)
                failed.discard(action)
            # Neither a database that is away nor Ray's agent may end the others' metrics.
            except Exception as error:
                if action not in failed:
                    logger.warning("metrics are stale: %s", first_line(error))
                failed.add(action)
        await asyncio.sleep(FLUSH_PERIOD_S)


def _ray_gauge(name: str, documentation: str, labels: tuple[str, ...]) -> GaugeLike:
    # Not in a process that only counts.
    from ray.util.metrics import Gauge

    gauge: GaugeLike = Gauge(name, documentation, labels)
    return gauge
