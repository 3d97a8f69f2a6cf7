"""Of several controllers one acts; what another had in hand when it lost the lease is lost."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy.engine import Engine

from cluster.controller_lease import ControllerLease
from cluster.database import begin_alone, open_database
from cluster.errors import ConflictError
from tests.release_world import Clock


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(f"sqlite:///{tmp_path / 'lease.db'}")
    yield engine
    engine.dispose()
    open_database.cache_clear()


def test_one_holds_it_and_another_takes_over_when_it_is_gone(engine: Engine) -> None:
    clock = Clock()
    first, second = (ControllerLease(engine, "release", clock=clock) for _ in range(2))
    assert (first.hold(), second.hold()) == (True, False)
    clock.pass_s(4.9)
    assert (second.hold(), first.hold()) == (False, True), "renewed in time"
    clock.pass_s(4.9)
    assert second.hold() is False
    clock.pass_s(0.2)
    assert (second.hold(), first.hold()) == (True, False)


def test_one_that_comes_too_late_writes_nothing(engine: Engine) -> None:
    clock = Clock()
    first, second = (ControllerLease(engine, "release", clock=clock) for _ in range(2))
    assert first.hold()
    clock.pass_s(60)
    with begin_alone(engine, 1) as connection:
        first.require(connection)  # nobody else has come meanwhile
    assert second.hold()
    with pytest.raises(ConflictError, match="taken over"), begin_alone(engine, 1) as connection:
        first.require(connection)
    with pytest.raises(ConflictError, match="taken over"):
        first.check()
    second.check()


def test_of_many_at_once_one_gets_it(engine: Engine) -> None:
    leases = [ControllerLease(engine, "release") for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(ControllerLease.hold, leases)) == [False] * 5 + [True]


def test_a_clock_that_is_put_back_stops_nobody(engine: Engine) -> None:
    clock = Clock()
    first, second = (ControllerLease(engine, "release", clock=clock) for _ in range(2))
    assert first.hold()
    clock.pass_s(-3600)
    assert second.hold(), "else nobody would act for an hour once the first one is gone"
    with pytest.raises(ConflictError, match="taken over"):
        first.check()
