"""Which requests may wait: tables for the policy, and whole loads on a simulated clock."""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from cluster.errors import OverloadedError
from serve_apps.gateway.admission import AdmissionPolicy, QueueState, ServiceTimes
from serve_apps.gateway.batcher import Arrays, Batcher, BatchLimits

CALM = QueueState(
    num_queued=3,
    max_queued=100,
    wait_s=0.02,
    max_wait_s=0.2,
    excess_s=0.05,
    burst_s=0.1,
    steady_wait_s=0.03,
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"num_queued": 99}, ""),
        ({"num_queued": 100}, "full, with 100 waiting"),
        ({"wait_s": 0.19}, ""),
        ({"wait_s": 0.21}, "would wait 0.21 s for this model, and 0.2 s is the most"),
        ({"excess_s": 0.11}, ""),
        ({"excess_s": 0.11, "wait_s": 0.031}, "more is asked of this model than it can answer"),
        ({"excess_s": 0.09, "wait_s": 0.031}, ""),
    ],
)
def test_a_request_is_refused_for_the_reason_that_is_given(
    change: dict[str, Any], reason: str
) -> None:
    decision = AdmissionPolicy().decide(replace(CALM, **change))
    assert decision.admits == (not reason)
    assert reason in decision.reason


def observed(max_batch_size: int, *calls: tuple[int, float]) -> ServiceTimes:
    times = ServiceTimes(max_batch_size)
    for num_samples, seconds in calls:
        times.observe(num_samples, seconds)
    return times


def test_calls_of_two_sizes_foretell_the_others() -> None:
    times = observed(64, (1, 0.011), (11, 0.021), (1, 0.011))
    assert times.full_call_s == pytest.approx(0.074, rel=0.01)
    assert times.sample_s == pytest.approx(0.074 / 64, rel=0.01)
    assert 30 < times.worthwhile_samples < 40


def test_a_call_is_worthwhile_as_soon_as_larger_ones_gain_little() -> None:
    assert observed(64, (1, 0.01), (64, 0.64)).worthwhile_samples == 1
    assert observed(64, (1, 0.01), (64, 0.01)).worthwhile_samples == pytest.approx(57.6)


def test_a_hiccup_is_not_taken_for_the_models_speed() -> None:
    times = observed(1, *[(1, 0.01)] * 20, (1, 60.0))
    assert times.full_call_s < 0.015
    late = observed(1, (1, 60.0), *[(1, 0.01)] * 30)
    assert late.full_call_s < 0.02


class _NoWaiting(selectors.DefaultSelector):
    """A selector that never waits, and tells how long it would have."""

    waited_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "nothing will ever happen any more"
        self.waited_s += max(0.0, timeout)
        return super().select(0)


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next thing that happens."""

    def __init__(self) -> None:
        self._clock = _NoWaiting()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.waited_s


def simulated(scenario: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        runner.run(scenario)


@dataclass
class Load:
    """A model of which a call takes `fixed_s + sample_s * samples`, with some noise."""

    fixed_s: float
    sample_s: float
    max_batch_size: int = 64
    num_replicas: int = 1
    random: random.Random = field(default_factory=lambda: random.Random(7))
    batcher: Batcher = field(init=False)
    waits_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.batcher = Batcher(
            self._call,
            BatchLimits(max_batch_size=self.max_batch_size, max_in_flight=self.num_replicas),
        )

    @property
    def capacity(self) -> float:
        """Requests a second."""
        full_s = self.fixed_s + self.sample_s * self.max_batch_size
        return self.num_replicas * self.max_batch_size / full_s

    async def _call(self, arrays: Arrays) -> Arrays:
        seconds = self.fixed_s + self.sample_s * len(arrays["x"])
        await asyncio.sleep(seconds * self.random.lognormvariate(0, 0.1))
        return {"y": arrays["x"]}

    async def ask(self) -> None:
        now_s = asyncio.get_running_loop().time
        begun_s = now_s()
        try:
            await self.batcher.submit({"x": np.zeros((1, 1), np.float32)})
        except OverloadedError:
            self.refused_s.append(now_s() - begun_s)
        else:
            self.waits_s.append(now_s() - begun_s)

    async def offer(self, share: float, num_requests: int) -> float:
        """Poisson arrivals at a share of the capacity; the 99th percentile of the answers."""
        self.waits_s, self.refused_s = [], []
        asking = []
        for _ in range(num_requests):
            asking.append(asyncio.create_task(self.ask()))
            await asyncio.sleep(self.random.expovariate(share * self.capacity))
        await asyncio.gather(*asking)
        return float(np.percentile(self.waits_s, 99))


@pytest.mark.parametrize(
    "load",
    [
        Load(0.01, 0),
        Load(0.01, 0, num_replicas=4),
        Load(0, 0.005),
        Load(0, 0.02),
        Load(0.002, 0.005),
        Load(0.002, 0.005, num_replicas=2),
        Load(0.01, 0.001),
        Load(0.001, 0.0003),
        Load(0.01, 0, max_batch_size=1),
        Load(0.05, 0, max_batch_size=1),
        Load(0.4, 0.04),
    ],
    ids=lambda load: f"{load.fixed_s}+{load.sample_s}n, {load.max_batch_size}x{load.num_replicas}",
)
def test_at_twice_the_capacity_those_let_in_wait_little_longer_than_at_four_fifths(
    load: Load,
) -> None:
    async def scenario() -> None:
        normal_s = await load.offer(0.8, 3000)
        assert len(load.refused_s) <= 9
        # At first it might be a burst.
        full_call_s = load.max_batch_size * load.num_replicas / load.capacity
        burst_s = max(0.1, (1.25 if load.max_batch_size > 1 else 19) * full_call_s)
        await load.offer(2, round(4 * burst_s * load.capacity))
        assert max(load.refused_s) <= 2 * burst_s
        begun_s = asyncio.get_running_loop().time()
        overloaded_s = await load.offer(2, 6000)
        seconds = asyncio.get_running_loop().time() - begun_s
        assert overloaded_s <= 3 * normal_s
        # The model is kept busy, and those who are refused are refused at once.
        assert len(load.waits_s) >= 0.75 * load.capacity * seconds
        assert np.percentile(load.refused_s, 95) == 0
        # Once it is over, all are let in again.
        await asyncio.sleep(1)
        await load.offer(0.8, 500)
        assert len(load.refused_s) <= 3

    simulated(scenario())


@pytest.mark.parametrize("sample_s", [0.0003, 0.01, 0.05])
def test_clients_that_wait_for_their_answers_are_not_refused(sample_s: float) -> None:
    """64 connections keep a queue that stands for ever, and ask for no more than they get."""
    load = Load(0.002, sample_s)

    async def client() -> None:
        for _ in range(30):
            await load.ask()

    async def scenario() -> None:
        await asyncio.gather(*(client() for _ in range(64)))
        assert len(load.waits_s) == 64 * 30

    simulated(scenario())


def test_a_burst_at_an_idle_model_is_let_in() -> None:
    load = Load(0.001, 0.0003)

    async def scenario() -> None:
        await load.offer(0.5, 500)
        load.waits_s = []
        await asyncio.gather(*(load.ask() for _ in range(200)))
        assert len(load.waits_s) == 200

    simulated(scenario())
