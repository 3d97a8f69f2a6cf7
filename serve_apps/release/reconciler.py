"""`ReleaseController`: makes the applications and the routes what the table asks for.

Level-triggered: every pass looks at the table and at Serve and does the next step for each
deployment, so it may be killed at any moment and goes on where it was. Reaches Serve only through
`Applications`.

    controller = ReleaseController(store, registry, applications, describe)
    await controller.deploy("digits/3", "direct", {}, actor="ops/key_1")
    await controller.run_forever()
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from cluster.errors import (
    ConflictError,
    HeliostatError,
    NotFoundError,
)
from cluster.model_ref import CANDIDATE, ModelRef, check_name
from cluster.registry import ModelRegistry, ModelVersion
from cluster.releases import STARTING, Deployment, ReleaseStore
from serve_apps.description import Description
from serve_apps.options import check_strategy, read_options
from serve_apps.release.applications import Applications
from serve_apps.release.placement import check_room
from serve_apps.release.policy import Decision, Observation, ReleasePolicy

logger = logging.getLogger(__name__)

_BUSY_PERIOD_S = 0.2
_IDLE_PERIOD_S = 2.0

Describe = Callable[[str], Awaitable[Description]]
"""Asks a replica of an application what it serves."""


class ReleaseController:
    """Deploys, releases, rolls back and takes down model versions."""

    def __init__(
        self,
        store: ReleaseStore,
        registry: ModelRegistry,
        applications: Applications,
        describe: Describe,
        policy: ReleasePolicy | None = None,
    ) -> None:
        self._store = store
        self._registry = registry
        self._applications = applications
        self._describe = describe
        self._policy = policy or ReleasePolicy()
        self._wake = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()

    async def deploy(
        self, ref: str, strategy: str, options: dict[str, Any], actor: str
    ) -> dict[str, Any]:
        """Begin to make a version the champion; returns its row at once.

        Raises:
            NotFoundError: no such model or version.
            ConflictError: another version of it is on its way, it runs with other options, or no
                node has room for its replicas.
            UsageError: the strategy or an option is not known.
        """
        check_strategy(strategy)
        wanted = read_options(options).model_dump()
        version = await asyncio.to_thread(self._version_to_deploy, ref)
        row = await asyncio.to_thread(self._request, version, wanted, actor)
        if row.state == "standby":
            await self._promote(row, actor, f"deployed again by {actor}")
            row = await asyncio.to_thread(self._row, row.name, row.version)
        self._wake.set()
        return asdict(row)

    async def undeploy(self, name: str, version: int | None, actor: str) -> list[dict[str, Any]]:
        """Take one version, or all of a model, out of service.

        Raises:
            NotFoundError: nothing of it is deployed.
        """
        check_name(name)
        rows = await asyncio.to_thread(self._store.deployments, name)
        chosen = [row for row in rows if version in (None, row.version)]
        if not chosen:
            raise NotFoundError(
                f"model '{name}' is not deployed"
                if version is None
                else f"version {version} of model '{name}' is not deployed",
                hint="see `heliostat releases list`",
            )
        for row in chosen:
            reason = f"undeployed by {actor}"
            await asyncio.to_thread(self._store.retire, name, row.version, reason)
        self._wake.set()
        return [asdict(row) for row in await asyncio.to_thread(self._store.deployments, name)]

    async def rollback(self, name: str, actor: str) -> dict[str, Any]:
        """Give the traffic and the champion alias back to the champion before this one.

        Raises:
            NotFoundError: the model was never released.
            ConflictError: there is no earlier champion, or it is not up any more.
        """
        check_name(name)
        row, reason = await asyncio.to_thread(self._rollback_target, name)
        await self._promote(row, actor, reason)
        self._wake.set()
        return asdict(await asyncio.to_thread(self._row, name, row.version))

    async def deployments(self, name: str | None) -> list[dict[str, Any]]:
        """The table, or a model's part of it."""
        return [asdict(row) for row in await asyncio.to_thread(self._store.deployments, name)]

    async def release(self, name: str) -> dict[str, Any]:
        """All about one model: versions, traffic, and the champion's history.

        Raises:
            NotFoundError: the model was never deployed.
        """
        check_name(name)
        return await asyncio.to_thread(self._describe_release, name)

    async def run_forever(self) -> None:
        """Reconcile, faster while something is on its way."""
        while True:
            is_busy = True
            try:
                is_busy = await self.reconcile()
            except Exception:
                logger.exception("a reconciliation failed; trying again")
            try:
                async with asyncio.timeout(_BUSY_PERIOD_S if is_busy else _IDLE_PERIOD_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    async def reconcile(self) -> bool:
        """One pass over every deployment; whether anything is still on its way."""
        rows = await asyncio.to_thread(self._store.deployments)
        statuses = await asyncio.to_thread(self._applications.statuses)
        is_busy = False
        for row in rows:
            seen = Observation(row, statuses.get(row.application), _seconds_since(row.updated_at))
            decision = self._policy.decide(seen)
            is_busy |= decision.action != "wait" or row.state in (*STARTING, "retiring")
            try:
                await self._act(row, decision)
            except Exception:  # one deployment's trouble must not hold up the others
                logger.exception("%s: could not %s", row.application, decision.action)
        known = {row.application for row in rows}
        for application, status in statuses.items():
            if application not in known and status.phase != "deleting":
                logger.info("deleting application %s, which no row asks for", application)
                await asyncio.to_thread(self._applications.delete, application)
        return is_busy

    async def _act(self, row: Deployment, decision: Decision) -> None:
        if decision.action == "wait":
            return
        logger.info("%s %s: %s", row.application, decision.action, decision.reason)
        match decision.action:
            case "start":
                await self._start(row, decision.reason)
            case "enter":
                assert decision.state is not None
                await asyncio.to_thread(
                    self._store.set_state, row.name, row.version, decision.state, decision.reason
                )
            case "check":
                await self._check(row)
            case "fail":
                await asyncio.to_thread(self._store.fail, row.name, row.version, decision.reason)
            case "delete":
                await asyncio.to_thread(self._applications.delete, row.application)
            case "forget":
                await asyncio.to_thread(self._store.remove, row.name, row.version)

    async def _start(self, row: Deployment, reason: str) -> None:
        try:
            version = await asyncio.to_thread(
                self._registry.resolve, ModelRef(row.name, version=row.version)
            )
            await asyncio.to_thread(self._applications.start, row, version.kind)
        except HeliostatError as error:
            await asyncio.to_thread(self._store.fail, row.name, row.version, str(error))
            return
        if row.state in STARTING:
            await asyncio.to_thread(
                self._store.set_state, row.name, row.version, "deploying", reason
            )

    async def _check(self, row: Deployment) -> None:
        """Promote a version whose replica answers for the right package."""
        try:
            found = await self._describe(row.application)
        except HeliostatError as error:
            logger.info("%s does not answer yet: %s", row.application, error)
            return
        if found.digest != row.digest:
            reason = f"a replica serves {found.digest}, expected {row.digest}"
            await asyncio.to_thread(self._store.fail, row.name, row.version, reason)
            return
        await self._promote(row, "controller", f"golden outputs reproduced on {found.device}")

    async def _promote(self, row: Deployment, actor: str, reason: str) -> None:
        await asyncio.to_thread(
            lambda: self._store.promote(row.name, row.version, actor=actor, reason=reason)
        )
        # MLflow only shows the alias; it may be slow or away.
        task = asyncio.create_task(asyncio.to_thread(self._registry.mirror_aliases, row.name))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _version_to_deploy(self, text: str) -> ModelVersion:
        """The version a reference means here: a bare name is its candidate, or else its newest."""
        ref = ModelRef.parse(text)
        if ref.alias is None and ref.version is None:
            candidate = self._registry.get_alias(ref.name, CANDIDATE)
            if candidate is not None:
                return self._registry.resolve(ModelRef(ref.name, version=candidate.version))
            versions = self._registry.list_versions(ref.name)
            if versions:
                return versions[-1]
        return self._registry.resolve(ref)

    def _request(self, version: ModelVersion, options: dict[str, Any], actor: str) -> Deployment:
        for row in self._store.deployments(version.name):
            if row.version == version.version:
                if row.state in ("failed", "retiring"):
                    continue
                if row.options != options:
                    raise ConflictError(
                        f"{version.ref} is {row.state} with other options",
                        hint=f"take it down first: `heliostat undeploy {row.name}`",
                    )
                return row
            if row.state in STARTING:
                raise ConflictError(
                    f"version {row.version} of '{row.name}' is being deployed ({row.state})",
                    hint="wait until it is champion or failed",
                )
        nodes, others = self._applications.nodes(), self._store.deployments()
        check_room(str(version.ref), options, nodes, others)
        return self._store.request(
            version.name, version.version, version.digest, options, f"deployed by {actor}"
        )

    def _rollback_target(self, name: str) -> tuple[Deployment, str]:
        history = self._store.champion_history(name)
        if not history:
            raise NotFoundError(
                f"model '{name}' was never released", hint="see `heliostat releases list`"
            )
        current, previous = history[-1].to_version, history[-1].from_version
        if previous is None:
            raise ConflictError(
                f"model '{name}' has no champion before version {current}",
                hint="deploy the version you want",
            )
        row = self._store.get(name, previous)
        if row is None or row.state != "standby":
            state = "not up any more" if row is None else row.state
            raise ConflictError(
                f"version {previous} of '{name}', the champion before {current}, is {state}",
                hint=f"deploy it: `heliostat deploy {name}/{previous}`",
            )
        return row, f"rolled back from version {current}"

    def _describe_release(self, name: str) -> dict[str, Any]:
        rows, history = self._store.deployments(name), self._store.champion_history(name)
        if not rows and not history:
            raise NotFoundError(
                f"model '{name}' was never deployed", hint="see `heliostat releases list`"
            )
        return {
            "name": name,
            "weights": {str(v): weight for v, weight in self._store.weights(name).items()},
            "deployments": [asdict(row) for row in rows],
            "history": [asdict(change) for change in history],
        }

    def _row(self, name: str, version: int) -> Deployment:
        row = self._store.get(name, version)
        if row is None:
            raise ConflictError(f"version {version} of '{name}' was taken down meanwhile")
        return row


def _seconds_since(text: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()
