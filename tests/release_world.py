"""A release controller with real tables, a clock, and Serve in the test's hands.

world = World(tmp_path)
await world.release(1)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.controller_lease import ControllerLease
from cluster.database import model_versions, now, open_database
from cluster.errors import UpstreamFailedError
from cluster.model_ref import CHAMPION
from cluster.registry import ModelRegistry
from cluster.releases import Deployment, ReleaseStore
from cluster.settings import Settings
from serve_apps.description import Description
from serve_apps.release.fake_applications import FakeApplications
from serve_apps.release.policy import ReleasePolicy
from serve_apps.release.reconciler import ReleaseController
from serve_apps.release.requests import ReleaseRequests


class Clock:
    """Of the controllers' lease."""

    def __init__(self) -> None:
        self.now = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class UnmirroredRegistry(ModelRegistry):
    """Without MLflow."""

    def mirror_aliases(self, name: str) -> None:
        pass

    def show_release(self, name: str, version: int, text: str) -> None:
        pass


def list_version(engine: Engine, name: str, version: int, kind: str = "graph") -> None:
    """As if it had been published."""
    row = {
        "name": name, "version": version, "digest": f"sha256:{version}", "kind": kind,
        "location": "", "run_id": None, "parent_digest": None, "created_at": now(),
    }  # fmt: skip
    with engine.begin() as connection:
        connection.execute(sa.insert(model_versions).values(row))


class World:
    """A controller with real tables, and Serve in the test's hands."""

    def __init__(self, home: Path) -> None:
        settings = Settings(home=home)
        self.engine = open_database(settings.database)
        self.registry = UnmirroredRegistry(self.engine, settings)
        self.store = ReleaseStore(self.engine)
        self.applications = FakeApplications()
        self.answers: dict[str, str] = {}
        self.while_asked: dict[str, Callable[[], Awaitable[Any]]] = {}
        self.requests = ReleaseRequests(self.store, self.registry, self.applications)
        self.clock = Clock()
        self.controller = self.new_controller()
        for version in (1, 2, 3):
            self.register("m", version)

    def new_controller(self, drain_s: float = 0, first_retry_s: float = 0) -> ReleaseController:
        """As after a kill: nothing remembered, and the lease of the one before it is over."""
        self.clock.pass_s(60)
        lease = ControllerLease(self.engine, "release", clock=self.clock)
        policy = ReleasePolicy(drain_s=drain_s, first_retry_s=first_retry_s)
        return ReleaseController(
            self.store, self.registry, self.applications, self._describe, lease, policy
        )

    def register(self, name: str, version: int, kind: str = "graph") -> None:
        list_version(self.engine, name, version, kind)

    async def deploy(self, ref: str, **options: Any) -> dict[str, Any]:
        return await self.controller.deploy(ref, "direct", options, "tester")

    async def settle(self, *running: str) -> None:
        """Let the named applications run, deleted ones go, and the controller see it all."""
        for _ in range(6):
            await self.controller.reconcile()
            for name, status in self.applications.statuses().items():
                if status.phase == "deleting":
                    self.applications.vanish(name)
                elif name in running and status.phase != "failed":
                    self.applications.set_phase(name, "running")

    async def release(self, version: int) -> None:
        await self.deploy(f"m/{version}")
        await self.settle(f"m.v{version}")

    def states(self) -> dict[int, str]:
        return {row.version: row.state for row in self.store.deployments("m")}

    def champion(self) -> int | None:
        alias = self.registry.get_alias("m", CHAMPION)
        return alias.version if alias else None

    def assert_routes_follow_champion(self) -> None:
        assert self.store.weights("m") == {self.champion(): 1.0}

    def row(self, version: int) -> Deployment:
        row = self.store.get("m", version)
        assert row is not None
        return row

    def last_move(self) -> tuple[int | None, int | None, str]:
        change = self.store.champion_history("m")[-1]
        return change.from_version, change.to_version, change.reason

    async def _describe(self, application: str) -> Description:
        if application in self.while_asked:
            await self.while_asked.pop(application)()
        answer = self.answers.get(application, f"sha256:{application.rpartition('v')[2]}")
        if answer == "gone":
            raise UpstreamFailedError("gone")
        return Description(answer, "cpu")
