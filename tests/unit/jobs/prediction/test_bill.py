"""What a job may spend is what nobody else has spent or holds, and is held until it is settled."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cluster.database import open_database
from cluster.ledger import Entry, Ledger
from cluster.security.api_keys import ApiKeys
from cluster.security.leases import LeaseStore
from cluster.security.limits import HOLDING_S, Ask, Lease
from jobs.prediction.bill import TenantBudget

LIMIT = 100


@pytest.fixture
def engine(tmp_path: Path) -> sa.Engine:
    engine = open_database(f"sqlite:///{tmp_path / 'heliostat.db'}")
    ApiKeys(engine).set_tenant("acme", {"monthly_tokens": LIMIT})
    return engine


def left(store: LeaseStore) -> int:
    return store.exchange("live", (), {"acme": Ask()})["acme"].left["month_tokens"]


def entry(key: str, tokens: int) -> Entry:
    return Entry(key, "acme", "prediction", "m", "key_1", completion_tokens=tokens)


def test_rows_have_room_in_their_order_until_one_has_none(engine: sa.Engine) -> None:
    store = LeaseStore(engine)
    budget = TenantBudget(store.exchange, "acme", patience_s=0)
    with budget.reserved([40, 40, 40]) as num_rows:
        assert num_rows == 2
        assert left(store) == 20
        budget.spend(50)
    with budget.reserved([40, 40]) as num_rows:
        assert num_rows == 1
        assert left(store) == 10
        budget.spend(10)
    budget.settle(entry("one", 60))
    assert left(store) == 40
    with budget.reserved([41, 1]) as num_rows:
        assert num_rows == 0
    with budget.reserved([1]) as num_rows:
        assert num_rows == 0


def test_what_others_hold_is_waited_for(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LeaseStore(engine)
    holding: dict[str, Ask] = {"acme": Ask(needs={"month_tokens": 80})}
    store.exchange("live", (), holding)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        store.exchange("live", (), {"acme": Ask()})

    monkeypatch.setattr("jobs.prediction.bill.time.sleep", sleep)
    with TenantBudget(store.exchange, "acme").reserved([50]) as num_rows:
        assert num_rows == 1
    assert waits == [1.0]


def test_what_is_reserved_outlasts_long_work(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, num_asked = [time.time()], 0
    store = LeaseStore(engine, clock=lambda: clock[0])

    def exchange(
        holder: str, entries: Sequence[Entry], asks: Mapping[str, Ask]
    ) -> dict[str, Lease]:
        nonlocal num_asked
        found = store.exchange(holder, entries, asks)
        num_asked += 1
        return found

    monkeypatch.setattr("jobs.prediction.bill._RENEW_S", 0.01)
    with TenantBudget(exchange, "acme").reserved([80]):
        for _ in range(3):
            clock[0] += HOLDING_S * 0.9
            before = num_asked
            deadline = time.monotonic() + 10
            while num_asked < before + 2:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert left(store) == 20
    clock[0] += HOLDING_S * 1.1
    assert left(store) == 100, "a job that was killed holds nothing"


def test_jobs_that_race_never_spend_more_than_there_is(engine: sa.Engine) -> None:
    ApiKeys(engine).set_tenant("acme", {"monthly_tokens": 1000})
    store = LeaseStore(engine)

    def job(name: str) -> None:
        draw, budget = random.Random(name), TenantBudget(store.exchange, "acme", patience_s=0)
        for number in range(1000):
            with budget.reserved([20] * 3) as num_rows:
                used = sum(draw.randint(1, 20) for _ in range(num_rows))
                budget.spend(used)
            budget.settle(entry(f"{name}/{number}", used))
            if not num_rows:
                return

    threads = [threading.Thread(target=job, args=(f"job-{n}",)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (total,) = Ledger(engine).totals()
    assert 900 < total.completion_tokens <= 1000


def test_a_tenant_without_a_limit_has_room_for_all(engine: sa.Engine) -> None:
    for tenant in ("nobody", "free"):
        if tenant == "free":
            ApiKeys(engine).set_tenant("free", {})
        budget: Any = TenantBudget(LeaseStore(engine).exchange, tenant)
        with budget.reserved([10**9, 10**9]) as num_rows:
            assert num_rows == 2


def test_nobody_waits_for_what_the_job_has_spent_itself(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("jobs.prediction.bill.time.sleep")
    budget = TenantBudget(LeaseStore(engine).exchange, "acme")
    with budget.reserved([60]):
        budget.spend(60)
    with budget.reserved([50]) as num_rows:
        assert num_rows == 0
