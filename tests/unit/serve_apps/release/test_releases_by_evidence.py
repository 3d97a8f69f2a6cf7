"""Releases beside a champion: phases, hands, faults, notice; with evidence as gateways write it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from cluster.database import model_versions
from cluster.errors import ConflictError, NotFoundError, NotRunningError
from cluster.release_evidence import Arm, EvidenceDelta, Metric
from cluster.releases import Deployment, ReleaseStore, ReleaseWriter
from serve_apps.gateway import routing_table
from serve_apps.gateway.releases.evidence import Evidence
from serve_apps.gateway.routing_table import RoutingTable, read_routes
from serve_apps.release import mirror
from serve_apps.release.fake_applications import FakeApplications
from tests.release_world import World


def observe(
    world: World, version: int, arm: Arm, num: int, total: float, metric: Metric = "errors"
) -> None:
    row = world.row(version)
    delta = EvidenceDelta(row.release_id, row.step, "m", version, arm, metric, num, total)
    world.store.add_evidence([delta])


def show_good(world: World, version: int) -> None:
    for arm in ("candidate", "champion"):
        observe(world, version, arm, 3000, 3.0)
    observe(world, version, "pair", 500, 5.0, "label_disagreement")


def show_bad(world: World, version: int) -> None:
    observe(world, version, "champion", 3000, 3.0)
    observe(world, version, "candidate", 60, 20.0)


async def begin(world: World, version: int, strategy: str = "shadow", **options: Any) -> None:
    await world.controller.deploy(f"m/{version}", strategy, options, "tester")
    await world.settle(f"m.v{version}")


def story(world: World, version: int) -> list[str]:
    return [event.state for event in world.store.events("m") if event.version == version]


async def test_a_good_version_goes_through_every_phase(world: World) -> None:
    await world.release(1)
    await begin(world, 2)
    assert world.states() == {1: "champion", 2: "shadow"}
    assert world.store.snapshot().shadows == {"m": (2, 0.25)}
    shares = []
    while world.champion() != 2:
        shares.append(world.store.weights("m").get(2, 0.0))
        show_good(world, 2)
        await world.controller.reconcile()
    assert shares == [0.0, 0.05, 0.25, 0.5]
    assert world.states() == {1: "standby", 2: "champion"}
    world.assert_routes_follow_champion()
    assert story(world, 2) == [
        "deploying", "parity", "shadow", "canary 5%", "canary 25%", "canary 50%", "champion",
    ]  # fmt: skip
    last = world.store.champion_history("m")[-1]
    assert last.actor == "tester"
    assert "canary 50%: no worse in 3000 requests: errors 0.1% of 3000" in last.reason
    assert "label disagreement 1.0% of 500, limit 10%" in last.reason


@pytest.mark.parametrize("strategy", ["shadow", "canary"])
async def test_a_bad_version_is_rolled_back_and_the_champion_stays(
    world: World, strategy: str
) -> None:
    await world.release(1)
    await begin(world, 2, strategy)
    show_bad(world, 2)
    await world.controller.reconcile()
    row = world.row(2)
    assert row.state == "rolled_back"
    assert "errors 33.3% of 60, the champion's 0.1% of 3000, margin 2%: worse" in row.reason
    world.assert_routes_follow_champion()
    assert world.store.snapshot().shadows == {}
    await world.settle()
    assert world.applications.deleted == ["m.v2"]
    assert world.applications.started == ["m.v1 graph", "m.v2 graph"], "no replica for a rollback"
    await begin(world, 2, strategy)
    assert world.row(2).state == strategy, "it may be tried again, from nothing"
    assert world.store.evidence(world.row(2)) == {}


async def test_what_a_gateway_observes_decides(world: World) -> None:
    await world.release(1)
    await begin(world, 2)
    evidence = Evidence(world.store.add_evidence)
    release = read_routes(world.store).releases["m"]
    for number in range(300):
        evidence.observe(release, "champion", "errors", 0.0)
        evidence.observe(release, "candidate", "errors", float(number % 4 == 0))
    await evidence.flush()
    await world.controller.reconcile()
    assert world.row(2).state == "rolled_back"
    assert "errors 25.0% of 300, the champion's 0.0% of 300" in world.row(2).reason
    assert read_routes(world.store).releases == {}


async def test_a_rollback_waits_until_gateways_know_before_the_application_ends(
    world: World,
) -> None:
    world.controller = world.new_controller(drain_s=60)
    await world.release(1)
    await begin(world, 2, "canary")
    show_bad(world, 2)
    await world.settle()
    assert (world.row(2).state, world.applications.deleted) == ("rolled_back", [])


async def test_a_first_version_has_nothing_to_be_compared_with(world: World) -> None:
    await begin(world, 1, "shadow")
    assert world.champion() == 1
    assert "there is no champion to compare it with" in world.row(1).reason


async def test_a_canary_whose_application_breaks_down_fails(world: World) -> None:
    await world.release(1)
    await begin(world, 2, "canary")
    world.applications.set_phase("m.v2", "failed", "out of memory")
    await world.controller.reconcile()
    assert (world.row(2).state, world.row(2).reason) == ("failed", "out of memory")
    world.assert_routes_follow_champion()


async def test_a_canary_takes_over_where_nobody_else_can(world: World) -> None:
    await world.release(1)
    await begin(world, 2, "canary")
    world.applications.set_phase("m.v1", "failed", "out of memory")
    await world.controller.reconcile()
    assert world.states() == {1: "failed", 2: "champion"}
    world.assert_routes_follow_champion()


async def test_the_standby_takes_over_before_the_canary_does(world: World) -> None:
    await world.release(1)
    await world.release(2)
    await begin(world, 3, "canary")
    world.applications.set_phase("m.v2", "failed", "out of memory")
    await world.controller.reconcile()
    assert world.states() == {1: "champion", 2: "failed", 3: "rolled_back"}
    assert world.row(3).reason == "version 1 became champion meanwhile"


async def test_hands_may_hold_a_release_let_it_go_on_and_end_it(world: World) -> None:
    await world.release(1)
    for act in (world.controller.pause, world.controller.resume, world.controller.promote):
        with pytest.raises(ConflictError, match="no version of 'm' is on its way"):
            await act("m", "ops")
    await world.controller.deploy("m/2", "canary", {}, "tester")
    with pytest.raises(ConflictError, match="it does not answer yet"):
        await world.controller.promote("m", "ops")
    await world.settle("m.v2")
    await world.controller.pause("m", "ops")
    before = world.row(2)
    assert (await world.controller.pause("m", "ops"))["revision"] == before.revision
    show_good(world, 2)
    await world.settle()
    assert world.row(2).share == 0.05
    await world.controller.resume("m", "ops")
    await world.controller.reconcile()
    assert world.row(2).share == 0.25
    row = await world.controller.rollback("m", "ops")
    assert (row["version"], row["state"]) == (2, "rolled_back")
    world.assert_routes_follow_champion()
    assert story(world, 2)[-4:] == ["canary 5%, paused", "canary 5%", "canary 25%", "rolled_back"]


async def test_a_paused_release_waits_before_its_first_phase_too(world: World) -> None:
    await world.release(1)
    await world.controller.deploy("m/2", "canary", {}, "tester")
    await world.controller.pause("m", "ops")
    await world.settle("m.v2")
    assert world.states()[2] == "parity"
    await world.controller.resume("m", "ops")
    await world.settle("m.v2")
    assert world.states()[2] == "canary"


async def test_a_version_may_be_promoted_before_it_is_decided(world: World) -> None:
    await world.release(1)
    await begin(world, 2)
    await world.controller.promote("m", "ops")
    assert world.states() == {1: "standby", 2: "champion"}
    assert world.store.champion_history("m")[-1].reason == "promoted by ops in shadow"
    await world.controller.rollback("m", "ops")
    assert world.champion() == 1


async def test_a_rollback_of_what_is_starting_leaves_the_champion(world: World) -> None:
    await world.release(1)
    await world.release(2)
    await world.controller.deploy("m/3", "direct", {}, "tester")
    assert (await world.controller.rollback("m", "ops"))["version"] == 3
    assert world.champion() == 2
    assert (await world.controller.rollback("m", "ops"))["version"] == 1


async def test_a_standby_is_compared_without_new_replicas(world: World) -> None:
    await world.release(1)
    await world.release(2)
    row = await world.controller.deploy("m/1", "canary", {"release": {"steps": [0.5]}}, "tester")
    assert (row["state"], row["share"]) == ("canary", 0.5), "other steps are no other replicas"
    show_good(world, 1)
    await world.controller.reconcile()
    assert world.champion() == 1
    assert world.applications.started == ["m.v1 graph", "m.v2 graph"]


async def test_nothing_else_is_deployed_while_versions_are_compared(world: World) -> None:
    await world.release(1)
    await begin(world, 2, "canary")
    with pytest.raises(ConflictError, match=r"version 2 of 'm' is being deployed \(canary 5%"):
        await world.deploy("m/3")
    row = await world.controller.deploy("m/2", "canary", {}, "tester")
    assert row["state"] == "canary", "it is what is under way already"


async def test_undeploying_a_canary_gives_its_traffic_back(world: World) -> None:
    await world.release(1)
    await begin(world, 2, "canary")
    await world.controller.undeploy("m", 2, None, "ops")
    world.assert_routes_follow_champion()
    await world.settle()
    assert world.states() == {1: "champion"}


async def test_with_notice_a_version_serves_on_and_is_gone_afterwards(world: World) -> None:
    await world.release(1)
    await world.release(2)
    rows = await world.controller.undeploy("m", 2, 3600, "ops")
    assert {row["version"]: row["state"] for row in rows} == {1: "standby", 2: "champion"}
    assert world.row(2).sunset_at is not None
    await world.settle()
    assert world.champion() == 2
    with world.store.writing() as tables:
        tables.set_sunset(world.row(2), "2020-01-01T00:00:00.000+00:00", "time flies", actor="t")
    await world.settle()
    assert world.states() == {1: "champion", 2: "retired"}
    world.assert_routes_follow_champion()
    assert [row.version for row in world.store.snapshot().retired] == [2]
    assert world.applications.deleted == ["m.v2"]
    await world.controller.undeploy("m", None, None, "ops")
    await world.settle()
    assert world.states() == {2: "retired"}, "its users are still told"
    await begin(world, 2, "direct")
    assert world.states() == {2: "champion"}


async def test_a_champions_traffic_is_handed_over_before_its_notice_is_over(world: World) -> None:
    await world.release(1)
    await world.release(2)
    await world.controller.undeploy("m", 2, 4, "ops")
    await world.settle()
    assert world.states() == {1: "champion", 2: "standby"}, (
        "whoever asks for version 2 still gets it"
    )
    assert world.row(2).sunset_at is not None
    world.assert_routes_follow_champion()
    assert world.store.champion_history("m")[-1].actor == "controller"


async def test_of_two_that_end_together_none_goes_on_for_the_other(world: World) -> None:
    await world.release(1)
    await world.release(2)
    await world.controller.undeploy("m", None, 4, "ops")
    await world.settle()
    assert world.states() == {1: "standby", 2: "champion"}
    assert len(world.store.champion_history("m")) == 2


async def test_notice_may_be_taken_back_or_cut_short(world: World) -> None:
    await world.release(1)
    await world.controller.undeploy("m", None, 3600, "ops")
    await world.deploy("m/1")
    assert world.row(1).sunset_at is None
    await world.controller.undeploy("m", None, 3600, "ops")
    await world.controller.undeploy("m", None, None, "ops")
    await world.settle()
    assert world.states() == {}


async def test_a_whole_model_ends_at_once_when_its_notice_is_over(world: World) -> None:
    await world.release(1)
    await world.release(2)
    await world.controller.undeploy("m", None, 0, "ops")
    await world.settle()
    assert world.states() == {1: "retired", 2: "retired"}
    assert (world.champion(), world.store.weights("m")) == (None, {})


async def test_a_restarted_cluster_goes_on_with_the_canary(world: World) -> None:
    await world.release(1)
    await begin(world, 2, "canary")
    world.applications = FakeApplications()
    world.controller = world.new_controller()
    await world.settle("m.v1", "m.v2")
    assert world.store.weights("m") == {1: 0.95, 2: 0.05}
    show_good(world, 2)
    await world.controller.reconcile()
    assert world.row(2).share == 0.25


async def test_a_rollback_reaches_every_gateway_at_its_next_look(world: World) -> None:
    assert routing_table._POLL_PERIOD_S <= 0.25, "so within 1 s, with a database that takes 0.5 s"
    await world.release(1)
    await begin(world, 2, "canary")
    gateways = [RoutingTable(lambda: read_routes(world.store)) for _ in range(3)]
    for gateway in gateways:
        await gateway.start()
    async with asyncio.timeout(10):
        while any(2 not in g.current.weights.get("m", {}) for g in gateways):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await world.controller.rollback("m", "ops")
        while any(dict(g.current.weights["m"]) != {1: 1.0} for g in gateways):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    for gateway in gateways:
        await gateway.stop()


async def test_a_release_tells_what_it_has_seen_so_far(world: World) -> None:
    await world.release(1)
    await begin(world, 2, "canary")
    observe(world, 2, "candidate", 10, 1.0)
    told = await world.controller.release("m")
    assert told["weights"] == {"1": 0.95, "2": 0.05}
    line = {"version": 2, "stage": "canary 5%", "metric": "errors", "arm": "candidate"}
    assert told["evidence"] == [{**line, "num": 10, "mean": 0.1}]
    assert told["timeline"][-1]["state"] == "canary 5%"
    assert told["timeline"][-1]["reason"] == "golden outputs reproduced on cpu"


async def test_mlflow_shows_the_last_state_and_is_waited_for_by_nobody(world: World) -> None:
    shown: dict[tuple[str, int], str] = {}
    is_away = True

    def show(name: str, version: int, text: str) -> None:
        if is_away:
            raise NotRunningError("MLflow is away")
        shown[name, version] = text

    world.registry.show_release = show  # type: ignore[method-assign]
    await world.release(1)
    await begin(world, 2, "canary")
    assert shown == {}
    is_away = False
    await world.controller.pause("m", "ops")
    async with asyncio.timeout(10):
        while ("m", 2) not in shown:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert shown["m", 2].startswith("canary 5%, paused since ")
    assert shown["m", 2].endswith("by ops: paused by ops")
    assert shown["m", 1].startswith("champion since ")


async def test_what_mlflow_missed_it_is_told_when_it_is_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "_RETRY_S", 0.01)
    shown: dict[int, str] = {}
    is_away = True

    def show(name: str, version: int, text: str) -> None:
        if is_away or version == 1:
            raise NotRunningError("MLflow is away, or does not have the version")
        shown[version] = text

    world.registry.show_release = show  # type: ignore[method-assign]
    await world.release(1)
    await world.release(2)
    assert shown == {}
    is_away = False
    async with asyncio.timeout(10):
        while 2 not in shown:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert shown[2].startswith("champion since "), "nothing more happens to it"


async def test_a_new_controller_shows_what_the_one_before_may_not_have(world: World) -> None:
    shown: dict[int, str] = {}
    await world.release(1)
    await world.release(2)
    with world.engine.begin() as connection:
        deleted = sa.delete(model_versions).where(model_versions.c.version == 1)
        connection.execute(deleted)
    world.registry.show_release = (  # type: ignore[method-assign]
        lambda _, version, text: shown.update({version: text})
    )
    world.controller = world.new_controller()
    loop = asyncio.create_task(world.controller.run_forever())
    async with asyncio.timeout(10):
        while not shown:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    loop.cancel()
    assert shown.keys() == {2}, "the first one was deleted"


class Killed(BaseException):
    """The process ends here."""


class Death:
    """Comes at a controller's n-th touch of the tables or of Serve, before or after it."""

    def __init__(self, moment: int) -> None:
        self._moment = moment
        self.has_come = False

    def touch(self) -> None:
        self._moment -= 1
        if self._moment <= 0:
            self.has_come = True
            raise Killed


class DyingApplications(FakeApplications):
    def __init__(self, world: World, death: Death) -> None:
        self._world, self._death = world, death

    def statuses(self) -> Any:
        return self._world.applications.statuses()

    def start(self, deployment: Deployment, kind: str) -> None:
        self._death.touch()
        self._world.applications.start(deployment, kind)
        self._death.touch()

    def delete(self, application: str) -> None:
        self._death.touch()
        self._world.applications.delete(application)
        self._death.touch()


class DyingStore(ReleaseStore):
    def __init__(self, world: World, death: Death) -> None:
        super().__init__(world.engine)
        self._death = death

    @contextlib.contextmanager
    def writing(self) -> Iterator[ReleaseWriter]:
        self._death.touch()
        with super().writing() as tables:
            yield tables
        self._death.touch()


@pytest.mark.parametrize("is_good", [True, False])
async def test_a_controller_killed_at_any_moment_is_taken_over_from(
    world: World, is_good: bool
) -> None:
    """One release after the other, each killed a moment later than the one before."""
    show = show_good if is_good else show_bad
    moment, death = 0, Death(1)
    await world.release(1)
    while moment == 0 or death.has_come:
        moment += 1
        death = Death(moment)
        num_started = len(world.applications.started)
        await world.controller.deploy("m/2", "shadow", {}, "tester")
        world.controller._applications = DyingApplications(world, death)
        world.controller._store = DyingStore(world, death)
        while world.row(2).state not in ("champion", "rolled_back"):
            if world.row(2).state in ("shadow", "canary"):
                show(world, 2)
            await settle_or_take_over(world, death)
        for _ in range(2):
            await settle_or_take_over(world, death)
        assert world.states() == (
            {1: "standby", 2: "champion"} if is_good else {1: "champion", 2: "rolled_back"}
        )
        world.assert_routes_follow_champion()
        assert world.store.snapshot().shadows == {}
        up = {"m.v1", "m.v2"} if is_good else {"m.v1"}
        assert set(world.applications.statuses()) == up
        assert world.applications.started[num_started:] == ["m.v2 graph"], moment
        world.controller = world.new_controller()
        if is_good:
            await world.controller.rollback("m", "tester")
        await world.controller.undeploy("m", 2, None, "tester")
        await world.settle()
    assert moment > (10 if is_good else 8), "so it was killed in every state"


async def settle_or_take_over(world: World, death: Death) -> None:
    with contextlib.suppress(Killed):
        await world.settle("m.v1", "m.v2")
    if death.has_come:
        world.controller = world.new_controller()


async def test_two_controllers_never_act_at_once(world: World) -> None:
    first = world.controller
    await world.release(1)
    second = world.new_controller()
    world.clock.pass_s(-59)  # the first one's lease still runs
    await first.reconcile()
    await second.deploy("m/2", "canary", {}, "tester")
    await second.reconcile()
    assert "m.v2 graph" not in world.applications.started, "it writes down, the other one acts"
    await first.reconcile()
    assert world.applications.started == ["m.v1 graph", "m.v2 graph"]
    world.applications.set_phase("m.v2", "running")
    row = world.row(2)
    world.clock.pass_s(60)
    await second.reconcile()
    assert world.row(2).state == "parity"
    with pytest.raises(ConflictError, match="another release controller has taken over"):
        await first._write(lambda tables: tables.enter(world.row(2), "warming", "late"))
    with pytest.raises(ConflictError, match="taken over"):
        await first._start(replace(row, state="champion"), "late")
    assert world.applications.started == ["m.v1 graph", "m.v2 graph"]
    await first.reconcile()
    await world.settle()
    assert world.row(2).state == "parity", "the second one has it now"
    for _ in range(3):
        await second.reconcile()
    assert world.row(2).state == "canary"


async def test_what_is_unknown_cannot_be_steered(world: World) -> None:
    with pytest.raises(NotFoundError, match="never released"):
        await world.controller.rollback("nobody", "ops")
    with pytest.raises(ConflictError, match="no version of 'nobody' is on its way"):
        await world.controller.pause("nobody", "ops")


async def test_a_canary_whose_replicas_do_not_come_back_is_rolled_back(world: World) -> None:
    await world.release(1)
    await begin(world, 2, "canary")
    world.applications.set_phase("m.v2", "scheduling")
    show_good(world, 2)
    await world.controller.reconcile()
    assert world.row(2).stage == "canary 5%", "nothing new begins without replicas"
    observe(world, 2, "candidate", 3000, 3000.0)
    await world.controller.reconcile()
    assert world.row(2).state == "rolled_back"
    assert "errors" in world.row(2).reason
