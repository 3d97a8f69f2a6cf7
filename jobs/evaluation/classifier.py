"""Evaluate a classifier package as its clients would meet it: processing, graph, labels.

It knows nothing of registries and tracking.

    metrics = evaluate_classifier(package, dataset, config)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cluster.errors import InputError
from cluster.model_package import ModelPackage
from cluster.processing import Array, TensorSpec, postprocess, preprocess, public_inputs
from jobs.data.dataset import Dataset
from jobs.evaluation.config import EvaluateConfig


def evaluate_classifier(
    package: ModelPackage, dataset: Dataset, config: EvaluateConfig
) -> dict[str, float]:
    """Accuracy and macro-averaged precision, recall and F1.

    Raises:
        InputError: the dataset lacks an input or the label, or the model does not name classes.
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    predicted, expected = _predict(package, dataset, config)
    precision, recall, f1, _ = precision_recall_fscore_support(
        expected, predicted, average="macro", zero_division=0
    )
    return {
        "accuracy": float(accuracy_score(expected, predicted)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
    }


def _predict(
    package: ModelPackage, dataset: Dataset, config: EvaluateConfig
) -> tuple[list[str], list[str]]:
    """Predicted and true class names of every row."""
    from cluster.runtimes.onnx import OnnxRuntime

    specs = _needed_inputs(package, dataset, config)
    runtime = OnnxRuntime(package.graph_path, num_threads=config.num_threads)
    predicted: list[str] = []
    expected: list[str] = []
    for columns in _batches(dataset, config):
        inputs = {spec.name: _as_sent(columns[spec.name], spec) for spec in specs}
        outputs = postprocess(package.manifest, runtime.run(preprocess(package.manifest, inputs)))
        if config.output not in outputs:
            raise InputError(
                f"the model has no output '{config.output}', it has: {', '.join(outputs)}",
                hint="set output",
                param="output",
            )
        predicted += [_text(value) for value in outputs[config.output].reshape(-1)]
        expected += [dataset.info.class_names[i] for i in columns[config.label]]
    return predicted, expected


def _needed_inputs(
    package: ModelPackage, dataset: Dataset, config: EvaluateConfig
) -> list[TensorSpec]:
    raw = package.manifest.processing.raw_inputs
    specs = [spec for spec in public_inputs(package.manifest) if spec.name not in raw]
    for name in (*(spec.name for spec in specs), config.label):
        if name not in dataset.info.columns:
            raise InputError(
                f"dataset '{dataset.info.name}' has no column '{name}', it has: "
                f"{', '.join(dataset.info.columns)}",
                hint="choose another data.source, or set label",
                param="data",
            )
    return specs


def _batches(dataset: Dataset, config: EvaluateConfig) -> Iterator[dict[str, Array]]:
    rows = dataset.rows(config.split)
    for start in range(0, len(rows), config.batch_size):
        yield rows.read(np.arange(start, min(start + config.batch_size, len(rows))))


def _as_sent(values: Array, spec: TensorSpec) -> Array:
    """A column in the shape and type that clients send."""
    shape = (len(values), *spec.shape[1:])
    return values.reshape(shape).astype(spec.numpy_dtype)


def _text(value: object) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
