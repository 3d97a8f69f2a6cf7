"""Make a registered version smaller, and register the smallest that is still good enough.

    python -m jobs.compress --config configs/compress/causal_lm.yaml
    python -m jobs.compress --config configs/compress/digits.yaml --set max_loss_increase=0.05

Each candidate is measured beside the version it was made from: size, speed, and quality on the same
rows. If none stays within `max_loss_increase`, nothing is registered and the job ends with 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from cluster.errors import JobFailedError
from cluster.model_package import ModelPackage, open_version
from cluster.model_ref import CANDIDATE, ModelRef
from cluster.publishing import require_publishing
from cluster.registry import ModelRegistry, ModelVersion
from cluster.settings import Settings
from cluster.storage import Storage
from cluster.tracking import RunTracker
from jobs._entrypoint import run_job
from jobs.compression.config import CompressConfig, check_candidates
from jobs.compression.fine_tuning import Trainer
from jobs.compression.making import check_candidate, check_training
from jobs.compression.publishing import publish
from jobs.compression.search import Search, Tried
from jobs.data.dataset import Dataset
from jobs.data.inspection import inspect
from jobs.evaluate import find_dataset, find_evaluator, record
from jobs.evaluation.config import EvaluateConfig
from jobs.evaluation.evaluation import Evaluation
from jobs.prepare import describe


def compress(config: CompressConfig, settings: Settings) -> None:
    """Search, say what was measured, and register what was found."""
    version = find_version(config, settings)
    require_publishing(settings)
    package = open_version(version, settings)
    for candidate in config.candidates:
        check_candidate(package, candidate)
    dataset = find_dataset(_evaluation_config(config), package, settings)
    print(describe(dataset.info), flush=True)
    check_training(config, package, dataset)
    storage = Storage.open(settings.storage_root)
    with _tracked(config, version, dataset, settings) as tracker, storage.staging() as stage:
        print(f"run {tracker.url}", flush=True)
        info, source = dataset.info, str(dataset.directory)
        tracker.log_dataset(info.name, info.digest, source=source, context="evaluation")
        search = Search(
            config,
            package,
            dataset,
            _evaluator(config, version, dataset, settings),
            Trainer(dataset, settings, tracker.run_id),
            stage,
            lambda label, tried: _report(label, tried, tracker),
        )
        found = search.run(parent_label=str(version.ref))
        reason = found.decision.reason
        tracker.set_tags({"reason": reason})
        if found.kept is None:
            raise JobFailedError(
                f"{version.ref} is not compressed: {reason}",
                hint="try other candidates, or raise max_loss_increase or relative_tolerance",
            )
        compressed = publish(
            found,
            package,
            version,
            settings,
            name=config.name or version.name,
            split=config.split,
            run_id=tracker.run_id,
        )
        tracker.set_tags({"model_version": str(compressed.ref)})
        for one, tried in ((version, found.parent), (compressed, found.chosen)):
            ModelRegistry.open(settings).add_evaluation(
                record(one, dataset, config.split, tried.metrics, tracker)
            )
    print(f"registered {compressed.ref} ({compressed.digest}): {reason}")
    print(f"deploy it: heliostat deploy {compressed.name}@{CANDIDATE}")
    result = {
        "name": compressed.name,
        "version": compressed.version,
        "digest": compressed.digest,
        "parent_digest": version.digest,
        "run_id": tracker.run_id,
        "candidates": {label: dict(tried.figures) for label, tried in found.tried.items()},
    }
    print("result: " + json.dumps(result), flush=True)


def check(config: CompressConfig, settings: Settings) -> None:
    """There is such a version, and the candidates go with it."""
    version = find_version(config, settings)
    package = open_version(version, settings)
    for candidate in config.candidates:
        check_candidate(package, candidate)
    if config.data is not None:
        for line in inspect(config.data):
            print(line)
    labels = ", ".join(candidate.label for candidate in config.candidates)
    print(f"config is valid; would compress {version.ref} by one of: {labels}")


def find_version(config: CompressConfig, settings: Settings) -> ModelVersion:
    """Raises NotFoundError for no version, InputError for candidates of another kind."""
    version = ModelRegistry.open(settings).resolve(ModelRef.parse(config.model))
    check_candidates(config, version.kind, str(version.ref))
    return version


def _evaluation_config(config: CompressConfig) -> EvaluateConfig:
    return EvaluateConfig(
        model=config.model,
        data=config.data,
        split=config.split,
        batch_size=config.batch_size,
        num_threads=config.num_threads,
    )


def _evaluator(
    config: CompressConfig, version: ModelVersion, dataset: Dataset, settings: Settings
) -> Callable[[ModelPackage], Evaluation]:
    evaluate = find_evaluator(version)
    return lambda package: evaluate(package, dataset, _evaluation_config(config), settings)


def _tracked(
    config: CompressConfig, version: ModelVersion, dataset: Dataset, settings: Settings
) -> RunTracker:
    return RunTracker.start(
        settings,
        config.experiment,
        f"compress {version.ref}",
        params=config.model_dump(mode="json"),
        tags={
            "job": "compress",
            "model": version.name,
            "parent_version": str(version.ref),
            "parent_digest": version.digest,
            "dataset_digest": dataset.info.digest,
        },
        parent_run_id=version.run_id,
    )


def _report(label: str, tried: Tried, tracker: RunTracker) -> None:
    if tried.metrics:
        values = {"size_bytes": tried.measured.size_bytes, **tried.metrics, **tried.figures}
        tracker.log_metrics({f"{label}/{key}": float(value) for key, value in values.items()}, 0)
    print(f"{label}: {tried.summary}", flush=True)
    if tried.measured.refusal:
        print(f"  not to be packaged: {tried.measured.refusal}", flush=True)


if __name__ == "__main__":
    run_job(
        CompressConfig,
        verb="compress",
        description="Make a registered version smaller within a quality budget.",
        run=compress,
        check=check,
    )
