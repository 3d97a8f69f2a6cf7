"""Composition root of the release controller: its one replica in Ray Serve.

serve run serve_apps.release.controller:build_app
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from ray import serve

from cluster.controller_lease import ControllerLease
from cluster.database import open_database
from cluster.drift_counts import DriftStore
from cluster.model_package import open_version
from cluster.observability.logs import configure_logging
from cluster.registry import ModelRegistry
from cluster.releases import Deployment, ReleaseStore
from cluster.retrainings import RetrainingStore
from cluster.security.audit import AuditLog
from cluster.settings import Settings, load_settings
from cluster.statistics.profile import DataProfile, read_profile
from serve_apps.description import Description
from serve_apps.handles import Handles
from serve_apps.release.reconciler import ReleaseController
from serve_apps.release.requests import ReleaseRequests
from serve_apps.release.retraining import Retrainer, RetrainerParts
from serve_apps.release.serve_applications import ServeApplications
from serve_apps.release.training_jobs import RayTrainingJobs
from serve_apps.replicas import SYSTEM_OPTIONS

_CHECK_TIMEOUT_S = 30.0


class Controller:
    """The controller's only replica. No `__call__`: it answers handles, not HTTP."""

    async def __init__(self) -> None:  # type: ignore[misc]  # Serve awaits it
        settings = load_settings()
        configure_logging(settings.log_format, in_replica=True)
        handles = Handles()

        async def describe(application: str) -> Description:
            # Anew each time: an application of this name may have been deleted in between.
            handles.forget(application)
            answer = await handles.call(application, "describe", timeout_s=_CHECK_TIMEOUT_S)
            return cast(Description, answer)

        engine = open_database(settings.database)
        lease = ControllerLease(engine, "release")
        self._controller = ReleaseController(
            ReleaseStore(engine),
            ModelRegistry.open(settings),
            ServeApplications(),
            describe,
            lease,
        )
        self._task = asyncio.create_task(self._controller.run_forever())
        self._retraining = asyncio.create_task(_retrainer(settings, lease).run_forever())

    async def deploy(
        self, ref: str, strategy: str, options: dict[str, Any], actor: str
    ) -> dict[str, Any]:
        return await self._controller.deploy(ref, strategy, options, actor)

    async def undeploy(
        self, name: str, version: int | None, notice_s: int | None, actor: str
    ) -> list[dict[str, Any]]:
        return await self._controller.undeploy(name, version, notice_s, actor)

    async def rollback(self, name: str, actor: str) -> dict[str, Any]:
        return await self._controller.rollback(name, actor)

    async def pause(self, name: str, actor: str) -> dict[str, Any]:
        return await self._controller.pause(name, actor)

    async def resume(self, name: str, actor: str) -> dict[str, Any]:
        return await self._controller.resume(name, actor)

    async def promote(self, name: str, actor: str) -> dict[str, Any]:
        return await self._controller.promote(name, actor)

    async def deployments(self, name: str | None) -> list[dict[str, Any]]:
        return await self._controller.deployments(name)

    async def release(self, name: str) -> dict[str, Any]:
        return await self._controller.release(name)


def _retrainer(settings: Settings, lease: ControllerLease) -> Retrainer:
    database = open_database(settings.database)
    releases, registry = ReleaseStore(database), ModelRegistry.open(settings)

    def profile_of(row: Deployment) -> DataProfile | None:
        return read_profile(open_version(row, settings).manifest.profile)

    return Retrainer(
        RetrainerParts(
            releases=releases,
            registry=registry,
            counts=DriftStore(database),
            retrainings=RetrainingStore(database),
            jobs=RayTrainingJobs(settings),
            deploy=ReleaseRequests(releases, registry, ServeApplications()).deploy,
            read_profile=profile_of,
            audit=AuditLog(database).record,
            check_lease=lease.check,
        )
    )


def build_app(_values: dict[str, Any]) -> serve.Application:
    """The controller as a Serve application."""
    deployment = serve.deployment(name="controller", max_ongoing_requests=100, **SYSTEM_OPTIONS)
    return deployment(Controller).bind()
