"""Compare a candidate with its service's champion, and make it `candidate` or refuse it.

    python -m jobs.promote --config configs/services/digits.yaml
    python -m jobs.promote --config configs/services/digits.yaml --set candidate=digits/3
    python -m jobs.promote … --set force=true --set reason="the champion leaks"

Both are measured on the same rows, as their clients would meet them. A refused version loses the
alias `candidate`, if it had it, to the champion. The decision and its evidence are kept in MLflow
and in the alias history.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

from cluster.errors import InputError, JobFailedError, NotFoundError
from cluster.model_package import ModelPackage, open_version
from cluster.model_ref import CANDIDATE, CHAMPION, ModelRef
from cluster.registry import ModelRegistry, ModelVersion
from cluster.settings import Settings
from cluster.statistics.paired import PairedResult, compare_means, compare_proportions
from cluster.tracking import RunTracker
from jobs._entrypoint import run_job
from jobs.data.dataset import Dataset
from jobs.evaluate import find_dataset, find_evaluator, log_evaluation
from jobs.evaluation.config import EvaluateConfig
from jobs.evaluation.evaluation import Evaluation
from jobs.models.config import HIGHER_IS_BETTER
from jobs.prepare import describe
from jobs.promotion.config import ServiceConfig
from jobs.promotion.policy import PromotionDecision, PromotionPolicy, PromotionState


@dataclass(frozen=True)
class _Measured:
    """A version and what it did on the service's split."""

    version: ModelVersion
    package: ModelPackage
    evaluation: Evaluation

    def value(self, config: ServiceConfig) -> float:
        return self.evaluation.metrics[config.metric]


def promote(config: ServiceConfig, settings: Settings) -> None:
    """Measure, decide, record, and move the alias."""
    registry = ModelRegistry.open(settings)
    version, champion = find_versions(config, registry)
    package = open_version(version, settings)
    dataset = find_dataset(_evaluation_config(config, version), package, settings)
    print(describe(dataset.info), flush=True)
    with _tracked(config, version, champion, dataset, settings) as tracker:
        print(f"run {tracker.url}", flush=True)
        candidate = _measure(config, version, package, dataset)
        log_evaluation(candidate.evaluation, config.split, tracker)
        state = _state(config, candidate, _measure_champion(config, champion, dataset, settings))
        policy = PromotionPolicy(config.metric, config.objective, config.budget)
        decision = policy.decide(state)
        promoted = decision.promote or config.force
        reason = decision.reason if decision.promote else _forced(config, decision)
        tracker.set_tags({"promoted": str(promoted).lower(), "reason": reason})
        tracker.log_dict(_record(config, version, champion, state, decision), "decision.json")
    if promoted:
        registry.set_alias(
            version.name, CANDIDATE, version.version, actor=config.actor, reason=reason
        )
        print(f"{version.ref} is {CANDIDATE} of service {config.service}: {reason}")
        print(f"deploy it: heliostat deploy {version.name}@{CANDIDATE}")
    else:
        _take_alias_from(version, champion, registry, config, reason)
    result = {**_record(config, version, champion, state, decision), "run_id": tracker.run_id}
    print("result: " + json.dumps(result), flush=True)
    if not promoted:
        raise JobFailedError(
            f"{version.ref} is not promoted: {reason}",
            hint="train a better one, or insist with --set force=true --set reason=WHY",
        )


def check(config: ServiceConfig, settings: Settings) -> None:
    """There is a candidate, and it can be evaluated."""
    version, champion = find_versions(config, ModelRegistry.open(settings))
    against = f"with champion {champion.ref}" if champion else "with the objective alone"
    print(f"config is valid; would compare {version.ref} {against} by {config.metric}")


def find_versions(
    config: ServiceConfig, registry: ModelRegistry
) -> tuple[ModelVersion, ModelVersion | None]:
    """The candidate, and the champion if there is one.

    Raises:
        InputError: the candidate is the champion, of another model, or of a kind without metrics;
            or it is forced without a reason.
        NotFoundError: there is no such version.
    """
    if config.force and not config.reason:
        raise InputError(
            "force is set without a reason", hint="say why: --set reason=WHY", param="reason"
        )
    if config.candidate:
        version = registry.resolve(ModelRef.parse(config.candidate))
    else:
        versions = registry.list_versions(config.model)
        if not versions:
            raise NotFoundError(
                f"model '{config.model}' does not exist", hint="train or import it first"
            )
        version = versions[-1]
    if version.name != config.model:
        raise InputError(
            f"candidate {version.ref} is no version of the service's model '{config.model}'",
            hint=f"write {config.model}/VERSION",
            param="candidate",
        )
    find_evaluator(version)
    alias = registry.get_alias(config.model, CHAMPION)
    if alias is None:
        return version, None
    if alias.version == version.version:
        raise InputError(
            f"{version.ref} is the champion already",
            hint="name another with --set candidate=NAME/VERSION",
            param="candidate",
        )
    return version, registry.resolve(ModelRef(config.model, version=alias.version))


def _evaluation_config(config: ServiceConfig, version: ModelVersion) -> EvaluateConfig:
    return EvaluateConfig(
        model=str(version.ref),
        data=config.data,
        split=config.split,
        batch_size=config.batch_size,
        num_threads=config.num_threads,
    )


def _measure(
    config: ServiceConfig, version: ModelVersion, package: ModelPackage, dataset: Dataset
) -> _Measured:
    evaluation = find_evaluator(version)(package, dataset, _evaluation_config(config, version))
    if config.metric not in evaluation.row_values:
        raise InputError(
            f"{version.ref} has no metric '{config.metric}' row by row",
            hint=f"expected one of: {', '.join(evaluation.row_values)}",
            param="metric",
        )
    return _Measured(version, package, evaluation)


def _measure_champion(
    config: ServiceConfig, champion: ModelVersion | None, dataset: Dataset, settings: Settings
) -> _Measured | None:
    if champion is None:
        return None
    return _measure(config, champion, open_version(champion, settings), dataset)


def _state(
    config: ServiceConfig, candidate: _Measured, champion: _Measured | None
) -> PromotionState:
    files = candidate.package.manifest.files
    return PromotionState(
        candidate=candidate.value(config),
        package_bytes=sum(file.size_bytes for file in files.values()),
        ms_per_row=candidate.evaluation.ms_per_row,
        champion=champion.value(config) if champion else None,
        comparison=_compare(config, candidate, champion) if champion else None,
    )


def _compare(config: ServiceConfig, candidate: _Measured, champion: _Measured) -> PairedResult:
    ours, theirs = (
        measured.evaluation.row_values[config.metric] for measured in (candidate, champion)
    )
    if config.metric not in HIGHER_IS_BETTER:
        ours, theirs = -ours, -theirs
    is_share = bool(np.isin(ours, (0.0, 1.0)).all() and np.isin(theirs, (0.0, 1.0)).all())
    compare = compare_proportions if is_share else compare_means
    return compare(ours, theirs, margin=config.budget.max_regression)


def _forced(config: ServiceConfig, decision: PromotionDecision) -> str:
    if not config.force:
        return decision.reason
    return f"forced: {config.reason}; without force it would be refused: {decision.reason}"


def _take_alias_from(
    version: ModelVersion,
    champion: ModelVersion | None,
    registry: ModelRegistry,
    config: ServiceConfig,
    reason: str,
) -> None:
    """Training makes its version `candidate`; a refused one must not be deployed by that name."""
    current = registry.get_alias(version.name, CANDIDATE)
    if current is None or current.version != version.version:
        return
    registry.set_alias(
        version.name,
        CANDIDATE,
        champion.version if champion else None,
        actor=config.actor,
        reason=f"{version.ref} refused: {reason}",
        expected_revision=current.revision,
    )


def _tracked(
    config: ServiceConfig,
    version: ModelVersion,
    champion: ModelVersion | None,
    dataset: Dataset,
    settings: Settings,
) -> RunTracker:
    return RunTracker.start(
        settings,
        config.experiment,
        f"promote {version.ref} for {config.service}",
        params=config.model_dump(mode="json"),
        tags={
            "job": "promote",
            "service": config.service,
            "model_version": str(version.ref),
            "model_digest": version.digest,
            "champion": str(champion.ref) if champion else "",
            "dataset_digest": dataset.info.digest,
        },
        parent_run_id=version.run_id,
    )


def _record(
    config: ServiceConfig,
    version: ModelVersion,
    champion: ModelVersion | None,
    state: PromotionState,
    decision: PromotionDecision,
) -> dict[str, object]:
    return {
        "service": config.service,
        "candidate": str(version.ref),
        "champion": str(champion.ref) if champion else None,
        "metric": config.metric,
        "measured": asdict(state),
        "promoted": decision.promote or config.force,
        "forced": config.force and not decision.promote,
        "reason": decision.reason,
    }


if __name__ == "__main__":
    run_job(
        ServiceConfig,
        verb="promote",
        description="Compare a version with its service's champion: promote or refuse it.",
        run=promote,
        check=check,
    )
