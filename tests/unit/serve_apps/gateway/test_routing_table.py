"""Names resolve to versions; the table follows the database and survives its absence."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cluster.database import open_database
from cluster.errors import GoneError, NotFoundError
from cluster.model_ref import ModelRef
from cluster.releases import ReleaseStore
from serve_apps.gateway.notices import Notice
from serve_apps.gateway.releases.release import Release
from serve_apps.gateway.routing_table import (
    Routes,
    RoutingTable,
    ServedVersion,
    nobody,
    read_routes,
)
from serve_apps.gateway.stickiness import share_of
from serve_apps.options import DeploymentOptions


def served(version: int) -> ServedVersion:
    return ServedVersion("m", version, "sha256:0", f"m.v{version}")


ROUTES = Routes(
    served={("m", 1): served(1), ("m", 2): served(2), ("one", 4): served(4)},
    weights={"m": {1: 0.9, 2: 0.1}, "empty": {}, "one": {4: 1.0}},
    aliases={("m", "candidate"): 2, ("m", "old"): 7},
)


@pytest.mark.parametrize(
    ("ref", "version"), [("m/1", 1), ("m/2", 2), ("m@candidate", 2), ("one", 4)]
)
def test_references_resolve_whoever_asks(ref: str, version: int) -> None:
    def never_asked() -> str:
        raise AssertionError

    assert ROUTES.resolve(ModelRef.parse(ref), never_asked).version == version


@pytest.mark.parametrize("ref", ["x", "empty", "m/3", "m@old", "m@none", "x/1"])
def test_what_is_not_served_is_named(ref: str) -> None:
    with pytest.raises(NotFoundError, match="not deployed"):
        ROUTES.resolve(ModelRef.parse(ref), nobody)


def version_for(customer: str, share: float) -> int:
    routes = dataclasses.replace(ROUTES, weights={"m": {1: 1 - share, 2: share}})
    return routes.resolve(ModelRef.parse("m"), lambda: customer).version


def test_customers_follow_the_weights() -> None:
    found = Counter(version_for(f"customer {i}", 0.1) for i in range(2000))
    assert 150 < found[2] < 250


def test_a_customer_stays_with_a_version_while_its_weight_grows() -> None:
    customers = [f"customer {i}" for i in range(300)]
    before: set[str] = set()
    for share in (0.0, 0.05, 0.25, 0.5, 1.0):
        among = {customer for customer in customers if version_for(customer, share) == 2}
        assert before <= among
        before = among
    assert before == set(customers)


def test_another_models_first_customers_are_others() -> None:
    customers = [f"customer {i}" for i in range(300)]
    first = {c for c in customers if share_of(c, "m", [1, 2]) < 0.2}
    assert first != {c for c in customers if share_of(c, "n", [1, 2]) < 0.2}
    assert first == {c for c in customers if share_of(c, "m", [2, 1]) < 0.2}


def test_after_notice_a_version_answers_until_its_end_and_is_gone_afterwards() -> None:
    def resolve(ref: str, ends_at_s: float, **changes: Any) -> ServedVersion:
        notices = {("m", 1): Notice(1767225600, ends_at_s), ("old", 3): Notice(0, ends_at_s)}
        routes = dataclasses.replace(ROUTES, notices=notices, **changes)
        return routes.resolve(ModelRef.parse(ref), nobody)

    later, before = time.time() + 60, 1767830400.0
    assert resolve("m/1", later).version == 1
    assert resolve("m/2", before).version == 2
    with pytest.raises(GoneError, match=r"Thu, 08 Jan 2026 00:00:00 GMT; versions .* are: 2"):
        resolve("m/1", before)
    # Taken down before its time, or long ago: no version of the name is left.
    for ref in ("old", "old/3", "old@champion"):
        with pytest.raises(GoneError, match="ask for another model"):
            resolve(ref, later)
    for ref in ("old/4", "n"):
        with pytest.raises(NotFoundError):
            resolve(ref, later)


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(open_database(f"sqlite:///{tmp_path / 'routes.db'}"))


def deploy(store: ReleaseStore, version: int, **options: Any) -> None:
    with store.writing() as tables:
        row = tables.create("m", version, f"sha256:{version}", options, "asked", requested_by="ops")
        tables.promote(row, actor="test", reason="ready")


async def test_what_was_deployed_a_moment_ago_is_found_without_waiting(store: ReleaseStore) -> None:
    table = RoutingTable(lambda: read_routes(store))
    await table.refresh()
    table._read_at = 0.0
    deploy(store, 1, max_batch_size=3)
    found = await table.resolve(ModelRef.parse("m"))
    assert (found.version, found.options) == (1, DeploymentOptions(max_batch_size=3))
    assert (await table.resolve(ModelRef.parse("m@champion"))).version == 1


async def test_only_serving_states_are_routed(store: ReleaseStore) -> None:
    with store.writing() as tables:
        row = tables.create("m", 1, "sha256:1", {}, "asked", requested_by="ops")
        tables.enter(row, "parity", "checking")
    assert read_routes(store).served == {}
    deploy(store, 1)
    deploy(store, 2)
    assert sorted(version for _, version in read_routes(store).served) == [1, 2]
    champion = store.get("m", 2)
    assert champion is not None
    with store.writing() as tables:
        tables.take_down(champion, "retiring", "undeployed", actor="test")
    routes = read_routes(store)
    assert (list(routes.served), routes.weights["m"]) == ([("m", 1)], {})


async def test_a_release_under_way_and_a_notice_are_read(store: ReleaseStore) -> None:
    deploy(store, 1)
    with store.writing() as tables:
        row = tables.create("m", 2, "sha256:2", {}, "asked", requested_by="ops")
        shadow = tables.compare(row, "shadow", "mirrored first", mirror_share=0.5)
    release = Release("m", 1, 2, row.release_id, 1, 0.5)
    routes = read_routes(store)
    assert routes.releases == {"m": release}
    assert routes.resolve(ModelRef.parse("m"), nobody).version == 1
    with store.writing() as tables:
        tables.compare(shadow, "canary", "no worse", mirror_share=0.0, share=0.25)
    routes = read_routes(store)
    assert routes.releases == {"m": dataclasses.replace(release, step=2, mirrored_share=0.0)}
    assert routes.weights["m"] == {1: 0.75, 2: 0.25}
    champion = store.get("m", 1)
    assert champion is not None
    assert routes.notices == {}
    with store.writing() as tables:
        tables.set_sunset(champion, "2026-01-08T00:00:00+00:00", "asked", actor="ops")
    given = read_routes(store).notices["m", 1]
    assert given.ends_at == "Thu, 08 Jan 2026 00:00:00 GMT"
    with store.writing() as tables:
        noticed = tables.deployments("m")[0]
        tables.enter(noticed, "standby", "version 2 took over")
    assert store.get("m", 1) != noticed
    assert read_routes(store).notices["m", 1] == given, "it was given when it was given"


async def test_a_database_that_goes_away_leaves_the_last_routes() -> None:
    answers: list[Routes | Exception] = [ROUTES, OSError("disk gone"), Routes()]

    def read() -> Routes:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    changes: list[Routes] = []
    table = RoutingTable(read)
    table.on_change.append(changes.append)
    assert not table.is_ready
    for expected in (ROUTES, ROUTES, Routes()):
        table._read_at = 0.0
        await table.refresh()
        assert table.current == expected
        assert table.is_ready
    assert changes == [ROUTES, Routes()]


async def test_a_listener_that_fails_does_not_stop_the_table() -> None:
    def explode(_: Routes) -> None:
        raise RuntimeError("listener")

    table = RoutingTable(lambda: ROUTES)
    table.on_change.append(explode)
    await table.refresh()
    assert table.current == ROUTES
