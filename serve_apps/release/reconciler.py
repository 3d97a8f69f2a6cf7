"""`ReleaseController`: makes the applications and the routes what the table asks for.

Level-triggered: every pass looks at the table and at Serve and does the next step for each
deployment, so it may be killed at any moment and goes on where it was. Each write holds only if the
row is still the one that was decided on; otherwise the next pass decides anew. Of several
controllers only the one with the lease acts. Reaches Serve only through `Applications`.

    controller = ReleaseController(store, registry, applications, describe, lease)
    await controller.deploy("digits/3", "direct", {}, actor="ops/key_1")
    await controller.run_forever()
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from cluster.controller_lease import ControllerLease
from cluster.database import now
from cluster.deployments import COMPARED, CONTROLLER, STARTING, Deployment
from cluster.errors import PASSING_ERRORS, ConflictError, HeliostatError
from cluster.model_ref import ModelRef
from cluster.registry import ModelRegistry
from cluster.release_evidence import Evidence
from cluster.releases import ReleaseStore, ReleaseWriter
from serve_apps.description import Description
from serve_apps.release.admission import heir_of
from serve_apps.release.applications import Applications, ApplicationStatus, describe_error
from serve_apps.release.decisions import Decision, Observation, StartTries, go_on
from serve_apps.release.mirror import ReleaseMirror
from serve_apps.release.policy import ReleasePolicy
from serve_apps.release.requests import ReleaseRequests

logger = logging.getLogger(__name__)

_BUSY_PERIOD_S = 0.2
_IDLE_PERIOD_S = 2.0
_CHECK_PATIENCE_S = 1.0
"""Longest that a replica which is asked holds up a pass; then its answer is awaited beside them."""
_LASTING_ERRORS = (HeliostatError, ValueError, TypeError, ArithmeticError, LookupError)
"""Of the version or its options, or what Serve raises for those; anything else may pass."""

_UNSETTLED = (*STARTING, *COMPARED, "retiring")
_ENDS: dict[str, Literal["rolled_back", "failed", "retiring"]] = {
    "roll_back": "rolled_back",
    "fail": "failed",
    "retire": "retiring",
}

ResultType = TypeVar("ResultType")
Describe = Callable[[str], Awaitable[Description]]
"""Asks a replica of an application what it serves."""


@dataclass(frozen=True)
class _FailedTries:
    count: int
    reason: str
    may_pass: bool
    at_s: float


class ReleaseController:
    """Deploys, releases, rolls back and takes down model versions."""

    def __init__(
        self,
        store: ReleaseStore,
        registry: ModelRegistry,
        applications: Applications,
        describe: Describe,
        lease: ControllerLease,
        policy: ReleasePolicy | None = None,
    ) -> None:
        self._store = store
        self._registry = registry
        self._applications = applications
        self._describe = describe
        self._policy = policy or ReleasePolicy()
        self._requests = ReleaseRequests(store, registry, applications)
        self._lease = lease
        self._mirror = ReleaseMirror(store, registry)
        self._wake = asyncio.Event()
        self._checks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._failed_tries: dict[tuple[str, str], _FailedTries] = {}
        self._statuses: Mapping[str, ApplicationStatus] = {}
        self._down: Collection[str] = ()

    async def deploy(
        self, ref: str, strategy: str, options: dict[str, Any], actor: str
    ) -> dict[str, Any]:
        """Begin to make a version the champion; returns its row at once."""
        row = await asyncio.to_thread(
            self._requests.deploy, ref, strategy, options, actor, self._down
        )
        return self._noticed(row)

    async def undeploy(
        self, name: str, version: int | None, notice_s: int | None, actor: str
    ) -> list[dict[str, Any]]:
        """Take one version, or all of a model, out of service, or say when it will be; returns the
        model's rows."""
        rows = await asyncio.to_thread(self._requests.undeploy, name, version, notice_s, actor)
        self._wake.set()
        self._mirror.show(name)
        return [asdict(row) for row in rows]

    async def rollback(self, name: str, actor: str) -> dict[str, Any]:
        """End the release under way; without one, give the traffic and the champion alias back to
        the champion before this one."""
        return self._noticed(
            await asyncio.to_thread(self._requests.rollback, name, actor, self._down)
        )

    async def pause(self, name: str, actor: str) -> dict[str, Any]:
        """Take no further step towards champion until somebody says so."""
        return self._noticed(await asyncio.to_thread(self._requests.pause, name, actor))

    async def resume(self, name: str, actor: str) -> dict[str, Any]:
        """Let a paused release go on."""
        return self._noticed(await asyncio.to_thread(self._requests.resume, name, actor))

    async def promote(self, name: str, actor: str) -> dict[str, Any]:
        """Make the version that is being compared the champion, whatever was shown of it."""
        return self._noticed(
            await asyncio.to_thread(self._requests.promote, name, actor, self._down)
        )

    def _noticed(self, row: Deployment) -> dict[str, Any]:
        self._wake.set()
        self._mirror.show(row.name)
        return asdict(row)

    async def deployments(self, name: str | None) -> list[dict[str, Any]]:
        """The table, or a model's part of it, and how many replicas run."""
        rows = await asyncio.to_thread(self._store.deployments, name)
        return [self._described(asdict(row)) for row in rows]

    async def release(self, name: str) -> dict[str, Any]:
        """All about one model: versions, traffic, and the champion's history."""
        story = await asyncio.to_thread(self._requests.describe, name)
        return {**story, "deployments": [self._described(row) for row in story["deployments"]]}

    def _described(self, row: dict[str, Any]) -> dict[str, Any]:
        status = self._statuses.get(row["application"])
        return {**row, "replicas": status.num_replicas if status else 0}

    async def run_forever(self) -> None:
        """Reconcile, faster while something is on its way."""
        await self._remind()
        while True:
            is_busy = False
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

    async def _remind(self) -> None:
        """Show in MLflow what a controller that was killed may have left to be shown."""
        try:
            rows = await asyncio.to_thread(self._store.deployments)
        except Exception:
            logger.exception("what is deployed is shown in MLflow with its next change")
            return
        for name in {row.name for row in rows}:
            self._mirror.show(name)

    async def reconcile(self) -> bool:
        """One pass over every deployment; whether anything is still on its way."""
        rows = await asyncio.to_thread(self._store.deployments)
        statuses = self._statuses = await asyncio.to_thread(self._applications.statuses)
        self._down = _down(rows, statuses)
        if not await asyncio.to_thread(self._lease.hold):
            return False
        for name in await asyncio.to_thread(self._store.misrouted):
            await self._reroute(name)
        is_busy = False
        for row in rows:
            evidence: Evidence = {}
            if row.state in COMPARED:
                evidence = await asyncio.to_thread(self._store.evidence, row)
            decision = self._policy.decide(self._observe(row, rows, statuses, evidence))
            is_busy |= decision.action != "wait" or row.state in _UNSETTLED
            try:
                await self._act(row, decision)
            except ConflictError as error:
                logger.info("%s %s came too late: %s", row.application, decision.action, error)
            except Exception:  # one deployment's trouble must not hold up the others
                logger.exception("%s: could not %s", row.application, decision.action)
        known = {row.application for row in rows}
        for application, status in statuses.items():
            if application not in known and status.phase != "deleting":
                logger.info("deleting application %s, which no row asks for", application)
                await asyncio.to_thread(self._lease.check)
                await asyncio.to_thread(self._applications.delete, application)
        if self._checks:
            await asyncio.wait(self._checks.values(), timeout=_CHECK_PATIENCE_S)
        return is_busy

    async def _reroute(self, name: str) -> None:
        logger.warning("the routes of '%s' were changed by somebody else, which is undone", name)
        try:
            await self._write(lambda tables: tables.reroute(name))
        except ConflictError as error:
            logger.info("the routes of '%s' were set right too late: %s", name, error)

    def _observe(
        self,
        row: Deployment,
        rows: Sequence[Deployment],
        statuses: Mapping[str, ApplicationStatus],
        evidence: Evidence,
    ) -> Observation:
        siblings = [other for other in rows if other.name == row.name]
        return Observation(
            row,
            statuses.get(row.application),
            seconds_in_state=_seconds_since(row.updated_at),
            seconds_since_start=_seconds_since(row.started_at) if row.started_at else 0.0,
            tries=self._tries(row),
            has_champion=any(other.state == "champion" for other in siblings),
            successor=heir_of(row, [o for o in siblings if o.application not in self._down], now()),
            evidence=evidence,
            seconds_to_sunset=-_seconds_since(row.sunset_at) if row.sunset_at else math.inf,
        )

    async def _act(self, row: Deployment, decision: Decision) -> None:
        if decision.action == "wait" or (decision.action == "check" and _key(row) in self._checks):
            return
        logger.info("%s %s: %s", row.application, decision.action, decision.reason)
        reason = decision.reason
        match decision.action:
            case "start":
                await self._start(row, reason)
            case "start_again":
                await self._start_again(row, reason)
            case "enter":
                state = decision.state
                assert state is not None
                self._failed_tries.pop(_key(row), None)
                await self._write(lambda tables: tables.enter(row, state, reason))
                self._mirror.show(row.name)
            case "check":
                self._begin_check(row)
            case "compare" | "promote":
                await self._go_on(row, decision)
            case "hand_over":
                assert decision.successor is not None
                await self._hand_over(row, decision.successor, reason)
            case "roll_back" | "fail" | "retire":
                await self._take_down(row, decision)
            case "delete":
                await self._delete(row)
            case "forget":
                await self._write(lambda tables: tables.remove(row))

    async def _start(self, row: Deployment, reason: str) -> None:
        """Ask Serve for an application, having written down that it is this row's."""
        if row.state in STARTING:
            is_first = not self._tries(row).count
            row = await self._write(lambda t: t.enter(row, "deploying", reason, starting=is_first))
        elif row.started_at is None:
            row = await self._write(lambda t: t.enter(row, row.state, row.reason, starting=True))
        await asyncio.to_thread(self._lease.check)
        try:
            version = await asyncio.to_thread(
                self._registry.resolve, ModelRef(row.name, version=row.version)
            )
            await asyncio.to_thread(self._applications.start, row, version.kind)
        except Exception as error:
            may_pass = isinstance(error, PASSING_ERRORS) or not isinstance(error, _LASTING_ERRORS)
            await self._note_failed_try(row, describe_error(error), may_pass)
        else:
            # A champion that was there has to show first that it runs.
            if row.state != "champion":
                self._failed_tries.pop(_key(row), None)

    async def _start_again(self, row: Deployment, reason: str) -> None:
        """Replace an application that has failed; the pauses between the tries grow."""
        await self._note_failed_try(row, reason, may_pass=True)
        shown = f"trying again: {reason}"
        if row.reason != shown:
            row = await self._write(lambda tables: tables.enter(row, row.state, shown))
            self._mirror.show(row.name)
        await self._start(row, reason)

    async def _note_failed_try(self, row: Deployment, reason: str, may_pass: bool) -> None:
        before = self._failed_tries.get(_key(row))
        tries = _FailedTries(before.count + 1 if before else 1, reason, may_pass, time.monotonic())
        self._failed_tries[_key(row)] = tries
        logger.warning("%s could not be started, try %d: %s", row.application, tries.count, reason)
        if row.state in STARTING and may_pass:
            shown = f"trying again: {reason}"
            await self._write(lambda tables: tables.enter(row, row.state, shown))

    async def _delete(self, row: Deployment) -> None:
        # An application that is wanted again by now is worth the look.
        if await asyncio.to_thread(self._store.get, row.name, row.version) == row:
            await asyncio.to_thread(self._lease.check)
            await asyncio.to_thread(self._applications.delete, row.application)

    def _begin_check(self, row: Deployment) -> None:
        task = asyncio.create_task(self._check(row))
        self._checks[_key(row)] = task
        task.add_done_callback(lambda _: self._checks.pop(_key(row), None))

    async def _check(self, row: Deployment) -> None:
        """Go on with a version whose replica answers for the right package."""
        try:
            found = await self._describe(row.application)
            if found.digest == row.digest:
                await self._begin(row, f"golden outputs reproduced on {found.device}")
            else:
                reason = f"a replica serves {found.digest}, expected {row.digest}"
                await self._take_down(row, Decision("fail", reason))
        except ConflictError as error:
            logger.info("%s was checked too late: %s", row.application, error)
        except HeliostatError as error:
            logger.info("%s does not answer yet: %s", row.application, error)
        except Exception:
            logger.exception("%s could not be checked", row.application)

    async def _begin(self, row: Deployment, reason: str) -> None:
        def begin(tables: ReleaseWriter) -> None:
            rows = tables.deployments(row.name)
            has_champion = any(other.state == "champion" for other in rows)
            decision = self._policy.comparison.begin(row, has_champion=has_champion, reason=reason)
            go_on(tables, row, decision)

        await self._write(begin)
        self._mirror.show(row.name)

    async def _go_on(self, row: Deployment, decision: Decision) -> None:
        await self._write(lambda tables: go_on(tables, row, decision))
        self._mirror.show(row.name)

    async def _hand_over(self, row: Deployment, successor: Deployment, reason: str) -> None:
        await self._write(lambda t: t.promote(successor, actor=CONTROLLER, reason=reason))
        self._mirror.show(row.name)

    async def _take_down(self, row: Deployment, decision: Decision) -> None:
        reason, successor = decision.reason, decision.successor
        state = _ENDS[decision.action]
        await self._write(
            lambda t: t.take_down(row, state, reason, actor=CONTROLLER, successor=successor)
        )
        self._mirror.show(row.name)

    async def _write(self, change: Callable[[ReleaseWriter], ResultType]) -> ResultType:
        def write() -> ResultType:
            with self._store.writing() as tables:
                self._lease.require(tables.connection)
                return change(tables)

        return await asyncio.to_thread(write)

    def _tries(self, row: Deployment) -> StartTries:
        found = self._failed_tries.get(_key(row))
        if found is None:
            return StartTries()
        return StartTries(found.count, found.reason, found.may_pass, time.monotonic() - found.at_s)


def _down(rows: Sequence[Deployment], statuses: Mapping[str, ApplicationStatus]) -> set[str]:
    """Applications that no replica answers for now."""
    up = {name for name, status in statuses.items() if status.phase == "running"}
    return {row.application for row in rows} - up


def _key(row: Deployment) -> tuple[str, str]:
    """One deployment of a version, whatever becomes of its row."""
    return row.application, row.created_at


def _seconds_since(text: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()
