"""The deployment tables: a promotion is one step, whatever reads them sees no half of it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import sqlalchemy as sa

from cluster.aliases import AliasChange, move_alias
from cluster.database import (
    deployments,
    now,
    open_database,
    release_events,
    release_evidence,
)
from cluster.errors import ConflictError, InputError
from cluster.release_evidence import EvidenceDelta
from cluster.releases import Deployment, ReleaseStore, ReleaseWriter
from cluster.statistics.sequential import Sample


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ReleaseStore]:
    engine = open_database(f"sqlite:///{tmp_path / 'releases.db'}")
    yield ReleaseStore(engine)
    engine.dispose()
    open_database.cache_clear()


def ask(store: ReleaseStore, version: int) -> Deployment:
    with store.writing() as tables:
        return tables.create("m", version, f"sha256:{version}", {}, "asked", requested_by="ops")


def promote(store: ReleaseStore, version: int) -> None:
    row = ask(store, version)
    with store.writing() as tables:
        tables.promote(row, actor="tester", reason=f"release {version}")


def take_down(
    store: ReleaseStore, version: int, state: Literal["failed", "retiring"], reason: str
) -> None:
    with store.writing() as tables:
        tables.take_down(found(store, version), state, reason, actor="tester")


def found(store: ReleaseStore, version: int) -> Deployment:
    row = store.get("m", version)
    assert row is not None
    return row


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


def test_a_promotion_while_the_tables_are_read_is_seen_whole_or_not_at_all(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path / 'read.db'}")
    store, has_promoted = ReleaseStore(engine), False
    promote(store, 1)
    row = ask(store, 2)

    @sa.event.listens_for(engine, "after_cursor_execute")
    def promote_meanwhile(*told: Any) -> None:
        nonlocal has_promoted
        if told[2].startswith("SELECT deployments") and not has_promoted:
            has_promoted = True
            with ReleaseStore(engine).writing() as tables:
                tables.promote(row, actor="tester", reason="meanwhile")

    before, after = store.snapshot(), store.snapshot()
    assert has_promoted
    for snapshot, version in ((before, 1), (after, 2)):
        assert snapshot.weights == {"m": {version: 1.0}}
        assert snapshot.aliases == {("m", "champion"): version}
        assert [r.version for r in snapshot.serving if r.state == "champion"] == [version]
    engine.dispose()
    open_database.cache_clear()


def test_a_promotion_that_cannot_finish_changes_nothing(store: ReleaseStore) -> None:
    promote(store, 1)
    row = ask(store, 2)
    with pytest.raises(Exception, match="NOT NULL"), store.writing() as tables:
        tables.promote(row, actor=None, reason="no actor")  # type: ignore[arg-type]
    assert states(store) == {1: "champion", 2: "deploying"}
    assert store.weights("m") == {1: 1.0}


def test_a_standby_is_kept_when_there_is_no_champion_to_replace_it(store: ReleaseStore) -> None:
    promote(store, 1)
    promote(store, 2)
    take_down(store, 2, "failed", "broke down")
    promote(store, 3)
    assert states(store) == {1: "standby", 2: "failed", 3: "champion"}


def test_taking_down_removes_traffic_and_alias_at_once(store: ReleaseStore) -> None:
    promote(store, 1)
    take_down(store, 1, "retiring", "undeployed")
    assert store.weights("m") == {}
    assert store.snapshot().serving == ()
    assert store.snapshot().aliases == {}
    last = store.champion_history("m")[-1]
    assert (last.from_version, last.to_version) == (1, None)
    assert (last.actor, last.reason) == ("tester", "version 1 retiring: undeployed")
    with store.writing() as tables:
        tables.remove(found(store, 1))
    assert store.deployments() == []


def test_a_successor_takes_over_in_the_same_step(store: ReleaseStore) -> None:
    promote(store, 1)
    promote(store, 2)
    with store.writing() as tables:
        tables.take_down(
            found(store, 2), "failed", "worn out", actor="c", successor=found(store, 1)
        )
    assert states(store) == {1: "champion", 2: "failed"}
    assert store.weights("m") == {1: 1.0}
    last = store.champion_history("m")[-1]
    assert (last.from_version, last.to_version, last.reason) == (2, 1, "version 2 failed: worn out")


def test_taking_down_a_standby_leaves_the_champion_alone(store: ReleaseStore) -> None:
    promote(store, 1)
    promote(store, 2)
    take_down(store, 1, "retiring", "undeployed")
    assert store.weights("m") == {2: 1.0}
    assert store.snapshot().aliases == {("m", "champion"): 2}


def test_an_alias_that_was_moved_by_hand_is_left_where_it_is(store: ReleaseStore) -> None:
    promote(store, 1)
    with store.writing() as tables:
        change = AliasChange("m", "champion", None, 7, "somebody", "by hand", now())
        move_alias(tables.connection, change, None)
    take_down(store, 1, "retiring", "undeployed")
    assert store.snapshot().aliases == {("m", "champion"): 7}


def test_asking_again_forgets_how_it_ended_before(store: ReleaseStore) -> None:
    ask(store, 1)
    take_down(store, 1, "failed", "broke down")
    with store.writing() as tables:
        tables.create("m", 1, "sha256:1", {"num_replicas": 2}, "asked again", requested_by="ops")
    row = found(store, 1)
    assert (row.state, row.reason, row.options) == ("deploying", "asked again", {"num_replicas": 2})
    assert store.get("m", 2) is None


@pytest.mark.parametrize(
    "write",
    [
        lambda tables, row: tables.enter(row, "warming", "late"),
        lambda tables, row: tables.promote(row, actor="tester", reason="late"),
        lambda tables, row: tables.take_down(row, "failed", "late", actor="tester"),
        lambda tables, row: tables.remove(row),
    ],
)
@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_writer_that_has_seen_an_older_row_changes_nothing(
    store: ReleaseStore, write: Callable[[ReleaseWriter, Deployment], Any], is_replaced: bool
) -> None:
    seen = ask(store, 1)
    if is_replaced:
        ask(store, 1)
    else:
        take_down(store, 1, "retiring", "undeployed")
    before = store.get("m", 1)
    with pytest.raises(ConflictError, match="changed meanwhile"), store.writing() as tables:
        write(tables, seen)
    assert store.get("m", 1) == before
    assert (store.weights("m"), store.champion_history("m")) == ({}, [])


@pytest.mark.parametrize("state", ["failed", "retiring"])
def test_what_is_given_up_is_not_promoted(
    store: ReleaseStore, state: Literal["failed", "retiring"]
) -> None:
    ask(store, 1)
    take_down(store, 1, state, "why")
    with pytest.raises(ConflictError, match=f"is {state}"), store.writing() as tables:
        tables.promote(found(store, 1), actor="tester", reason="ready")


def test_only_what_served_keeps_its_application(store: ReleaseStore) -> None:
    for version in (1, 2):
        row = ask(store, version)
        with store.writing() as tables:
            row = tables.enter(row, "deploying", "placed", starting=True)
            if version == 1:
                tables.promote(row, actor="tester", reason="ready")
        take_down(store, version, "retiring", "undeployed")
    assert found(store, 1).started_at is not None
    assert found(store, 2).started_at is None


def test_writers_wait_for_each_other(store: ReleaseStore) -> None:
    ask(store, 1)

    def count(_: int) -> None:
        with store.writing() as tables:
            row = tables.deployments("m")[0]
            tables.enter(row, "deploying", str(int(row.reason.removeprefix("asked") or 0) + 1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(40)))
    assert (found(store, 1).reason, found(store, 1).revision) == ("40", 40)


def observed(row: Deployment, num: int, total: float, **changes: Any) -> EvidenceDelta:
    delta = EvidenceDelta(
        row.release_id, row.step, row.name, row.version, "candidate", "errors", num, total
    )
    return replace(delta, **changes)


def canary(store: ReleaseStore, version: int, share: float) -> Deployment:
    row = found(store, version)
    with store.writing() as tables:
        return tables.compare(row, "canary", "it answers", mirror_share=0.5, share=share)


def test_gateways_add_to_the_same_evidence_at_once(store: ReleaseStore) -> None:
    row = ask(store, 1)
    deltas = [observed(row, 2, 1.0, metric=metric) for metric in ("errors", "slow")]

    def add(number: int) -> None:
        for _ in range(5):
            store.add_evidence(deltas if number % 2 else deltas[::-1])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    assert store.evidence(row) == {
        ("candidate", "errors"): Sample(40, 20.0),
        ("candidate", "slow"): Sample(40, 20.0),
    }


def test_a_new_release_forgets_what_earlier_ones_have_shown(store: ReleaseStore) -> None:
    promote(store, 1)
    old = ask(store, 2)
    store.add_evidence([observed(old, 2, 1.0)])
    ask(store, 2)
    assert store.evidence(old), "a gateway may still be adding to it"
    with store.writing() as tables:
        tables.connection.execute(sa.update(release_evidence).values(updated_at="2020-01-01"))
    new = ask(store, 2)
    assert store.evidence(old) == {}
    store.add_evidence([observed(new, 3, 0.0)])
    assert store.evidence(new) == {("candidate", "errors"): Sample(3, 0.0)}


def test_what_ended_long_ago_is_forgotten_and_what_is_up_keeps_its_history(
    store: ReleaseStore,
) -> None:
    promote(store, 1)
    for version in (2, 3):
        ask(store, version)
        take_down(store, version, "failed", "it cannot be loaded")
    with store.writing() as tables:
        for table, at, versions in (
            (release_events, "at", (1, 2)),
            (deployments, "updated_at", (1, 2)),
        ):
            old = sa.update(table).where(table.c.version.in_(versions))
            tables.connection.execute(old.values({at: "2020-01-01"}))
    with store.writing() as tables:
        tables.create("other", 1, "sha256:9", {}, "asked", requested_by="ops")
    assert states(store) == {1: "champion", 2: "failed", 3: "failed"}, "another model's release"
    ask(store, 4)
    assert states(store) == {1: "champion", 3: "failed", 4: "deploying"}
    assert [event.version for event in store.events("m")] == [1, 1, 3, 3, 4]


def test_evidence_whose_commit_has_no_reply_is_not_handed_in_again(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ask(store, 1)

    def commit(connection: Any) -> None:
        connection.commit()
        raise sqlite3.DatabaseError("the server closed the connection")

    with monkeypatch.context() as patch:
        patch.setattr(store._engine.dialect, "do_commit", commit)
        store.add_evidence([observed(row, 2, 1.0)])
    assert store.evidence(row) == {("candidate", "errors"): Sample(2, 1.0)}


def test_each_phase_has_evidence_of_its_own(store: ReleaseStore) -> None:
    promote(store, 1)
    ask(store, 2)
    first = canary(store, 2, 0.05)
    store.add_evidence([observed(first, 10, 3.0)])
    second = canary(store, 2, 0.25)
    assert store.evidence(second) == {}
    store.add_evidence([observed(first, 1, 0.0), observed(second, 7, 0.0)])
    assert store.evidence(second) == {("candidate", "errors"): Sample(7, 0.0)}
    assert ask(store, 2).release_id != first.release_id


@pytest.mark.parametrize(
    "wrong",
    [
        {"total": 3.0}, {"total": -0.1}, {"total": float("nan")}, {"total": float("inf")},
        {"arm": "both"}, {"metric": "beauty"},
    ],
)  # fmt: skip
def test_what_is_no_evidence_is_refused_whole(store: ReleaseStore, wrong: dict[str, Any]) -> None:
    row = ask(store, 1)
    with pytest.raises(InputError, match="evidence on m/1 is not observations"):
        store.add_evidence([observed(row, 2, 0.0), replace(observed(row, 2, 0.0), **wrong)])
    assert store.evidence(row) == {}


def test_what_is_compared_is_mirrored_to_and_gets_its_share(store: ReleaseStore) -> None:
    promote(store, 1)
    ask(store, 2)
    with store.writing() as tables:
        tables.compare(found(store, 2), "shadow", "it answers", mirror_share=0.5)
    assert store.snapshot().shadows == {"m": (2, 0.5)}
    assert store.snapshot().weights == {"m": {1: 1.0}}
    canary(store, 2, 0.05)
    assert store.snapshot().weights == {"m": {1: 0.95, 2: 0.05}}
    assert {row.version for row in store.snapshot().serving} == {1, 2}
    with store.writing() as tables:
        tables.take_down(found(store, 2), "rolled_back", "10 of 20 failed", actor="controller")
    assert store.snapshot().weights == {"m": {1: 1.0}}
    assert store.snapshot().shadows == {}
    assert states(store) == {1: "champion", 2: "rolled_back"}


def test_a_canary_without_a_champion_has_all_traffic(store: ReleaseStore) -> None:
    promote(store, 1)
    ask(store, 2)
    canary(store, 2, 0.05)
    take_down(store, 1, "failed", "broke down")
    assert store.weights("m") == {2: 1.0}


def test_who_takes_over_ends_what_was_compared_with_the_one_before(store: ReleaseStore) -> None:
    for version in (1, 2):
        promote(store, version)
    ask(store, 3)
    canary(store, 3, 0.25)
    with store.writing() as tables:
        broken, heir = found(store, 2), found(store, 1)
        tables.take_down(broken, "failed", "broke down", actor="c", successor=heir)
    assert states(store) == {1: "champion", 2: "failed", 3: "rolled_back"}
    assert store.weights("m") == {1: 1.0}


def test_the_timeline_has_each_state_with_its_reason(store: ReleaseStore) -> None:
    promote(store, 1)
    ask(store, 2)
    row = canary(store, 2, 0.05)
    with store.writing() as tables:
        tables.set_paused(row, True, "lunch", actor="ops")
    with store.writing() as tables:
        tables.promote(found(store, 2), actor="ops", reason="good enough")
    told = [(event.version, event.state, event.actor, event.reason) for event in store.events("m")]
    assert told == [
        (1, "deploying", "ops", "asked"),
        (1, "champion", "tester", "release 1"),
        (2, "deploying", "ops", "asked"),
        (2, "canary 5%", "controller", "it answers"),
        (2, "canary 5%, paused", "ops", "lunch"),
        (1, "standby", "ops", "kept for rollback from version 2"),
        (2, "champion", "ops", "good enough"),
    ]
    assert len({event.release_id for event in store.events("m") if event.version == 2}) == 1


def test_a_version_with_notice_serves_on_and_is_remembered_afterwards(store: ReleaseStore) -> None:
    for version in (1, 2):
        promote(store, version)
    with store.writing() as tables:
        tables.set_sunset(found(store, 1), "2030-01-01", "undeployed by ops", actor="ops")
    promote(store, 3)
    assert states(store) == {1: "standby", 2: "standby", 3: "champion"}
    take_down(store, 1, "retiring", "its notice is over")
    with store.writing() as tables:
        tables.enter(found(store, 1), "retired", "its notice is over")
    snapshot = store.snapshot()
    assert [(row.version, row.sunset_at) for row in snapshot.retired] == [(1, "2030-01-01")]
    assert {row.version for row in snapshot.serving} == {2, 3}


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE routes SET weights = 'nonsense'",
        "UPDATE routes SET weights = '[1, 2]'",
        """UPDATE routes SET weights = '{"one": 1.0}'""",
        """UPDATE routes SET weights = '{"9": 1.0}'""",
        "UPDATE routes SET weights = '{}'",
        "DELETE FROM routes",
    ],
)
def test_routes_that_somebody_else_has_changed_reach_no_customer(
    store: ReleaseStore, change: str
) -> None:
    promote(store, 1)
    assert store.misrouted() == []
    with store.writing() as tables:
        tables.connection.execute(sa.text(change))
    assert store.snapshot().weights == {"m": {1: 1.0}}
    assert store.misrouted() == ["m"]
    with store.writing() as tables:
        tables.reroute("m")
    assert (store.weights("m"), store.misrouted()) == ({1: 1.0}, [])


def test_routes_of_a_model_that_is_not_deployed_are_none(store: ReleaseStore) -> None:
    promote(store, 1)
    take_down(store, 1, "retiring", "undeployed")
    with store.writing() as tables:
        tables.connection.execute(sa.text("""UPDATE routes SET weights = '{"1": 1.0}'"""))
    assert store.snapshot().weights == {"m": {}}
    assert store.misrouted() == ["m"]
