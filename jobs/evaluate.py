"""Evaluate a registered model version on a split, and log the metrics beside its training run.

    python -m jobs.evaluate --config configs/evaluate/digits.yaml
    python -m jobs.evaluate --config configs/evaluate/digits.yaml --set model=digits/3

The package is verified before it is loaded, and never changed: results go to the registry and, with
slices and figures, to MLflow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from cluster.errors import InputError
from cluster.evaluations import EvaluationRecord
from cluster.model_package import ModelPackage, open_base, open_version
from cluster.model_package.adapter import load_adapted
from cluster.model_ref import ModelRef
from cluster.registry import ModelRegistry, ModelVersion
from cluster.settings import Settings
from cluster.tracking import RunTracker
from jobs._entrypoint import run_job
from jobs.data.dataset import Dataset
from jobs.data.inspection import inspect
from jobs.evaluation.config import EvaluateConfig
from jobs.evaluation.evaluation import Evaluation
from jobs.evaluation.graph import evaluate_graph
from jobs.evaluation.language_model import evaluate_language_model
from jobs.prepare import describe, open_catalog

Evaluator = Callable[[ModelPackage, Dataset, EvaluateConfig, Settings], Evaluation]


def evaluate(config: EvaluateConfig, settings: Settings) -> None:
    """Measure, print and log."""
    registry = ModelRegistry.open(settings)
    version = registry.resolve(ModelRef.parse(config.model))
    evaluator = find_evaluator(version)
    package = open_version(version, settings)
    dataset = find_dataset(config, package, settings)
    print(describe(dataset.info), flush=True)
    name = f"{version.name}/{version.version}"
    with RunTracker.start(
        settings,
        config.experiment,
        f"evaluate {name} on {config.split}",
        params=config.model_dump(mode="json"),
        tags={
            "job": "evaluate",
            "model": version.name,
            "model_version": name,
            "model_digest": version.digest,
            "dataset_digest": dataset.info.digest,
        },
        parent_run_id=version.run_id,
    ) as tracker:
        print(f"run {tracker.url}", flush=True)
        evaluation = evaluator(package, dataset, config, settings)
        log_evaluation(evaluation, dataset, config.split, tracker)
    registry.add_evaluation(record(version, dataset, config.split, evaluation.metrics, tracker))
    print(f"{name} on {config.split}: {shown(evaluation.metrics)}")
    for part, metrics in evaluation.slices.items():
        print(f"  {part}: {shown(metrics)}")
    result = {
        "name": version.name,
        "version": version.version,
        "digest": version.digest,
        "split": config.split,
        "run_id": tracker.run_id,
        "metrics": evaluation.metrics,
        "slices": evaluation.slices,
    }
    print("result: " + json.dumps(result), flush=True)


def log_evaluation(
    evaluation: Evaluation, dataset: Dataset, split: str, tracker: RunTracker
) -> None:
    """Metrics, slices, figures and the data, on the run."""
    info, source = dataset.info, str(dataset.directory)
    tracker.log_dataset(info.name, info.digest, source=source, context="evaluation")
    metrics = {**evaluation.metrics, "ms_per_row": evaluation.ms_per_row}
    tracker.log_metrics({f"{split}/{key}": value for key, value in metrics.items()}, 0)
    if evaluation.slices:
        tracker.log_dict(evaluation.slices, f"{split}_slices.json")
    for file_name, figure in evaluation.figures.items():
        tracker.log_figure(figure, f"{split}/{file_name}")


def record(
    version: ModelVersion,
    dataset: Dataset,
    split: str,
    metrics: Mapping[str, float],
    tracker: RunTracker,
) -> EvaluationRecord:
    """What the registry keeps of it."""
    digest = dataset.info.digest
    return EvaluationRecord(version.digest, digest, split, dict(metrics), tracker.run_id)


def shown(metrics: dict[str, float]) -> str:
    """Metrics on one line."""
    return "  ".join(f"{key} {value:.4f}" for key, value in metrics.items())


def check(config: EvaluateConfig, settings: Settings) -> None:
    """The version exists and can be evaluated, and so does the data."""
    version = ModelRegistry.open(settings).resolve(ModelRef.parse(config.model))
    find_evaluator(version)
    if config.data is not None:
        for line in inspect(config.data):
            print(line)
    print(f"config is valid; would evaluate {version.name}/{version.version} on {config.split}")


def _evaluate_graph(
    package: ModelPackage, dataset: Dataset, config: EvaluateConfig, _settings: Settings
) -> Evaluation:
    return evaluate_graph(package, dataset, config)


def _evaluate_language_model(
    package: ModelPackage, dataset: Dataset, config: EvaluateConfig, _settings: Settings
) -> Evaluation:
    return evaluate_language_model(package, dataset, config)


def _evaluate_adapter(
    package: ModelPackage, dataset: Dataset, config: EvaluateConfig, settings: Settings
) -> Evaluation:
    model = load_adapted(open_base(package, settings).model_dir, package.model_dir)
    return evaluate_language_model(package, dataset, config, model)


EVALUATORS: dict[str, Evaluator] = {
    "graph": _evaluate_graph,
    "language_model": _evaluate_language_model,
    "adapter": _evaluate_adapter,
}


def find_evaluator(version: ModelVersion) -> Evaluator:
    """Raises InputError for kinds that have no metrics of their own."""
    if version.kind not in EVALUATORS:
        raise InputError(
            f"{version.name}/{version.version} is a package of kind '{version.kind}'",
            hint=f"expected one of: {', '.join(EVALUATORS)}",
            param="model",
        )
    return EVALUATORS[version.kind]


def find_dataset(config: EvaluateConfig, package: ModelPackage, settings: Settings) -> Dataset:
    """The dataset that the config describes, or the one the package was trained on.

    Raises:
        InputError: its split has no rows.
    """
    catalog = open_catalog(settings)
    if config.data is not None:
        dataset, _ = catalog.ensure(config.data)
    else:
        dataset = catalog.find(package.manifest.lineage.dataset_digest)
    if not dataset.info.num_rows[config.split]:
        raise InputError(
            f"split '{config.split}' of dataset '{dataset.info.name}' is empty",
            hint=f"give data.splits.{config.split} a share, or choose another split",
            param="split",
        )
    return dataset


if __name__ == "__main__":
    run_job(
        EvaluateConfig,
        verb="evaluate",
        description="Evaluate a registered model version on a split.",
        run=evaluate,
        check=check,
    )
