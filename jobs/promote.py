"""Compare a candidate with its service's champion, and make it `candidate` or refuse it.

    python -m jobs.promote --config configs/services/digits.yaml
    python -m jobs.promote --config configs/services/digits.yaml --set candidate=digits/3
    python -m jobs.promote … --force "the champion leaks"

Both are measured on the same rows, as their clients would meet them. A refused version loses the
alias `candidate`, if it had it, to the champion. The decision and its evidence are kept in MLflow
and in the alias history, the measurements in the registry. Aliases that others move meanwhile are
noticed: such a decision is not carried out.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import numpy as np

from cluster.errors import (
    ConflictError,
    InputError,
    JobFailedError,
    NotFiniteError,
    NotFoundError,
    PackageError,
)
from cluster.model_package import ModelPackage, open_version
from cluster.model_ref import CANDIDATE, CHAMPION, ModelRef
from cluster.registry import ModelRegistry, ModelVersion
from cluster.settings import Settings
from cluster.statistics.paired import PairedResult, compare_means, compare_proportions
from cluster.tracking import RunTracker
from jobs._entrypoint import run_job
from jobs.data.dataset import Dataset
from jobs.evaluate import find_dataset, find_evaluator, log_evaluation, record
from jobs.evaluation.config import EvaluateConfig
from jobs.evaluation.evaluation import Evaluation
from jobs.models.config import HIGHER_IS_BETTER
from jobs.prepare import describe
from jobs.promotion.config import ServiceConfig
from jobs.promotion.policy import PromotionDecision, PromotionPolicy, PromotionState


@dataclass(frozen=True)
class Contest:
    """Whom to compare, and the aliases as they were when it began."""

    candidate: ModelVersion
    champion: ModelVersion | None
    """The version that is champion or, where none is, was the last one."""
    revisions: dict[str, int]
    """Of the aliases; 0 for one that does not exist."""


def promote(config: ServiceConfig, settings: Settings) -> None:
    """Measure, decide, move the alias, and record."""
    registry = ModelRegistry.open(settings)
    contest = find_contest(config, registry)
    version = contest.candidate
    package = open_version(version, settings)
    dataset = find_dataset(_evaluation_config(config, version), package, settings)
    print(describe(dataset.info), flush=True)
    with _tracked(config, contest, dataset, settings) as tracker:
        print(f"run {tracker.url}", flush=True)
        state = None
        try:
            state = _measure_both(config, contest, package, dataset, settings, tracker)
            decision = PromotionPolicy(config.metric, config.objective, config.budget).decide(state)
        except NotFiniteError as error:
            decision = PromotionDecision(False, f"it cannot be measured: {error.message}")
        promoted = decision.promote or config.force is not None
        reason = decision.reason if decision.promote else _forced(config, decision)
        _require_unmoved(contest, registry)
        if promoted:
            _give_alias(contest, registry, config, reason)
        else:
            _take_alias(contest, registry, config, reason)
        evidence = _evidence(config, contest, state, decision)
        tracker.set_tags({"promoted": str(promoted).lower(), "reason": reason})
        tracker.log_dict(evidence, "decision.json")
    if promoted:
        print(f"{version.ref} is {CANDIDATE} of service {config.service}: {reason}")
        print(f"deploy it: heliostat deploy {version.name}@{CANDIDATE}")
    print("result: " + json.dumps({**evidence, "run_id": tracker.run_id}), flush=True)
    if not promoted:
        raise JobFailedError(
            f"{version.ref} is not promoted: {reason}",
            hint="train a better one, or insist: --force WHY (submitted: --set force=WHY)",
        )


def check(config: ServiceConfig, settings: Settings) -> None:
    """There is a candidate, and it can be evaluated."""
    contest = find_contest(config, ModelRegistry.open(settings))
    champion = contest.champion
    against = f"with champion {champion.ref}" if champion else "with the objective alone"
    print(f"config is valid; would compare {contest.candidate.ref} {against} by {config.metric}")


def find_contest(config: ServiceConfig, registry: ModelRegistry) -> Contest:
    """The candidate, and the champion if there is or was one.

    Raises:
        InputError: the candidate is the champion, of another model, or of a kind without metrics.
        NotFoundError: there is no such version.
    """
    current = {alias: registry.get_alias(config.model, alias) for alias in (CANDIDATE, CHAMPION)}
    version = _find_candidate(config, registry)
    if (now := current[CHAMPION]) is not None and now.version == version.version:
        raise InputError(
            f"{version.ref} is the champion already",
            hint="name another with --set candidate=NAME/VERSION",
            param="candidate",
        )
    champion = registry.last_target(config.model, CHAMPION)
    if champion is not None and champion.version == version.version:
        # It comes back after everything was undeployed: it has nobody to beat.
        champion = None
    revisions = {alias: found.revision if found else 0 for alias, found in current.items()}
    return Contest(version, champion, revisions)


def _find_candidate(config: ServiceConfig, registry: ModelRegistry) -> ModelVersion:
    if config.candidate:
        version = registry.resolve(ModelRef.parse(config.candidate))
    else:
        version = registry.versions_of(config.model)[-1]
    if version.name != config.model:
        raise InputError(
            f"candidate {version.ref} is no version of the service's model '{config.model}'",
            hint=f"write {config.model}/VERSION",
            param="candidate",
        )
    find_evaluator(version)
    return version


def _evaluation_config(config: ServiceConfig, version: ModelVersion) -> EvaluateConfig:
    return EvaluateConfig(
        model=str(version.ref),
        data=config.data,
        split=config.split,
        batch_size=config.batch_size,
        num_threads=config.num_threads,
    )


def _measure_both(
    config: ServiceConfig,
    contest: Contest,
    package: ModelPackage,
    dataset: Dataset,
    settings: Settings,
    tracker: RunTracker,
) -> PromotionState:
    """What the policy decides on; both measurements are kept in the registry."""
    registry = ModelRegistry.open(settings)
    candidate = _measure(config, contest.candidate, package, dataset, settings)
    log_evaluation(candidate, dataset, config.split, tracker)
    registry.add_evaluation(
        record(contest.candidate, dataset, config.split, candidate.metrics, tracker)
    )
    state = PromotionState(
        candidate=candidate.metrics[config.metric],
        package_bytes=sum(file.size_bytes for file in package.manifest.files.values()),
        ms_per_row=candidate.ms_per_row,
    )
    if contest.champion is None:
        return state
    try:
        theirs = open_version(contest.champion, settings)
    except (NotFoundError, PackageError) as error:
        return replace(state, incomparable=error.message)
    try:
        champion = _measure(config, contest.champion, theirs, dataset, settings)
        registry.add_evaluation(
            record(contest.champion, dataset, config.split, champion.metrics, tracker)
        )
        state = replace(state, champion=champion.metrics[config.metric])
        return replace(state, comparison=_compare(config, candidate, champion))
    except (InputError, PackageError) as error:
        return replace(state, incomparable=f"{contest.champion.ref}: {error.message}")


def _measure(
    config: ServiceConfig,
    version: ModelVersion,
    package: ModelPackage,
    dataset: Dataset,
    settings: Settings,
) -> Evaluation:
    evaluator = find_evaluator(version)
    evaluation = evaluator(package, dataset, _evaluation_config(config, version), settings)
    if config.metric not in evaluation.row_values:
        raise InputError(
            f"{version.ref} has no metric '{config.metric}' row by row",
            hint=f"expected one of: {', '.join(evaluation.row_values)}",
            param="metric",
        )
    return evaluation


def _compare(config: ServiceConfig, candidate: Evaluation, champion: Evaluation) -> PairedResult:
    if candidate.rows_digest != champion.rows_digest:
        raise InputError(
            f"it splits the text into other tokens, so the '{config.metric}' of its rows is that "
            "of other things",
            hint="compare their bits per byte with jobs.evaluate",
        )
    ours, theirs = candidate.row_values[config.metric], champion.row_values[config.metric]
    if config.metric not in HIGHER_IS_BETTER:
        ours, theirs = -ours, -theirs
    is_share = bool(np.isin(ours, (0.0, 1.0)).all() and np.isin(theirs, (0.0, 1.0)).all())
    compare = compare_proportions if is_share else compare_means
    return compare(ours, theirs, margin=config.budget.max_regression)


def _forced(config: ServiceConfig, decision: PromotionDecision) -> str:
    if config.force is None:
        return decision.reason
    return f"forced: {config.force}; without force it would be refused: {decision.reason}"


def _require_unmoved(contest: Contest, registry: ModelRegistry) -> None:
    """Raises ConflictError if the comparison was with a champion that is none any more."""
    name = contest.candidate.name
    champion = registry.get_alias(name, CHAMPION)
    if (champion.revision if champion else 0) != contest.revisions[CHAMPION]:
        raise ConflictError(
            f"the champion of '{name}' was moved while {contest.candidate.ref} was compared",
            hint="run it again, to compare with the new one",
        )


def _give_alias(
    contest: Contest, registry: ModelRegistry, config: ServiceConfig, reason: str
) -> None:
    """Also where it has the alias already: its history shows that it passed, or was forced."""
    registry.set_alias(
        contest.candidate.name,
        CANDIDATE,
        contest.candidate.version,
        actor=config.actor,
        reason=reason,
        expected_revision=contest.revisions[CANDIDATE],
    )


def _take_alias(
    contest: Contest, registry: ModelRegistry, config: ServiceConfig, reason: str
) -> None:
    """Training makes its version `candidate`; a refused one must not be deployed by that name."""
    version = contest.candidate
    current = registry.get_alias(version.name, CANDIDATE)
    if current is None or current.version != version.version:
        return
    registry.set_alias(
        version.name,
        CANDIDATE,
        contest.champion.version if contest.champion else None,
        actor=config.actor,
        reason=f"{version.ref} refused: {reason}",
        expected_revision=current.revision,
    )


def _tracked(
    config: ServiceConfig, contest: Contest, dataset: Dataset, settings: Settings
) -> RunTracker:
    version, champion = contest.candidate, contest.champion
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


def _evidence(
    config: ServiceConfig,
    contest: Contest,
    state: PromotionState | None,
    decision: PromotionDecision,
) -> dict[str, object]:
    return {
        "service": config.service,
        "candidate": str(contest.candidate.ref),
        "champion": str(contest.champion.ref) if contest.champion else None,
        "metric": config.metric,
        "measured": asdict(state) if state else None,
        "promoted": decision.promote or config.force is not None,
        "forced": config.force is not None and not decision.promote,
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
