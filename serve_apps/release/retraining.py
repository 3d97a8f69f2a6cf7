"""Drift leads to training, training to the gate, the gate to a release: one step at a time.

Every step is written down before it is taken and can be taken again, so a controller that is killed
goes on where it was. Only the controller with the lease acts, and what it has in hand when another
takes over leads to one training and one release all the same. Reaches the cluster only through
`TrainingJobs`.

    retrainer = Retrainer(parts)
    await retrainer.run_forever()
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from cluster.drift_counts import DriftStore
from cluster.errors import PASSING_ERRORS, ConflictError, HeliostatError
from cluster.model_ref import CANDIDATE
from cluster.registry import ModelRegistry
from cluster.releases import Deployment, ReleaseStore
from cluster.retrainings import UNDER_WAY, Retraining, RetrainingState, RetrainingStore
from cluster.statistics.drift import add_up, measure
from cluster.statistics.profile import DataProfile
from cluster.submission import JobState
from serve_apps.options import RetrainOptions, read_stored_options
from serve_apps.release.drift_policy import DriftPolicy, DriftState

logger = logging.getLogger(__name__)

_PERIOD_S = 15.0
_LONGEST_PAUSE_S = 900.0
"""Between two tries to deploy what has no room yet, or has to wait for another release; the first
pause is a period, and each is as long as all before it."""
_RELEASE_WITHIN_S = 86_400.0
"""After which that is given up."""
_ACTOR = "drift"

Deploy = Callable[[str, str, dict[str, Any], str], Any]
"""As `ReleaseRequests.deploy`."""
ReadProfile = Callable[[Deployment], DataProfile | None]
Record = Callable[[str, str, str, dict[str, Any]], None]
"""As `AuditLog.record`."""
CheckLease = Callable[[], None]
"""As `ControllerLease.check`."""


class TrainingJobs(Protocol):
    """Runs jobs of configs that lie in the checkout. Both may raise NotRunningError."""

    def start(self, job_id: str, verb: str, config: str, overrides: Sequence[str] = ()) -> None:
        """Submit it, unless a job of this id has been submitted already."""

    def state(self, job_id: str) -> JobState:
        """`unknown`: no such job, or it was forgotten with the cluster that ran it."""


@dataclass(frozen=True)
class RetrainerParts:
    """What a retrainer reads and asks."""

    releases: ReleaseStore
    registry: ModelRegistry
    counts: DriftStore
    retrainings: RetrainingStore
    jobs: TrainingJobs
    deploy: Deploy
    read_profile: ReadProfile
    audit: Record
    check_lease: CheckLease


class Retrainer:
    """Looks at every champion whose options have `retrain`."""

    def __init__(self, parts: RetrainerParts) -> None:
        self._parts = parts
        self._profiles: dict[str, DataProfile | None] = {}
        self._next_try_s: dict[str, float] = {}
        """By job: since it passed the gate."""

    async def run_forever(self) -> None:
        """Take the next steps, from time to time."""
        while True:
            try:
                await asyncio.to_thread(self.step)
            except ConflictError as error:
                logger.info("drift is looked at by another: %s", error)
            except Exception as error:
                logger.warning("drift was not looked at: %s", error)
            await asyncio.sleep(_PERIOD_S)

    def step(self) -> None:
        """Look at each champion once, and move on what is under way.

        Raises:
            ConflictError: another controller has the lease.
        """
        rows = self._parts.releases.deployments()
        champions = {row.name: row for row in rows if row.state == "champion"}
        for retraining in self._parts.retrainings.list():
            if retraining.state in UNDER_WAY:
                self._guarded(partial(self._move_on, retraining, champions.get(retraining.name)))
        for row in champions.values():
            options = read_stored_options(row.options).retrain
            if options is not None:
                self._guarded(partial(self._look_at, row, options))

    def _guarded(self, work: Callable[[], None]) -> None:
        """One model's trouble must not hold up the others."""
        self._parts.check_lease()
        try:
            work()
        except Exception as error:
            logger.warning("drift: %s", error)

    def _look_at(self, row: Deployment, options: RetrainOptions) -> None:
        parts = self._parts
        profile = self._profile_of(row)
        if profile is None:
            return
        window = add_up(profile, parts.counts.windows(row.name, row.version))
        before = parts.retrainings.list(row.name)
        state = DriftState(
            rows=window.rows,
            drift=measure(profile, window),
            seconds_since_last=(
                parts.retrainings.seconds_since(before[-1].requested_at) if before else None
            ),
            is_under_way=any(one.state in UNDER_WAY for one in before),
        )
        policy = DriftPolicy(options.psi, options.min_rows, options.cool_down_s)
        decision = policy.decide(state)
        if not decision.retrain:
            return
        asked = parts.retrainings.request(
            row.name, row.version, decision.reason, cool_down_s=options.cool_down_s
        )
        if asked is None:
            return
        self._record(asked, decision.reason, config=options.config)
        self._move_on(asked, row)

    def _move_on(self, retraining: Retraining, champion: Deployment | None) -> None:
        parts = self._parts
        options = read_stored_options(champion.options).retrain if champion is not None else None
        try:
            match retraining.state:
                case "requested" if options is None:
                    self._end(retraining, "failed", "nobody wants it trained again any more")
                case "requested":
                    assert options is not None
                    parts.jobs.start(retraining.job_id, "train", options.config)
                    parts.retrainings.enter(retraining, "training", retraining.reason)
                case "training":
                    self._after_training(retraining, options)
                case "gating":
                    self._after_gate(retraining, champion, options)
                case "releasing":
                    self._release(retraining, champion, options)
        except (*PASSING_ERRORS, ConflictError):
            # A part is away or busy, or another controller has taken over: the next pass asks
            # again.
            raise
        except HeliostatError as error:
            self._end(retraining, "failed", error.message)

    def _after_training(self, retraining: Retraining, options: RetrainOptions | None) -> None:
        state = self._parts.jobs.state(retraining.job_id)
        if state in ("failed", "unknown"):
            self._end(retraining, "failed", f"job {retraining.job_id}: {state}")
        elif state == "succeeded" and (options is None or options.service is None):
            self._end(retraining, "trained", "no gate is named: promote and deploy it by hand")
        elif state == "succeeded":
            assert options is not None
            assert options.service is not None
            self._ask_gate(retraining, options.service)

    def _ask_gate(self, retraining: Retraining, service: str) -> None:
        """About one version, which is also the one that is released if it passes."""
        name = retraining.name
        if retraining.candidate is None:
            found = self._parts.registry.get_alias(name, CANDIDATE)
            if found is None or found.version <= retraining.version:
                self._end(retraining, "failed", "the training has made no new candidate")
                return
            named = self._parts.retrainings.name_candidate(retraining, found.version)
            if named is None:
                return
            retraining = named
        candidate = f"candidate={name}/{retraining.candidate}"
        self._parts.jobs.start(retraining.gate_job_id, "promote", service, [candidate])
        self._parts.retrainings.enter(retraining, "gating", retraining.reason)

    def _after_gate(
        self, retraining: Retraining, champion: Deployment | None, options: RetrainOptions | None
    ) -> None:
        state = self._parts.jobs.state(retraining.gate_job_id)
        if state in ("failed", "unknown"):
            self._end(retraining, "failed", f"job {retraining.gate_job_id}: {state}")
            return
        if state != "succeeded":
            return
        passed = self._parts.retrainings.enter(retraining, "releasing", retraining.reason)
        if passed is not None:
            self._release(passed, champion, options)

    def _release(
        self, retraining: Retraining, champion: Deployment | None, options: RetrainOptions | None
    ) -> None:
        parts, ref = self._parts, f"{retraining.name}/{retraining.candidate}"
        if champion is None or options is None:
            self._end(retraining, "trained", "the model is not served any more")
            return
        waited_s = parts.retrainings.seconds_since(retraining.updated_at)
        if waited_s < self._next_try_s.get(retraining.job_id, 0.0):
            return
        # Unlike a job of one id, a deployment that was undone meanwhile would be made again.
        parts.check_lease()
        try:
            parts.deploy(ref, options.strategy, dict(champion.options), _ACTOR)
        except ConflictError as error:
            if waited_s >= _RELEASE_WITHIN_S:
                told = f"{ref} passed the gate and could not be deployed for {waited_s:.0f} s"
                self._end(retraining, "failed", f"{told}: {error.message}")
                return
            pause_s = min(max(waited_s, _PERIOD_S), _LONGEST_PAUSE_S)
            self._next_try_s[retraining.job_id] = waited_s + pause_s
            logger.warning("%s waits, trying again in %.0f s: %s", ref, pause_s, error.message)
        else:
            self._end(retraining, "released", f"{ref} passed the gate, strategy {options.strategy}")

    def _end(self, retraining: Retraining, state: RetrainingState, reason: str) -> None:
        self._next_try_s.pop(retraining.job_id, None)
        if self._parts.retrainings.enter(retraining, state, f"{retraining.reason}; {reason}"):
            self._record(retraining, reason, state=state)

    def _record(self, retraining: Retraining, reason: str, **more: str) -> None:
        logger.info("%s/%d: %s", retraining.name, retraining.version, reason)
        target = f"{retraining.name}/{retraining.version}"
        detail = {"job_id": retraining.job_id, "reason": reason, **more}
        self._parts.audit(_ACTOR, "retrain", target, detail)

    def _profile_of(self, row: Deployment) -> DataProfile | None:
        """Read once: a package never changes."""
        if row.digest not in self._profiles:
            self._profiles[row.digest] = self._parts.read_profile(row)
        return self._profiles[row.digest]
