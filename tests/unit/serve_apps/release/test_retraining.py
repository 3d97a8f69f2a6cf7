"""Drift → training → gate → release, with real tables, a clock of its own and jobs in the test's
hands; a controller may be killed between any two steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.controller_lease import ControllerLease
from cluster.database import open_database
from cluster.drift_counts import DriftStore
from cluster.errors import ConfigError, ConflictError, NotRunningError, OverloadedError
from cluster.model_ref import CANDIDATE
from cluster.releases import ReleaseStore
from cluster.retrainings import RetrainingStore
from cluster.security.audit import AuditLog
from cluster.settings import Settings
from cluster.statistics.drift import DriftWindow
from cluster.statistics.profile import DataProfile, describe
from cluster.submission import JobState
from serve_apps.options import read_options
from serve_apps.release.retraining import Retrainer, RetrainerParts
from tests.release_world import UnmirroredRegistry, list_version

PROFILE = DataProfile(inputs=describe({"x": np.linspace(0, 1, 2000)}))
RETRAIN = {
    "config": "configs/train/digits.yaml",
    "service": "configs/services/digits.yaml",
    "strategy": "direct",
    "cool_down_s": 3600,
}


class Jobs:
    """A cluster that runs what the test says."""

    def __init__(self) -> None:
        self.started: list[tuple[str, str, str]] = []
        self.overrides: list[Sequence[str]] = []
        self.states: dict[str, JobState] = {}
        self.error: Exception | None = None
        self.while_asked: Callable[[], object] = lambda: None

    def start(self, job_id: str, verb: str, config: str, overrides: Sequence[str] = ()) -> None:
        if self.error is not None:
            raise self.error
        if job_id not in self.states:
            self.started.append((job_id, verb, config))
            self.overrides.append(overrides)
            self.states[job_id] = "running"

    def state(self, job_id: str) -> JobState:
        self.while_asked()
        return self.states.get(job_id, "unknown")

    def end(self, state: JobState = "succeeded") -> None:
        self.states[self.started[-1][0]] = state


class World:
    """digits/1 is champion; what gateways have counted of it is the test's."""

    def __init__(self, home: Path, retrain: dict[str, Any] | None = RETRAIN) -> None:
        settings = Settings(home=home)
        self.engine = open_database(settings.database)
        self.clock_s = 1_800_000_000.0
        self.releases = ReleaseStore(self.engine)
        self.registry = UnmirroredRegistry(self.engine, settings)
        self.counts = DriftStore(self.engine)
        self.retrainings = RetrainingStore(self.engine, clock=lambda: self.clock_s)
        self.audit = AuditLog(self.engine)
        self.lease = ControllerLease(self.engine, "release")
        assert self.lease.hold()
        self.jobs = Jobs()
        self.deployed: list[tuple[str, str, dict[str, Any], str]] = []
        self.deploy_error: Exception | None = None
        self.num_refused = 0
        self.options = read_options({"retrain": retrain}).model_dump(mode="json")
        self.register(1)
        with self.releases.writing() as tables:
            row = tables.create("digits", 1, "sha256:1", self.options, "", requested_by="test")
            tables.promote(row, actor="test", reason="test")

    def register(self, version: int) -> None:
        list_version(self.engine, "digits", version)
        self.registry.set_alias("digits", CANDIDATE, version, actor="jobs.train", reason="trained")

    def new_retrainer(self) -> Retrainer:
        """As after a kill: nothing remembered."""
        return Retrainer(
            RetrainerParts(
                releases=self.releases,
                registry=self.registry,
                counts=self.counts,
                retrainings=self.retrainings,
                jobs=self.jobs,
                deploy=self.deploy,
                read_profile=lambda _: PROFILE,
                audit=self.audit.record,
                check_lease=self.lease.check,
            )
        )

    def deploy(self, ref: str, strategy: str, options: dict[str, Any], actor: str) -> None:
        if self.deploy_error is not None:
            self.num_refused += 1
            raise self.deploy_error
        self.deployed.append((ref, strategy, options, actor))

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.new_retrainer().step()

    def count(self, low: float, high: float, rows: int = 700, source: str = "gateway-1") -> None:
        window = DriftWindow(PROFILE, half_life_rows=5000)
        window.add("inputs", {"x": np.linspace(low, high, rows)}, num_rows=rows)
        self.counts.write(source, "digits", 1, window.counts)

    def drift(self) -> None:
        """Two gateways together have seen enough, and it is not what training saw."""
        for source in ("gateway-1", "gateway-2"):
            self.count(0.7, 1.5, source=source)

    def train(self) -> None:
        """Drift leads to digits/2, which is trained."""
        self.drift()
        self.step()
        self.register(2)
        self.jobs.end()

    @property
    def states(self) -> list[str]:
        return [row.state for row in self.retrainings.list("digits")]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_drift_trains_once_and_what_passes_the_gate_is_released(world: World) -> None:
    world.drift()
    world.step(3)
    ((job_id, verb, config),) = world.jobs.started
    assert (verb, config) == ("train", "configs/train/digits.yaml")
    assert world.states == ["training"]

    world.register(2)
    world.jobs.end()
    world.step(3)
    assert world.jobs.started[1:] == [(f"{job_id}-gate", "promote", RETRAIN["service"])]
    assert world.states == ["gating"]
    assert not world.deployed

    world.jobs.end()
    world.step(3)
    assert world.deployed == [("digits/2", "direct", world.options, "drift")]
    assert world.states == ["released"]
    first, last = world.audit.list(action="retrain")
    assert first.target == last.target == "digits/1"
    assert first.detail["reason"].startswith("PSI ")
    assert first.detail["job_id"] == job_id
    assert last.detail["state"] == "released"


@pytest.mark.parametrize(
    "feed",
    [
        lambda world: world.count(0, 1, rows=3000),
        lambda world: world.count(0.7, 1.5, rows=900),
        lambda world: None,
    ],
    ids=["no drift", "too few rows", "nothing counted"],
)
def test_no_training_without_evidence(world: World, feed: Callable[[World], None]) -> None:
    feed(world)
    world.step(3)
    assert not world.jobs.started
    assert world.states == []


def test_the_cool_down_holds_whatever_became_of_the_last_one(world: World) -> None:
    world.drift()
    world.step()
    world.jobs.end("failed")
    world.step()
    assert world.states == ["failed"]
    world.clock_s += 3599
    world.step(3)
    assert len(world.jobs.started) == 1
    world.clock_s += 2
    world.step(3)
    assert len(world.jobs.started) == 2


def test_trainings_of_long_ago_are_forgotten(world: World) -> None:
    for _ in range(3):
        world.drift()
        world.step()
        world.jobs.end("failed")
        world.step()
        world.clock_s += 50 * 86_400
    assert len(world.jobs.started) == 3
    assert world.states == ["failed"] * 2, "the first is 100 days old at the third"


def test_a_release_under_way_is_waited_for(world: World) -> None:
    world.train()
    world.step()
    world.jobs.end()
    world.deploy_error = ConflictError("version 3 is on its way")
    world.step(2)
    assert world.states == ["releasing"]
    world.deploy_error = None
    world.step()
    assert world.states == ["released"]


def test_what_finds_no_room_is_tried_ever_more_rarely_and_given_up_after_a_day(
    world: World,
) -> None:
    world.train()
    world.step()
    world.jobs.end()
    world.deploy_error = ConflictError("digits/2 asks for 1 GPU, and 1 of 1 are promised")
    retrainer = world.new_retrainer()
    for _ in range(240):
        retrainer.step()
        world.clock_s += 15
    assert world.num_refused == 10, "in the first hour"
    for _ in range(92):
        retrainer.step()
        world.clock_s += 900
    assert world.states == ["releasing"]
    retrainer.step()
    row, _next = world.retrainings.list()
    assert row.state == "failed"
    assert "digits/2 passed the gate and could not be deployed for 86400 s" in row.reason
    assert row.reason.endswith("digits/2 asks for 1 GPU, and 1 of 1 are promised")


def test_only_what_the_gate_was_asked_about_is_released(world: World) -> None:
    world.train()
    world.step()
    assert world.jobs.overrides == [(), ["candidate=digits/2"]]
    world.register(3)
    world.jobs.end()
    world.step()
    assert [ref for ref, *_ in world.deployed] == ["digits/2"], "nobody has measured version 3"


def test_a_controller_killed_before_the_gate_asks_about_the_same_version(world: World) -> None:
    world.train()
    world.jobs.error = NotRunningError("killed here")
    world.step()
    world.register(3)
    world.jobs.error = None
    world.step()
    assert world.jobs.overrides[1:] == [["candidate=digits/2"]]


def test_a_training_that_made_no_version_has_nothing_for_the_gate(world: World) -> None:
    world.drift()
    world.step()
    world.jobs.end()
    world.step(2)
    assert world.states == ["failed"]
    assert len(world.jobs.started) == 1


def test_what_the_gate_refuses_is_not_released(world: World) -> None:
    world.train()
    world.step()
    world.jobs.end("failed")
    world.step(2)
    assert world.states == ["failed"]
    assert not world.deployed
    assert "gate" in world.retrainings.list()[0].reason


def test_without_a_gate_the_new_version_stays_a_candidate(tmp_path: Path) -> None:
    world = World(tmp_path, retrain={"config": "configs/train/digits.yaml"})
    world.train()
    world.step()
    assert world.states == ["trained"]
    assert not world.deployed


def test_who_did_not_ask_for_it_is_not_trained_again(tmp_path: Path) -> None:
    world = World(tmp_path, retrain=None)
    world.drift()
    world.step()
    assert not world.jobs.started


def test_a_cluster_that_is_away_is_asked_again_and_gets_one_job(world: World) -> None:
    world.jobs.error = NotRunningError("away")
    world.drift()
    world.step(3)
    assert world.states == ["requested"]
    world.jobs.error = None
    world.step(2)
    assert len(world.jobs.started) == 1
    assert world.states == ["training"]


def test_a_database_that_is_busy_ends_no_training(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.train()

    def busy(*_: str) -> Any:
        raise OverloadedError("the database is busy")

    with monkeypatch.context() as patched:
        patched.setattr(world.registry, "get_alias", busy)
        world.step(2)
    assert world.states == ["training"]
    world.step()
    assert world.states == ["gating"]


def test_a_controller_killed_after_submitting_does_not_submit_again(world: World) -> None:
    world.drift()
    enter = world.retrainings.enter
    world.retrainings.enter = lambda *_: (_ for _ in ()).throw(SystemExit)  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        world.step()
    assert world.states == ["requested"]
    world.retrainings.enter = enter  # type: ignore[method-assign]
    world.step(2)
    assert len(world.jobs.started) == 1
    assert world.states == ["training"]


def test_a_config_that_is_not_there_ends_it_with_the_reason(world: World) -> None:
    world.jobs.error = ConfigError("config file 'configs/train/digits.yaml' does not exist")
    world.drift()
    world.step(2)
    assert world.states == ["failed"]
    assert "does not exist" in world.retrainings.list()[0].reason


def test_a_controller_without_the_lease_does_nothing(world: World) -> None:
    world.drift()
    take_over(world)
    with pytest.raises(ConflictError, match="taken over"):
        world.step()
    assert not world.jobs.started
    assert world.states == []


def test_one_that_loses_the_lease_while_it_asks_deploys_nothing(world: World) -> None:
    world.train()
    world.step()
    world.jobs.end()
    world.jobs.while_asked = lambda: take_over(world)
    with pytest.raises(ConflictError, match="taken over"):
        world.step(2)
    assert not world.deployed


def take_over(world: World) -> None:
    """As another controller, to which the lease of this one is over."""
    later = datetime.now(UTC) + timedelta(minutes=1)
    assert ControllerLease(world.engine, "release", clock=lambda: later).hold()


def test_two_controllers_ask_for_one_training(world: World) -> None:
    rows = [world.retrainings.request("digits", 1, "drift", cool_down_s=60) for _ in range(2)]
    assert rows[0] is not None
    assert rows[1] is None
    assert world.retrainings.enter(rows[0], "training", "a")
    assert not world.retrainings.enter(rows[0], "training", "b"), "it was moved on by another"


@pytest.mark.parametrize(
    "config",
    ["/etc/passwd", "configs/train/../../x.yaml", "configs/train/a.yaml; rm", "configs/x.yaml"],
)
def test_only_configs_of_the_checkout_may_be_named(config: str) -> None:
    with pytest.raises(Exception, match=r"retrain\.config"):
        read_options({"retrain": {"config": config}})
