"""Whole releases with Serve played by hand: what is up, who gets traffic, what the tables say."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa

from cluster.errors import (
    PASSING_ERRORS,
    ConflictError,
    HeliostatError,
    InputError,
    InvalidReferenceError,
    NotFoundError,
)
from cluster.releases import Deployment
from serve_apps.gateway.routing_table import read_routes
from serve_apps.release.fake_applications import FakeApplications
from serve_apps.release.policy import ReleasePolicy
from tests.release_world import World


async def test_a_first_version_becomes_champion_through_every_state(world: World) -> None:
    row = await world.deploy("m/1")
    assert (row["state"], row["application"]) == ("deploying", "m.v1")
    seen: list[str] = []
    for phase in (None, "starting", "running", None, None):
        if phase is not None:
            world.applications.set_phase("m.v1", phase)
        await world.controller.reconcile()
        seen.append(world.states()[1])
    assert seen == ["deploying", "warming", "parity", "champion", "champion"]
    assert world.applications.started == ["m.v1 graph"]
    world.assert_routes_follow_champion()
    history = world.store.champion_history("m")
    assert [(change.from_version, change.to_version) for change in history] == [(None, 1)]
    assert history[0].reason == "golden outputs reproduced on cpu"
    assert history[0].actor == "tester", "who asked for it, not who carried it out"


async def test_the_old_version_serves_until_the_new_one_answers(world: World) -> None:
    await world.release(1)
    await world.deploy("m/2")
    await world.controller.reconcile()
    world.applications.set_phase("m.v2", "starting")
    await world.controller.reconcile()
    assert world.states() == {1: "champion", 2: "warming"}
    assert world.store.weights("m") == {1: 1.0}
    world.answers["m.v2"] = "gone"
    await world.settle("m.v2")
    assert world.states() == {1: "champion", 2: "parity"}
    del world.answers["m.v2"]
    await world.settle("m.v2")
    assert world.states() == {1: "standby", 2: "champion"}
    world.assert_routes_follow_champion()


async def test_only_one_version_is_kept_for_rollback(world: World) -> None:
    for version in (1, 2, 3):
        await world.release(version)
    await world.settle()
    assert world.states() == {2: "standby", 3: "champion"}
    assert world.applications.deleted == ["m.v1"]


async def test_a_version_that_fails_leaves_the_old_one_and_says_why(world: World) -> None:
    await world.release(1)
    await world.deploy("m/2")
    await world.controller.reconcile()
    world.applications.set_phase("m.v2", "failed", "golden outputs are not reproduced")
    await world.settle()
    row = world.store.get("m", 2)
    assert row is not None
    assert (row.state, row.reason) == ("failed", "golden outputs are not reproduced")
    assert world.applications.deleted == ["m.v2"]
    assert world.store.weights("m") == {1: 1.0}
    assert world.champion() == 1
    await world.release(2)
    assert world.champion() == 2


async def test_a_replica_with_another_package_gets_no_traffic(world: World) -> None:
    await world.release(1)
    world.answers["m.v2"] = "sha256:other"
    await world.release(2)
    assert world.states() == {1: "champion", 2: "failed"}


async def test_rollback_moves_alias_and_traffic_together_without_new_replicas(world: World) -> None:
    await world.release(1)
    await world.release(2)
    started = list(world.applications.started)
    row = await world.controller.rollback("m", "tester")
    assert (row["version"], row["state"]) == (1, "champion")
    assert world.states() == {1: "champion", 2: "standby"}
    world.assert_routes_follow_champion()
    assert world.store.champion_history("m")[-1].reason == "rolled back from version 2"
    assert world.store.champion_history("m")[-1].actor == "tester"
    await world.settle("m.v1", "m.v2")
    assert world.applications.started == started


async def test_rollback_that_cannot_be_is_refused_with_the_way_out(world: World) -> None:
    with pytest.raises(NotFoundError, match="never released"):
        await world.controller.rollback("m", "tester")
    await world.release(1)
    with pytest.raises(ConflictError, match="no champion before version 1"):
        await world.controller.rollback("m", "tester")
    await world.release(2)
    await world.controller.undeploy("m", 1, None, "tester")
    await world.settle("m.v2")
    with pytest.raises(ConflictError, match="heliostat deploy m/1"):
        await world.controller.rollback("m", "tester")
    assert world.champion() == 2


async def test_a_rollback_that_is_asked_for_twice_does_not_bring_back_what_was_left(
    world: World,
) -> None:
    await world.release(1)
    await world.release(2)
    await world.controller.rollback("m", "tester")
    with pytest.raises(ConflictError, match=r"no champion before version 1; .* was rolled back"):
        await world.controller.rollback("m", "tester")
    assert world.states() == {1: "champion", 2: "standby"}
    await world.deploy("m/2")
    assert (await world.controller.rollback("m", "tester"))["version"] == 1
    assert len(world.applications.started) == 2, "all of it without new replicas"


async def test_a_champion_that_fails_hands_over_to_the_one_before(world: World) -> None:
    await world.release(1)
    await world.release(2)
    world.applications.set_phase("m.v2", "failed", "out of memory")
    await world.controller.reconcile()
    assert world.states() == {1: "champion", 2: "failed"}
    world.assert_routes_follow_champion()
    assert world.last_move() == (2, 1, "version 2 failed: out of memory")
    with pytest.raises(ConflictError, match="version 2 of 'm', the champion before 1, is failed"):
        await world.controller.rollback("m", "tester")


async def test_a_champion_that_fails_alone_is_started_again_until_another_can_take_over(
    world: World,
) -> None:
    await world.release(1)
    await world.release(2)
    for name in ("m.v1", "m.v2"):
        world.applications.vanish(name)  # the cluster was restarted
    await world.controller.reconcile()
    started = len(world.applications.started)
    world.applications.set_phase("m.v2", "failed", "no storage")
    await world.controller.reconcile()
    assert world.states() == {1: "standby", 2: "champion"}
    assert world.row(2).reason == "trying again: no storage"
    assert world.applications.started[started:] == ["m.v2 graph"]
    world.applications.set_phase("m.v1", "running")
    world.applications.set_phase("m.v2", "failed", "no storage")
    await world.controller.reconcile()
    assert world.states() == {1: "champion", 2: "failed"}
    world.assert_routes_follow_champion()
    assert world.last_move() == (2, 1, "version 2 failed: no storage")


async def test_an_only_version_comes_back_once_what_it_failed_for_has_passed(world: World) -> None:
    await world.release(1)
    world.applications.vanish("m.v1")
    for _ in range(4):
        await world.controller.reconcile()
        world.applications.set_phase("m.v1", "failed", "no storage")
    await world.settle("m.v1")
    row = world.row(1)
    assert (row.state, row.reason) == ("champion", "it runs again")
    world.assert_routes_follow_champion()
    assert world.applications.deleted == []
    revision = row.revision
    await world.settle("m.v1")
    assert world.row(1).revision == revision


async def lose_the_champion(world: World) -> None:
    """For good, while the version that stands by is on its way."""
    world.applications.set_phase("m.v1", "scheduling")
    world.applications.vanish("m.v2")
    world.applications.start_errors = [ValueError("no such option")]
    for _ in range(2):
        await world.controller.reconcile()


async def test_a_standby_that_is_down_takes_over_when_it_is_back(world: World) -> None:
    await world.release(1)
    await world.release(2)
    await lose_the_champion(world)
    assert (world.states(), world.champion()) == ({1: "standby", 2: "failed"}, None)
    assert world.store.weights("m") == {}
    assert world.last_move() == (2, None, "version 2 failed: no such option")
    await world.settle("m.v1")
    assert world.states() == {1: "champion", 2: "failed"}
    world.assert_routes_follow_champion()


async def test_without_a_champion_a_rollback_takes_the_one_that_stands_by(world: World) -> None:
    await world.release(1)
    await world.release(2)
    await lose_the_champion(world)
    row = await world.controller.rollback("m", "tester")
    assert (row["version"], row["reason"]) == (1, "rolled back from no champion")
    world.assert_routes_follow_champion()


async def test_an_undeployed_champion_hands_over_to_the_one_before(world: World) -> None:
    await world.release(1)
    await world.release(2)
    rows = await world.controller.undeploy("m", 2, None, "tester")
    assert {row["version"]: row["state"] for row in rows} == {1: "champion", 2: "retiring"}
    world.assert_routes_follow_champion()
    assert world.last_move() == (2, 1, "version 2 retiring: undeployed by tester")
    await world.controller.undeploy("m", 1, None, "tester")
    assert (world.champion(), world.store.weights("m")) == (None, {})
    assert world.last_move() == (1, None, "version 1 retiring: undeployed by tester")
    await world.settle()
    with pytest.raises(ConflictError, match="version 1 of 'm', the last champion, is not up"):
        await world.controller.rollback("m", "tester")


async def test_deploying_the_standby_again_needs_no_new_replica(world: World) -> None:
    await world.release(1)
    await world.release(2)
    row = await world.deploy("m/1")
    assert row["state"] == "champion"
    assert world.champion() == 1
    assert len(world.applications.started) == 2


async def test_deploying_what_is_deployed_changes_nothing(world: World) -> None:
    await world.release(1)
    row = await world.deploy("m/1")
    assert row["state"] == "champion"
    with pytest.raises(ConflictError, match="with other options"):
        await world.deploy("m/1", num_replicas=2)
    await world.deploy("m/2")
    assert (await world.deploy("m/2"))["state"] == "deploying"
    with pytest.raises(ConflictError, match="version 2 of 'm' is being deployed"):
        await world.deploy("m/3")


async def test_a_bare_name_means_the_candidate_or_else_the_newest(world: World) -> None:
    assert (await world.deploy("m"))["version"] == 3
    await world.settle("m.v3")
    world.registry.set_alias("m", "candidate", 2, actor="tester", reason="trained")
    assert (await world.deploy("m"))["version"] == 2
    await world.settle("m.v2")
    assert (await world.deploy("m@champion"))["version"] == 2


@pytest.mark.parametrize(
    ("ref", "strategy", "options", "error", "words"),
    [
        ("none", "direct", {}, NotFoundError, "there are: m"),
        ("m/9", "direct", {}, NotFoundError, "it has versions 1, 2, 3"),
        ("m@prod", "direct", {}, NotFoundError, "no alias 'prod'"),
        ("../m", "direct", {}, InvalidReferenceError, "not valid"),
        ("m", "yolo", {}, InputError, "'yolo' does not exist"),
        ("m", "direct", {"num_replica": 2}, InputError, "'num_replica' is not known"),
        ("m", "direct", {"num_gpus": 1}, ConflictError, "asks for 1 GPU, and no node .* than 0"),
        ("m", "direct", {"num_cpus": 3}, ConflictError, "asks for 3 CPU, and no node .* than 2"),
        ("m", "direct", {"num_replicas": 0}, InputError, "'num_replicas' is 0: input should be"),
    ],
)
async def test_impossible_deployments_are_refused(
    world: World, ref: str, strategy: str, options: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        await world.controller.deploy(ref, strategy, options, "tester")
    assert world.store.deployments() == []


async def test_undeploy_takes_traffic_away_before_the_application(world: World) -> None:
    await world.release(1)
    await world.release(2)
    rows = await world.controller.undeploy("m", None, None, "tester")
    assert {row["state"] for row in rows} == {"retiring"}
    assert read_routes(world.store).served == {}
    assert world.applications.deleted == []
    await world.settle()
    assert sorted(world.applications.deleted) == ["m.v1", "m.v2"]
    assert world.store.deployments() == []
    with pytest.raises(NotFoundError, match="not deployed"):
        await world.controller.undeploy("m", None, None, "tester")
    await world.release(1)
    assert world.store.weights("m") == {1: 1.0}


async def test_a_draining_version_that_is_deployed_again_keeps_its_replicas(world: World) -> None:
    world.controller = world.new_controller(drain_s=60)
    await world.release(1)
    await world.release(2)
    await world.controller.undeploy("m", 1, None, "tester")
    await world.controller.reconcile()
    assert (await world.deploy("m/1"))["state"] == "deploying"
    await world.settle("m.v1", "m.v2")
    assert world.states() == {1: "champion", 2: "standby"}
    assert world.applications.started == ["m.v1 graph", "m.v2 graph"]
    assert world.applications.deleted == []
    assert (await world.controller.rollback("m", "tester"))["version"] == 2


async def test_with_other_options_the_draining_application_ends_first(world: World) -> None:
    world.controller = world.new_controller(drain_s=60)
    await world.release(1)
    await world.controller.undeploy("m", None, None, "tester")
    await world.deploy("m/1", max_batch_size=3)
    await world.settle("m.v1")
    assert (world.states(), world.applications.deleted) == ({1: "deploying"}, [])
    world.controller = world.new_controller(drain_s=0)
    await world.settle("m.v1")
    assert world.applications.deleted == ["m.v1"]
    assert world.applications.started == ["m.v1 graph", "m.v1 graph"]
    assert world.states() == {1: "champion"}


async def test_undeploying_what_is_deployed_again_is_not_lost(world: World) -> None:
    await world.release(1)
    await world.controller.undeploy("m", 1, None, "tester")
    await world.deploy("m/1")
    await world.controller.undeploy("m", 1, None, "tester")
    await world.settle("m.v1")
    assert world.states() == {}


async def test_undeploying_again_does_not_drain_from_the_beginning(world: World) -> None:
    world.controller = world.new_controller(drain_s=60)
    await world.release(1)
    await world.controller.undeploy("m", 1, None, "tester")
    before = world.row(1)
    await world.controller.undeploy("m", 1, None, "another")
    assert world.row(1) == before


async def test_an_undeploy_while_serve_is_asked_wins(world: World) -> None:
    start = world.applications.start

    def slow(deployment: Deployment, kind: str) -> None:
        world.requests.undeploy("m", 1, None, "tester")
        start(deployment, kind)

    world.applications.start = slow  # type: ignore[method-assign]
    await world.deploy("m/1")
    await world.settle("m.v1")
    assert (world.states(), world.champion()) == ({}, None)
    assert world.applications.statuses() == {}


async def test_an_undeploy_while_a_replica_is_asked_wins(world: World) -> None:
    await world.release(1)
    world.while_asked["m.v2"] = lambda: world.controller.undeploy("m", 2, None, "tester")
    await world.release(2)
    assert world.states() == {1: "champion"}
    world.assert_routes_follow_champion()
    assert world.store.champion_history("m")[-1].to_version == 1


@pytest.mark.parametrize("phase", [None, "running"])
async def test_a_deploy_while_the_version_is_forgotten_wins(world: World, phase: Any) -> None:
    await world.release(1)
    await world.controller.undeploy("m", 1, None, "tester")
    world.applications.vanish("m.v1")
    if phase is not None:
        world.applications.set_phase("m.v1", phase)
    statuses = world.applications.statuses

    def late() -> Any:
        world.applications.statuses = statuses  # type: ignore[method-assign]
        world.requests.deploy("m/1", "direct", {}, "tester")
        return statuses()

    world.applications.statuses = late  # type: ignore[method-assign]
    await world.controller.reconcile()
    assert world.states() == {1: "deploying"}
    assert world.applications.deleted == []
    await world.settle("m.v1")
    assert world.states() == {1: "champion"}


async def test_a_version_that_is_undeployed_cannot_be_rolled_back_to(world: World) -> None:
    await world.release(1)
    await world.release(2)
    await world.controller.undeploy("m", 1, None, "tester")
    with pytest.raises(ConflictError, match="is retiring"):
        await world.controller.rollback("m", "tester")
    assert world.states() == {1: "retiring", 2: "champion"}


@pytest.mark.parametrize(
    "asked",
    [
        [("m/1", {}), ("m/2", {}), ("m/3", {})],
        [("m/1", {}), ("m/1", {"max_batch_size": 2}), ("m/1", {"max_batch_size": 3})],
    ],
)
def test_of_several_deployments_at_once_one_is_taken(world: World, asked: Any) -> None:
    barrier = threading.Barrier(len(asked))

    def nodes() -> Any:
        barrier.wait(10)
        return FakeApplications().nodes()

    world.applications.nodes = nodes  # type: ignore[method-assign]

    def deploy(wanted: Any) -> str:
        try:
            world.requests.deploy(wanted[0], "direct", wanted[1], "tester")
        except ConflictError as error:
            return str(error)
        return "taken"

    with ThreadPoolExecutor(len(asked)) as pool:
        outcomes = list(pool.map(deploy, asked))
    assert outcomes.count("taken") == 1, outcomes
    assert len(world.store.deployments()) == 1


async def test_nothing_is_deployed_or_promoted_while_a_version_is_on_its_way(world: World) -> None:
    await world.release(1)
    await world.release(2)
    await world.deploy("m/3")
    for ref in ("m/1", "m/2"):
        with pytest.raises(ConflictError, match="version 3 of 'm' is being deployed"):
            await world.deploy(ref)


async def test_what_serve_refuses_fails_with_its_reason(world: World) -> None:
    await world.release(1)
    world.applications.start_errors = [ValueError("Traceback\nray.XError: 1e-09 CPUs")]
    await world.deploy("m/2")
    await world.settle("m.v2")
    assert (world.row(2).state, world.row(2).reason) == ("failed", "1e-09 CPUs")
    assert world.applications.started.count("m.v2 graph") == 1
    assert world.champion() == 1


async def test_a_serve_that_is_away_is_asked_again(world: World) -> None:
    world.applications.start_errors = [ConnectionError("no controller")] * 2
    await world.deploy("m/1")
    await world.controller.reconcile()
    assert (world.row(1).state, world.row(1).reason) == (
        "deploying",
        "trying again: no controller",
    )
    first = world.row(1).started_at
    await world.controller.reconcile()
    assert world.row(1).started_at == first
    await world.settle("m.v1")
    assert world.champion() == 1


async def test_a_serve_that_stays_away_is_given_up_for_what_is_new(world: World) -> None:
    world.applications.start_errors = [ConnectionError("no controller")] * 99
    await world.deploy("m/1")
    for _ in range(9):
        await world.controller.reconcile()
    assert (world.row(1).state, world.row(1).reason) == ("failed", "no controller")
    assert len(world.applications.started) == ReleasePolicy().max_starts


async def test_what_served_comes_back_whenever_serve_does(world: World) -> None:
    await world.release(1)
    world.applications.vanish("m.v1")
    world.applications.start_errors = [ConnectionError("no controller")] * 20
    for _ in range(21):
        await world.controller.reconcile()
    await world.settle("m.v1")
    assert (world.states(), world.applications.statuses()["m.v1"].phase) == (
        {1: "champion"},
        "running",
    )


async def test_a_replica_that_does_not_answer_holds_up_nobody_else(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_apps.release.reconciler._CHECK_PATIENCE_S", 0.01)
    world.register("other", 1)
    released = asyncio.Event()
    world.while_asked["m.v1"] = released.wait
    world.answers["other.v1"] = "sha256:1"
    await world.deploy("m/1")
    await world.settle("m.v1")
    assert world.states() == {1: "parity"}
    await world.deploy("other")
    await world.settle("m.v1", "other.v1")
    assert world.store.weights("other") == {1: 1.0}
    assert world.states() == {1: "parity"}
    released.set()
    await world.settle("m.v1")
    assert world.champion() == 1


@pytest.mark.parametrize("phase", [None, "scheduling", "starting", "running"])
async def test_a_killed_controller_goes_on_where_it_was(world: World, phase: Any) -> None:
    await world.release(1)
    await world.deploy("m/2")
    await world.controller.reconcile()
    if phase is not None:
        world.applications.set_phase("m.v2", phase)
        await world.controller.reconcile()
    world.controller = world.new_controller()
    await world.settle("m.v1", "m.v2")
    assert world.states() == {1: "standby", 2: "champion"}
    assert world.applications.started == ["m.v1 graph", "m.v2 graph"]


async def test_a_restarted_cluster_gets_everything_back(world: World) -> None:
    world.register("talker", 1, kind="language_model")
    await world.deploy("talker")
    await world.settle("talker.v1")
    await world.release(1)
    await world.release(2)
    world.applications = FakeApplications()
    world.controller = world.new_controller()
    await world.settle("m.v1", "m.v2", "talker.v1")
    assert sorted(world.applications.started) == [
        "m.v1 graph", "m.v2 graph", "talker.v1 language_model",
    ]  # fmt: skip
    assert world.states() == {1: "standby", 2: "champion"}
    world.assert_routes_follow_champion()


async def test_applications_that_no_row_asks_for_are_deleted(world: World) -> None:
    world.applications.set_phase("stray.v7", "running")
    await world.settle()
    assert world.applications.deleted == ["stray.v7"]


async def test_one_deployments_trouble_does_not_hold_up_the_others(world: World) -> None:
    world.register("other", 1)
    await world.deploy("m/1")
    await world.deploy("other")
    start = world.applications.start

    def picky(deployment: Any, kind: str) -> None:
        if deployment.name == "m":
            raise RuntimeError("Serve stumbled")
        start(deployment, kind)

    world.applications.start = picky  # type: ignore[method-assign]
    await world.settle("other.v1")
    assert world.store.weights("other") == {1: 1.0}
    assert world.states() == {1: "deploying"}


async def test_the_loop_follows_a_request_without_being_asked(world: World) -> None:
    loop = asyncio.create_task(world.controller.run_forever())
    await world.deploy("m/1")
    while "m.v1" not in world.applications.statuses():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    world.applications.set_phase("m.v1", "running")
    while world.states()[1] != "champion":  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    loop.cancel()


async def test_a_release_tells_its_whole_story(world: World) -> None:
    await world.release(1)
    await world.release(2)
    story = await world.controller.release("m")
    assert story["weights"] == {"2": 1.0}
    assert [row["state"] for row in story["deployments"]] == ["standby", "champion"]
    assert [row["replicas"] for row in story["deployments"]] == [1, 1]
    assert [change["to_version"] for change in story["history"]] == [1, 2]
    with pytest.raises(NotFoundError, match="never deployed"):
        await world.controller.release("x")


async def test_routes_that_were_changed_by_hand_are_set_right(world: World) -> None:
    await world.release(1)
    await world.release(2)
    with world.engine.begin() as connection:
        connection.execute(sa.text("""UPDATE routes SET weights = '{"1": 1.0}'"""))
    await world.controller.reconcile()
    world.assert_routes_follow_champion()


@pytest.mark.parametrize("error", PASSING_ERRORS)
async def test_what_is_busy_or_away_ends_no_version(
    world: World, error: type[HeliostatError]
) -> None:
    await world.release(1)
    world.applications.vanish("m.v1")
    await world.deploy("m/2")
    world.applications.start_errors = [error("not now")] * 4
    await world.settle("m.v1", "m.v2")
    assert world.states() == {1: "standby", 2: "champion"}


async def test_nobody_is_sent_to_a_standby_that_is_not_up(world: World) -> None:
    await world.release(1)
    await world.release(2)
    world.applications.set_phase("m.v1", "starting")
    await world.controller.reconcile()
    for asked in (world.controller.rollback("m", "tester"), world.deploy("m/1")):
        with pytest.raises(ConflictError, match="is standby, but none of its replicas is up"):
            await asked
    assert world.states() == {1: "standby", 2: "champion"}
    await world.settle("m.v1")
    assert (await world.controller.rollback("m", "tester"))["version"] == 1


async def test_options_that_are_no_matter_of_replicas_may_change(world: World) -> None:
    await world.release(1)
    await world.release(2)
    served = read_routes(world.store).served
    for version in (2, 1):
        await world.deploy(f"m/{version}", release={"max_duration_s": 60})
        assert world.row(version).options["release"]["max_duration_s"] == 60
        assert world.row(version).state == "champion"
    await world.deploy("m/1")
    assert world.row(1).options["release"]["max_duration_s"] == 60, "who names none keeps them"
    assert read_routes(world.store).served == served, "to gateways it is the same version"
    assert world.applications.started == ["m.v1 graph", "m.v2 graph"]


async def test_asking_otherwise_for_what_is_on_its_way_is_refused(world: World) -> None:
    await world.release(1)
    await world.controller.deploy("m/2", "canary", {}, "tester")
    assert (await world.controller.deploy("m/2", "canary", {}, "tester"))["state"] == "deploying"
    with pytest.raises(ConflictError, match=r"being deployed already .* with strategy canary"):
        await world.deploy("m/2")
    with pytest.raises(ConflictError, match="with other options; wait"):
        await world.controller.deploy("m/2", "canary", {"release": {"alpha": 0.01}}, "tester")


async def test_what_never_was_champion_has_its_timeline_too(world: World) -> None:
    await world.deploy("m/1")
    await world.controller.undeploy("m", None, None, "tester")
    await world.settle()
    assert world.states() == {}
    story = await world.controller.release("m")
    assert [event["state"] for event in story["timeline"]] == ["deploying", "retiring"]
