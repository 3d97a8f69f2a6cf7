"""Leases and the ledger are one transaction, whatever database they are in."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from cluster.database import budgets, open_database
from cluster.ledger import Entry, Ledger
from cluster.security.api_keys import ApiKeys
from cluster.security.leases import LeaseStore
from cluster.security.limits import Ask

NOW_S = datetime(2026, 5, 15, tzinfo=UTC).timestamp()


@pytest.fixture
def engine(tmp_path: Path) -> sa.Engine:
    return open_database(f"sqlite:///{tmp_path / 'heliostat.db'}")


def completion(key: str, tokens: int, *, at: str = "2026-05-15T00:00:00.000+00:00") -> Entry:
    return Entry(key, tenant="acme", kind="completion", model="lm", source="key_1",
                 completion_tokens=tokens, num_requests=1, at=at)  # fmt: skip


def test_replicas_that_race_never_get_more_than_there_is(engine: sa.Engine) -> None:
    ApiKeys(engine).set_tenant("acme", {"requests_per_minute": 100})
    store = LeaseStore(engine, clock=lambda: NOW_S)
    granted: list[int] = []

    def replica(name: str) -> None:
        for _ in range(5):
            asks = {"acme": Ask(needs={"requests": 1}, wants={"requests": 7})}
            granted.append(store.exchange(name, (), asks)["acme"].granted["requests"])

    threads = [threading.Thread(target=replica, args=(f"replica-{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(granted) == 20
    assert sum(granted) == 100


def test_a_months_tokens_follow_the_ledger(engine: sa.Engine) -> None:
    ledger, clock = Ledger(engine), [NOW_S]
    store = LeaseStore(engine, clock=lambda: clock[0])
    ledger.record([completion("before", 10), completion("april", 500, at="2026-04-30T23:59:59")])
    ApiKeys(engine).set_tenant("acme", {"monthly_tokens": 100})

    def left() -> int:
        ask = Ask(needs={"month_tokens": 1})
        return store.exchange("a", (), {"acme": ask})["acme"].left["month_tokens"] + 1

    assert left() == 90  # what was used before there was a limit counts
    store.exchange("a", [completion("one", 20), completion("one", 20)], {})
    store.exchange("a", [completion("one", 20)], {})
    assert left() == 70  # once, however often it is handed in
    ledger.record([completion("elsewhere", 5)])
    store.exchange("a", [completion("late", 7, at="2026-04-30T23:59:59")], {})
    assert left() == 65
    clock[0] = datetime(2026, 6, 1, tzinfo=UTC).timestamp()
    assert left() == 100
    store.exchange("a", [completion("june", 30, at="2026-06-01T00:00:01")], {})
    assert left() == 70


def test_unlimited_tenants_leave_no_budget_and_unknown_ones_no_answer(engine: sa.Engine) -> None:
    store = LeaseStore(engine)
    assert store.exchange("a", [completion("one", 20)], {"nobody": Ask()}) == {}
    with engine.connect() as connection:
        assert connection.execute(sa.select(budgets)).all() == []
    (total,) = Ledger(engine).totals()
    assert (total.completion_tokens, total.num_requests) == (20, 1)
