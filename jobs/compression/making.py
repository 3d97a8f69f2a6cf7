"""A candidate, made: the compressed model's files, and what its manifest says of them.

It knows nothing of registries and tracking.

    check_candidate(package, candidate)
    made = make_candidate(package, dataset, candidate, stage)     # stage/model/…
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import InputError
from cluster.model_package import ModelPackage
from cluster.model_package.files import GRAPH, MODEL_DIR
from cluster.processing import Array, preprocess
from jobs.compression.config import (
    CandidateConfig,
    DynamicInt8Config,
    StaticInt8Config,
    WeightOnlyConfig,
)
from jobs.data.dataset import Dataset
from jobs.evaluation.graph import client_inputs

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


def make_candidate(
    package: ModelPackage, dataset: Dataset, candidate: CandidateConfig, stage: Path
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
    else:
        quantisation = _quantise_graph(package, dataset, candidate, directory / GRAPH)
    return Made(dataclasses.replace(package, path=stage), quantisation)


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
    return {**candidate.model_dump(), "num_bits": 8, "library": onnx_int8.library()}


def _samples(package: ModelPackage, dataset: Dataset, num_rows: int) -> Iterator[dict[str, Array]]:
    """What the graph would be given for the first training rows."""
    ids = np.arange(min(num_rows, len(dataset.rows("train"))))
    for start in range(0, len(ids), _CALIBRATION_BATCH):
        inputs = client_inputs(package, dataset, "train", ids[start : start + _CALIBRATION_BATCH])
        yield preprocess(package.manifest, inputs)
