"""Limits that several gateway replicas share through one database, by simulated clocks."""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cluster.database import open_database
from cluster.errors import InputError, OverloadedError, QuotaExceededError, RateLimitedError
from cluster.security.api_keys import ApiKeys, Identity
from cluster.security.leases import LeaseStore
from cluster.security.limits import HOLDING_S, LEASE_S, SLOT_S, WINDOW_S, Rate, TenantLimits
from serve_apps.gateway.access import accounts
from serve_apps.gateway.access.accounts import Accounts
from serve_apps.gateway.access.callers import Caller
from serve_apps.gateway.routing_table import ServedVersion

START_S = time.time()
"""The ledger's months are of this time too."""
NUM_REPLICAS = 4


class Fleet:
    """Gateway replicas on one database, one after the other at each moment of one clock."""

    def __init__(self, engine: sa.Engine, limits: TenantLimits) -> None:
        ApiKeys(engine).set_tenant("acme", vars(limits))
        self.engine = engine
        self.now_s = START_S
        self.is_down = False
        self.num_exchanges = 0
        self.identity = Identity("key_1", "acme", frozenset({"infer"}), limits=limits)
        store = LeaseStore(engine, clock=lambda: self.now_s)

        def exchange(*arguments: Any) -> Any:
            self.num_exchanges += 1
            if self.is_down:
                raise ConnectionError("the database is away")
            return store.exchange(*arguments)

        self.replicas = [Accounts(exchange, clock=lambda: self.now_s) for _ in range(NUM_REPLICAS)]

    async def run(self, replica: Accounts, work: Any) -> Any:
        """The result of something that may wait for an exchange."""
        task = asyncio.ensure_future(work)
        while not task.done():
            await asyncio.sleep(0)
            if replica._wanted.is_set():
                await replica.exchange(flushes=False)
        return await task

    async def take(self, replica: Accounts, rate: Rate = "requests", amount: int = 1) -> bool:
        try:
            await self.run(replica, replica.take_rate(replica.of(self.identity), rate, amount))
        except RateLimitedError:
            return False
        return True

    async def tick(self) -> None:
        for replica in self.replicas:
            await replica.exchange(flushes=True)

    def caller(self, replica: Accounts) -> Caller:
        return Caller(self.identity, replica)


@pytest.fixture
def make_fleet(tmp_path: Path, empty_database: Path) -> Iterator[Callable[..., Fleet]]:
    shutil.copy(empty_database, tmp_path / "fleet.db")
    engine = open_database(f"sqlite:///{tmp_path / 'fleet.db'}")
    yield lambda **limits: Fleet(engine, TenantLimits(**limits))
    engine.dispose()


def most_in_a_minute(times: list[float]) -> int:
    return max(
        sum(1 for time_s in times if start_s <= time_s < start_s + WINDOW_S) for start_s in times
    )


EVEN = [1.0] * NUM_REPLICAS


@pytest.mark.parametrize(
    ("limit", "weights", "asked_per_s"),
    [
        (60, EVEN, 8),
        (600, EVEN, 40),
        (600, [1, 0, 0, 0], 40),
        (600, [10, 1, 1, 0], 25),
    ],
)
async def test_no_minute_holds_more_than_the_limit_and_little_less(
    make_fleet: Callable[..., Fleet], limit: int, weights: list[float], asked_per_s: int
) -> None:
    fleet, chance = make_fleet(requests_per_minute=limit), random.Random(1)
    times: list[float] = []
    for step in range(190):
        fleet.now_s = START_S + step
        for replica in chance.choices(fleet.replicas, weights, k=asked_per_s):
            if await fleet.take(replica):
                times.append(fleet.now_s)
        fleet.now_s += 0.8
        await fleet.tick()
    assert most_in_a_minute(times) <= limit
    # A slot counts for up to so long, which is what is lost.
    longest_s = WINDOW_S + LEASE_S + SLOT_S
    assert len(times) >= 0.95 * 3 * limit * WINDOW_S / longest_s


async def test_a_tenant_within_its_limit_is_never_refused(
    make_fleet: Callable[..., Fleet],
) -> None:
    fleet, chance = make_fleet(requests_per_minute=300), random.Random(2)
    for step in range(130):
        fleet.now_s = START_S + step
        for replica in chance.choices(fleet.replicas, EVEN, k=4):
            assert await fleet.take(replica)
        fleet.now_s += 0.8
        await fleet.tick()


async def test_a_busy_tenant_asks_the_database_about_once_a_second(
    make_fleet: Callable[..., Fleet],
) -> None:
    fleet = make_fleet(requests_per_minute=600_000)
    replica = fleet.replicas[0]
    for step in range(10):
        fleet.now_s = START_S + 0.8 * step
        for _ in range(2000):
            assert await fleet.take(replica)
        await replica.exchange(flushes=True)
    assert fleet.num_exchanges <= 13


async def test_who_is_refused_is_refused_without_asking_the_database(
    make_fleet: Callable[..., Fleet],
) -> None:
    fleet = make_fleet(requests_per_minute=2)
    replica = fleet.replicas[0]
    assert [await fleet.take(replica) for _ in range(3)] == [True, True, False]
    asked = fleet.num_exchanges
    assert not any([await fleet.take(replica) for _ in range(100)])
    assert fleet.num_exchanges == asked
    with pytest.raises(RateLimitedError, match="2 requests per minute") as refused:
        await replica.take_rate(replica.of(fleet.identity), "requests", 1)
    assert WINDOW_S <= refused.value.retry_after_s <= WINDOW_S + LEASE_S + SLOT_S
    fleet.now_s += refused.value.retry_after_s
    assert await fleet.take(replica)


async def test_streams_are_counted_over_all_replicas(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(max_streams=3)
    first, second = (fleet.caller(replica) for replica in fleet.replicas[:2])
    open_streams = [
        await fleet.run(fleet.replicas[0], first.reserve(10)),
        await fleet.run(fleet.replicas[0], first.reserve(10)),
        await fleet.run(fleet.replicas[1], second.reserve(10)),
    ]
    for replica, caller in ((fleet.replicas[0], first), (fleet.replicas[1], second)):
        with pytest.raises(RateLimitedError, match="3 streams open"):
            await fleet.run(replica, caller.reserve(10))
    first.settle(open_streams[0], 0)
    await fleet.tick()
    fleet.now_s += 1
    await fleet.run(fleet.replicas[1], second.reserve(10))


async def test_what_a_dead_replica_held_comes_back(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(max_streams=1, monthly_tokens=100)
    dead, alive = fleet.replicas[:2]
    await fleet.run(dead, fleet.caller(dead).reserve(100))
    with pytest.raises(RateLimitedError):
        await fleet.run(alive, fleet.caller(alive).reserve(100))
    fleet.now_s += HOLDING_S
    reservation = await fleet.run(alive, fleet.caller(alive).reserve(100))
    fleet.caller(alive).settle(reservation, 0)


async def test_tokens_that_were_not_used_are_given_back(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(tokens_per_minute=100)
    first, second = fleet.replicas[:2]
    reservation = await fleet.run(first, fleet.caller(first).reserve(90))
    assert not await fleet.take(second, "tokens", 20)
    fleet.now_s += 5
    fleet.caller(first).settle(reservation, 30)
    await fleet.tick()
    assert await fleet.take(second, "tokens", 60)
    assert not await fleet.take(first, "tokens", 20)


async def test_a_month_that_is_spent_says_until_when(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(monthly_tokens=50)
    replica = fleet.replicas[0]
    caller = fleet.caller(replica)
    caller.settle(await fleet.run(replica, caller.reserve(50)), 50)
    caller.answered("completion", ServedVersion("lm", 1, "", "lm.v1"), completion_tokens=50)
    with pytest.raises(InputError, match="make 51 tokens, tenant 'acme' has 50 tokens this month"):
        await fleet.run(replica, caller.reserve(51))
    await fleet.tick()
    with pytest.raises(QuotaExceededError, match="used or reserved its 50 tokens") as refused:
        await fleet.run(replica, caller.reserve(1))
    assert refused.value.retry_after_s > HOLDING_S


async def test_a_limit_that_was_lifted_or_raised_is_followed(
    make_fleet: Callable[..., Fleet],
) -> None:
    fleet = make_fleet(requests_per_minute=1)
    replica = fleet.replicas[0]
    assert [await fleet.take(replica) for _ in range(2)] == [True, False]
    ApiKeys(fleet.engine).set_tenant("acme", {"requests_per_minute": None})
    fleet.now_s += 1
    assert await fleet.take(replica)


async def test_nobody_waits_for_ever_for_a_silent_database(
    make_fleet: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts, "_PATIENCE_S", 0.01)
    fleet = make_fleet(requests_per_minute=600)
    replica = fleet.replicas[0]
    with pytest.raises(OverloadedError, match="cannot be read now"):
        await replica.take_rate(replica.of(fleet.identity), "requests", 1)
    assert replica.of(fleet.identity).is_idle


async def test_without_its_database_only_who_is_limited_is_turned_away(
    make_fleet: Callable[..., Fleet], caplog: pytest.LogCaptureFixture
) -> None:
    fleet = make_fleet(requests_per_minute=600)
    fleet.is_down = True
    replica = fleet.replicas[0]
    for _ in range(2):
        with pytest.raises(OverloadedError, match="cannot be read now"):
            await fleet.take(replica)
    assert caplog.text.count("the database is away") == 1
    fleet.is_down = False
    assert await fleet.take(replica)
    await fleet.tick()
    fleet.now_s += 2
    await fleet.tick()
    assert replica._accounts == {}  # nothing is remembered of a tenant that does nothing
