"""A candidate, made: the compressed model's files, and what its manifest says of them.

It knows nothing of registries and tracking.

    check_candidate(package, candidate)
    made = make_candidate(package, dataset, candidate, stage)     # stage/model/…
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import InputError
from cluster.model_package import ModelPackage
from cluster.model_package.files import GRAPH, MODEL_DIR
from cluster.processing import Array, preprocess
from jobs.compression.config import (
    CandidateConfig,
    CompressConfig,
    DistillConfig,
    DynamicInt8Config,
    PruneConfig,
    StaticInt8Config,
    TrainedCandidate,
    WeightOnlyConfig,
)
from jobs.data.dataset import Dataset
from jobs.evaluation.graph import client_inputs
from jobs.models.bases import Base
from jobs.models.config import DistillationConfig, PretrainedLmConfig
from jobs.training.config import TrainConfig
from jobs.training.starting_point import check_tokenizer
from jobs.training.worker import Outcome

Train = Callable[[TrainConfig, Path], Outcome]
"""Trains in a directory; what is trained is exported below it."""

_CALIBRATION_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Made:
    """A compressed model in a directory of this process."""

    package: ModelPackage
    """Its files under its parent's manifest: what evaluates the parent evaluates it."""
    quantisation: dict[str, Any]


def check_candidate(package: ModelPackage, candidate: CandidateConfig) -> None:
    """Raises InputError, without loading weights, if the model cannot be compressed in this way."""
    if package.manifest.quantisation:
        raise InputError(
            f"{package.manifest.name} is quantised already "
            f"({package.manifest.quantisation['method']})",
            hint="compress the version that it was made from",
            param="model",
        )
    if isinstance(candidate, WeightOnlyConfig):
        from jobs.compression.weight_only import check_group_size

        check_group_size(package.model_dir, candidate)
    if isinstance(candidate, PruneConfig):
        from jobs.compression.pruning import check_prunable

        check_prunable(package.model_dir, candidate)


def check_training(config: CompressConfig, package: ModelPackage, dataset: Dataset) -> None:
    """Raises InputError if candidates are to be trained on data that the model is not made for."""
    if not any(isinstance(candidate, TrainedCandidate) for candidate in config.candidates):
        return
    if not dataset.info.num_rows["validation"]:
        raise InputError(
            f"dataset '{dataset.info.name}' has no validation rows, and a training needs some",
            hint="give data.splits.validation a share",
            param="data",
        )
    check_tokenizer(
        dataset, Base(package.manifest.name, package.model_dir, package.digest, package)
    )


def make_candidate(
    package: ModelPackage,
    dataset: Dataset,
    candidate: CandidateConfig,
    stage: Path,
    train: Train,
) -> Made:
    """Write the compressed model below an empty directory.

    Raises:
        HeliostatError: the model cannot be compressed in this way.
    """
    directory = stage / MODEL_DIR
    directory.mkdir(parents=True)
    if isinstance(candidate, WeightOnlyConfig):
        from jobs.compression.weight_only import quantise_weights

        quantisation = quantise_weights(package.model_dir, directory, candidate)
    elif isinstance(candidate, PruneConfig):
        _prune(package, dataset, candidate, stage, train)
        quantisation = {}
    elif isinstance(candidate, DistillConfig):
        _distil(package, dataset, candidate, stage, train)
        quantisation = {}
    else:
        quantisation = _quantise_graph(package, dataset, candidate, directory / GRAPH)
    return Made(dataclasses.replace(package, path=stage), quantisation)


def _prune(
    package: ModelPackage, dataset: Dataset, candidate: PruneConfig, stage: Path, train: Train
) -> None:
    from jobs.compression.pruning import prune_model

    pruned = stage / "pruned"
    pruned.mkdir()
    prune_model(package.model_dir, pruned, candidate)
    model = PretrainedLmConfig(
        family="causal_lm", base=str(pruned), keep_zeros=candidate.structure == "unstructured"
    )
    _train(candidate.training(dataset.info.config, model), stage, train)


def _distil(
    package: ModelPackage, dataset: Dataset, candidate: DistillConfig, stage: Path, train: Train
) -> None:
    distillation = DistillationConfig(
        teacher=str(package.model_dir),
        teacher_digest=package.digest,
        temperature=candidate.temperature,
        weight=candidate.weight,
    )
    student = candidate.model.model_copy(update={"distillation": distillation})
    _train(candidate.training(dataset.info.config, student), stage, train)


def _train(config: TrainConfig, stage: Path, train: Train) -> None:
    outcome = train(config, stage / "run")
    shutil.copytree(outcome.exported.directory, stage / MODEL_DIR, dirs_exist_ok=True)


def _quantise_graph(
    package: ModelPackage,
    dataset: Dataset,
    candidate: DynamicInt8Config | StaticInt8Config,
    target: Path,
) -> dict[str, Any]:
    from cluster.runtimes import onnx_int8

    source, per_channel = package.graph_path, candidate.per_channel
    if isinstance(candidate, StaticInt8Config):
        samples = _samples(package, dataset, candidate.calibration_rows)
        onnx_int8.quantise_static(source, target, samples, per_channel=per_channel)
    else:
        onnx_int8.quantise_dynamic(source, target, per_channel=per_channel)
    settings = candidate.model_dump(exclude={"relative_tolerance"})
    return {**settings, "num_bits": 8, "library": onnx_int8.library()}


def _samples(package: ModelPackage, dataset: Dataset, num_rows: int) -> Iterator[dict[str, Array]]:
    """What the graph would be given for the first training rows."""
    ids = np.arange(min(num_rows, len(dataset.rows("train"))))
    for start in range(0, len(ids), _CALIBRATION_BATCH):
        inputs = client_inputs(package, dataset, "train", ids[start : start + _CALIBRATION_BATCH])
        yield preprocess(package.manifest, inputs)
