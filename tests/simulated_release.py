"""A release of a model whose answers are as bad as one likes, under a stream of requests: no Ray.

release = Release("canary", Model(errors=0.2), seed=0, look=20)
release.run().action, release.num_served        # "roll_back", 12
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cluster.deployments import Deployment, Strategy
from cluster.release_evidence import Arm, Evidence, Metric
from cluster.statistics.sequential import Sample
from serve_apps.options import DeploymentOptions
from serve_apps.release.applications import ApplicationStatus
from serve_apps.release.comparison import ComparisonPolicy
from serve_apps.release.decisions import Decision, Observation
from serve_apps.release.options import ReleaseOptions

AT = "2026-01-01T00:00:00.000+00:00"
POLICY = ComparisonPolicy()


@dataclass(frozen=True)
class Model:
    """What a version's answers are like: shares from 0 to 1."""

    errors: float = 0.002
    slow: float = 0.04
    differs: float = 0.0
    """Of its labels, from the champion's."""


CHAMPION = Model()


def row(strategy: Strategy, release: dict[str, Any] | None = None, **changes: Any) -> Deployment:
    options = DeploymentOptions(release=ReleaseOptions.model_validate(release or {}))
    stored = options.model_dump(mode="json")
    found = Deployment("m", 2, "sha256:0", "m.v2", "parity", "", stored, AT, AT)
    return replace(found, strategy=strategy, release_id="rel_1", **changes)


def observe(found: Deployment, evidence: Evidence, seconds_in_state: float = 0.0) -> Observation:
    return Observation(found, ApplicationStatus("running"), seconds_in_state, evidence=evidence)


class Release:
    """One release under a stream of requests, looked at after each `look` of them."""

    def __init__(self, strategy: Strategy, candidate: Model, seed: int, look: int) -> None:
        self._random = np.random.default_rng(seed)
        self._candidate, self._look = candidate, look
        self.num_served = 0
        """Requests of customers that the candidate answered."""
        self.num_requests = 0
        self.row = row(strategy)
        self.decision = POLICY.begin(self.row, has_champion=True, reason="it answers")
        self._begin_phase()

    def run(self) -> Decision:
        """Until it is decided."""
        while self.decision.action not in ("promote", "roll_back"):
            assert self.num_requests < 200_000, self.decision.reason
            self._serve()
            self.decision = POLICY.decide(observe(self.row, self._evidence))
            if self.decision.action == "compare":
                self._begin_phase()
        return self.decision

    def _begin_phase(self) -> None:
        decision, step = self.decision, self.row.step + 1
        assert decision.state is not None
        self.row = replace(
            self.row,
            state=decision.state,
            step=step,
            share=decision.share,
            mirror_share=decision.mirror_share,
        )
        self._evidence: dict[tuple[Arm, Metric], Sample] = {}

    def _serve(self) -> None:
        of_candidate = self._draw(self._look, self.row.share)
        of_champion = self._look - of_candidate
        mirrored = self._draw(of_champion, self.row.mirror_share)
        self.num_requests += self._look
        self.num_served += of_candidate
        models = {"champion": (CHAMPION, of_champion)}
        models["candidate"] = (self._candidate, of_candidate + mirrored)
        for arm, (model, num) in models.items():
            self._add(arm, "errors", num, model.errors)
            self._add(arm, "slow", num, model.slow)
        self._add("pair", "label_disagreement", mirrored, self._candidate.differs)
        self._add("pair", "score_distance", mirrored, self._candidate.differs)

    def _add(self, arm: Any, metric: Any, num: int, share: float) -> None:
        before = self._evidence.get((arm, metric), Sample())
        total = before.total + self._draw(num, share)
        self._evidence[arm, metric] = Sample(before.num + num, total)

    def _draw(self, num: int, share: float) -> int:
        return int(self._random.binomial(num, share))
