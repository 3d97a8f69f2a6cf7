"""The deployment tables: a promotion is one step, whatever reads them sees no half of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.database import open_database
from cluster.releases import ReleaseStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ReleaseStore]:
    engine = open_database(f"sqlite:///{tmp_path / 'releases.db'}")
    yield ReleaseStore(engine)
    engine.dispose()
    open_database.cache_clear()


def ask(store: ReleaseStore, version: int) -> None:
    store.request("m", version, f"sha256:{version}", {}, "asked")


def promote(store: ReleaseStore, version: int) -> None:
    ask(store, version)
    store.promote("m", version, actor="tester", reason=f"release {version}")


def states(store: ReleaseStore) -> dict[int, str]:
    return {row.version: row.state for row in store.deployments("m")}


def test_promotion_moves_states_traffic_and_alias_together(store: ReleaseStore) -> None:
    for version in (1, 2, 3):
        promote(store, version)
        snapshot = store.snapshot()
        assert snapshot.weights == {"m": {version: 1.0}}
        assert snapshot.aliases == {("m", "champion"): version}
    assert states(store) == {1: "retiring", 2: "standby", 3: "champion"}
    assert [row.version for row in snapshot.serving] == [2, 3]
    history = store.champion_history("m")
    assert [(c.from_version, c.to_version) for c in history] == [(None, 1), (1, 2), (2, 3)]
    assert history[-1].reason == "release 3"


def test_a_promotion_that_cannot_finish_changes_nothing(store: ReleaseStore) -> None:
    promote(store, 1)
    ask(store, 2)
    with pytest.raises(Exception, match="NOT NULL"):
        store.promote("m", 2, actor=None, reason="no actor")  # type: ignore[arg-type]
    assert states(store) == {1: "champion", 2: "deploying"}
    assert store.weights("m") == {1: 1.0}


def test_a_standby_is_kept_when_there_is_no_champion_to_replace_it(store: ReleaseStore) -> None:
    promote(store, 1)
    promote(store, 2)
    store.fail("m", 2, "broke down")
    promote(store, 3)
    assert states(store) == {1: "standby", 2: "failed", 3: "champion"}


def test_retiring_takes_traffic_away_at_once(store: ReleaseStore) -> None:
    promote(store, 1)
    store.retire("m", 1, "undeployed")
    assert store.weights("m") == {}
    assert store.snapshot().serving == ()
    store.remove("m", 1)
    assert store.deployments() == []


def test_asking_again_forgets_how_it_ended_before(store: ReleaseStore) -> None:
    ask(store, 1)
    store.fail("m", 1, "broke down")
    store.request("m", 1, "sha256:1", {"num_replicas": 2}, "asked again")
    row = store.get("m", 1)
    assert row is not None
    assert (row.state, row.reason, row.options) == ("deploying", "asked again", {"num_replicas": 2})
    assert store.get("m", 2) is None
