"""Counters on their way to Ray's agent."""

from __future__ import annotations

import asyncio
import logging

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram

from cluster.observability import metrics
from cluster.observability.metrics import MetricsExport, flush_for_ever


class FakeGauges:
    """Stands in for `ray.util.metrics.Gauge`; remembers the last value of each series."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self.made: list[tuple[str, tuple[str, ...]]] = []

    def make(self, name: str, _documentation: str, labels: tuple[str, ...]) -> FakeGauge:
        self.made.append((name, labels))
        return FakeGauge(self, name)


class FakeGauge:
    def __init__(self, gauges: FakeGauges, name: str) -> None:
        self._gauges, self._name = gauges, name

    def set(self, value: float, tags: dict[str, str]) -> None:
        self._gauges.values[self._name, frozenset(tags.items())] = value


def test_every_value_is_copied_under_its_own_name() -> None:
    registry, gauges = CollectorRegistry(), FakeGauges()
    shed = Counter("heliostat_shed_total", "Refused", ["reason"], registry=registry)
    wait = Histogram("heliostat_wait_seconds", "Wait", buckets=[1, 2], registry=registry)
    export = MetricsExport(registry, gauges.make)
    for _ in range(2):
        shed.labels("overloaded").inc()
        wait.observe(1.5)
        export.flush()
    bucket = "heliostat_wait_seconds_bucket"
    assert gauges.values == {
        ("heliostat_shed_total", frozenset({("reason", "overloaded")})): 2,
        ("heliostat_wait_seconds_count", frozenset()): 2,
        ("heliostat_wait_seconds_sum", frozenset()): 3.0,
        (bucket, frozenset({("le", "1.0")})): 0,
        (bucket, frozenset({("le", "2.0")})): 2,
        (bucket, frozenset({("le", "+Inf")})): 2,
    }
    assert gauges.made.count((bucket, ("le",))) == 1


async def test_what_fails_is_told_once_and_stops_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "FLUSH_PERIOD_S", 0.001)
    registry, gauges = CollectorRegistry(), FakeGauges()
    counter = Counter("heliostat_x_total", "X", registry=registry)
    num_failures = 0

    def fail() -> None:
        nonlocal num_failures
        num_failures += 1
        raise OSError("database is away")

    with caplog.at_level(logging.WARNING):
        task = asyncio.create_task(flush_for_ever(MetricsExport(registry, gauges.make), [fail]))
        counter.inc()
        while num_failures < 3 or 1 not in gauges.values.values():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert [record.getMessage() for record in caplog.records] == [
        "metrics are stale: database is away"
    ]
