"""Names resolve to versions; the table follows the database and survives its absence."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cluster.database import open_database
from cluster.errors import NotFoundError
from cluster.model_ref import ModelRef
from cluster.releases import ReleaseStore
from serve_apps.gateway.routing_table import Routes, RoutingTable, ServedVersion, read_routes
from serve_apps.options import DeploymentOptions


def served(version: int) -> ServedVersion:
    return ServedVersion("m", version, "sha256:0", f"m.v{version}")


ROUTES = Routes(
    served={("m", 1): served(1), ("m", 2): served(2)},
    weights={"m": {1: 0.9, 2: 0.1}, "empty": {}},
    aliases={("m", "candidate"): 2, ("m", "old"): 7},
)


@pytest.mark.parametrize(
    ("ref", "draw", "version"),
    [
        ("m", 0.0, 1), ("m", 0.89, 1), ("m", 0.91, 2), ("m", 0.9999999, 2),
        ("m/1", 0.99, 1), ("m/2", 0.0, 2), ("m@candidate", 0.0, 2),
    ],
)  # fmt: skip
def test_references_resolve(ref: str, draw: float, version: int) -> None:
    assert ROUTES.resolve(ModelRef.parse(ref), draw).version == version


@pytest.mark.parametrize("ref", ["x", "empty", "m/3", "m@old", "m@none", "x/1"])
def test_what_is_not_served_is_named(ref: str) -> None:
    with pytest.raises(NotFoundError, match="not deployed"):
        ROUTES.resolve(ModelRef.parse(ref), 0.5)


def test_draws_follow_the_weights() -> None:
    ref = ModelRef.parse("m")
    found = Counter(ROUTES.resolve(ref, i / 1000).version for i in range(1000))
    assert found == {1: 900, 2: 100}


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
