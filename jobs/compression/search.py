"""The search: makes each candidate, measures it beside its parent, and keeps the best so far.

It knows nothing of registries and tracking: it tells a sink what it measured.

    search = Search(config, package, dataset, evaluator, stage, tell)
    found = search.run(parent_label="pydoc-lm/3")
    found.decision.chosen, found.kept
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import HeliostatError, NotFiniteError, PackageError, ParityError
from cluster.model_package import ModelPackage
from cluster.model_package.parity import certify
from jobs.compression.config import CandidateConfig, CompressConfig
from jobs.compression.making import Made, Train, make_candidate
from jobs.compression.measuring import (
    choose_metric,
    density_of,
    interleaved,
    make_probe,
    quality_of,
    size_bytes,
)
from jobs.compression.policy import CompressionDecision, CompressionPolicy, Measured
from jobs.data.dataset import Dataset
from jobs.evaluation.evaluation import Evaluation

Evaluate = Callable[[ModelPackage], Evaluation]

_PARENT = "parent"


@dataclass(frozen=True)
class Tried:
    """A model and all that was measured of it."""

    measured: Measured
    metrics: Mapping[str, float]
    """Of the evaluation."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Beside its parent: ratios, speeds in turns, the largest difference."""
    parity: Mapping[str, float] = field(default_factory=dict)
    summary: str = ""
    """One line for people."""


@dataclass(frozen=True)
class Found:
    """What a search ends with."""

    parent: Tried
    tried: Mapping[str, Tried]
    decision: CompressionDecision
    kept: Made | None
    """The files of the one that was chosen."""

    @property
    def chosen(self) -> Tried:
        """To be asked for only where one was."""
        assert self.decision.chosen is not None, "nothing was chosen"
        return self.tried[self.decision.chosen.label]


@dataclass(frozen=True)
class Search:
    config: CompressConfig
    package: ModelPackage
    """The parent."""
    dataset: Dataset
    evaluate: Evaluate
    train: Train
    stage: Path
    """An empty directory, for the candidates' files."""
    tell: Callable[[str, Tried], None]
    """Hears of each model once it is measured, by its label; of the parent as 'parent'."""

    def run(self, parent_label: str) -> Found:
        """A candidate that comes out as no working model is refused.

        Raises:
            HeliostatError: the parent cannot be measured, or the machine or a training gives up.
        """
        config = self.config
        metrics = self.evaluate(self.package).metrics
        metric = choose_metric(metrics, config.metric)
        size, quality = size_bytes(self.package), quality_of(metrics, metric)
        parent = Tried(
            Measured(parent_label, size, quality, density_of(self.package)),
            metrics,
            summary=f"{size / 1e6:.4g} MB, {metric} {quality:.4f}",
        )
        self.tell(_PARENT, parent)
        policy = CompressionPolicy(metric, config.max_loss_increase)
        tried: dict[str, Tried] = {}
        made: dict[str, Made] = {}
        for candidate in config.candidates:
            label = candidate.label
            try:
                made[label] = make_candidate(
                    self.package, self.dataset, candidate, self.stage / label, self.train
                )
                tried[label] = self._measure(made[label], candidate, parent, policy)
            # One that went wrong, as a training that diverged, must not cost the others.
            except (NotFiniteError, PackageError) as error:
                made.pop(label, None)
                shutil.rmtree(self.stage / label, ignore_errors=True)
                tried[label] = _failed(label, error)
            self.tell(label, tried[label])
            decision = policy.decide(parent.measured, [one.measured for one in tried.values()])
            self._keep_only(decision, made)
        kept = made[decision.chosen.label] if decision.chosen else None
        return Found(parent, tried, decision, kept)

    def _measure(
        self, made: Made, candidate: CandidateConfig, parent: Tried, policy: CompressionPolicy
    ) -> Tried:
        metrics = self.evaluate(made.package).metrics
        ours, theirs = (
            make_probe(package, self.dataset, self.config.split, self.config.num_threads)
            for package in (made.package, self.package)
        )
        parity, refusal = self._certify(theirs.outputs(), ours.outputs(), candidate)
        speeds = interleaved(ours.work, theirs.work, self.config.speed_rounds)
        measured = Measured(
            candidate.label,
            size_bytes(made.package),
            quality_of(metrics, policy.metric),
            density_of(made.package),
            refusal=refusal,
        )
        ratio = parent.measured.size_bytes / measured.size_bytes
        increase = policy.increase(parent.measured, measured)
        return Tried(
            measured,
            metrics,
            {
                "size_ratio": ratio,
                f"{policy.metric}_increase": increase,
                f"{ours.unit}_per_second": speeds.ours,
                f"parent_{ours.unit}_per_second": speeds.theirs,
                "speed_ratio": speeds.ratio,
                "density": measured.density,
                **parity,
            },
            parity,
            f"{measured.size_bytes / 1e6:.4g} MB ({ratio:.2f} times smaller), "
            f"{policy.metric} {measured.quality:.4f} ({increase:+.2%}), "
            f"{1 - measured.density:.0%} zeros, "
            f"{speeds.ours:.4g} {ours.unit}/s ({speeds.ratio:.2f} times the parent's)",
        )

    def _certify(
        self, before: Any, after: Any, candidate: CandidateConfig
    ) -> tuple[dict[str, float], str]:
        try:
            return certify(before, after, candidate.tolerance), ""
        except ParityError as error:
            return {}, error.message

    def _keep_only(self, decision: CompressionDecision, made: Mapping[str, Made]) -> None:
        """A large model's candidates would fill the disk."""
        for label, one in made.items():
            if decision.chosen is None or label != decision.chosen.label:
                shutil.rmtree(one.package.path, ignore_errors=True)


def _failed(label: str, error: HeliostatError) -> Tried:
    return Tried(
        Measured(label, 0, math.inf, refusal=error.message), {}, summary="there is no such model"
    )
