"""Evaluate a graph's package as its clients would meet it: processing, graph, answers.

A dataset with classes is a classifier's, any other a regression's. It knows nothing of registries
and tracking.

    metrics = evaluate_graph(package, dataset, config)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cluster.errors import InputError
from cluster.model_package import ModelPackage
from cluster.processing import Array, TensorSpec, postprocess, preprocess, public_inputs
from jobs.data.dataset import Dataset
from jobs.data.table_info import LABEL, TARGET
from jobs.evaluation.config import EvaluateConfig

_PREDICTION = "prediction"


def evaluate_graph(
    package: ModelPackage, dataset: Dataset, config: EvaluateConfig
) -> dict[str, float]:
    """Accuracy and macro-averaged precision, recall and F1; or MSE, RMSE, MAE and R2.

    Raises:
        InputError: the dataset lacks an input or what is to be predicted, or the model does not
            answer with it.
    """
    if dataset.info.class_names:
        return _evaluate_classifier(package, dataset, config)
    return _evaluate_regression(package, dataset, config)


def _evaluate_classifier(
    package: ModelPackage, dataset: Dataset, config: EvaluateConfig
) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    predicted: list[str] = []
    expected: list[str] = []
    for answers, labels in _answers(
        package, dataset, config, config.output or LABEL, config.label or LABEL
    ):
        predicted += [_text(value) for value in answers]
        expected += [dataset.info.class_names[i] for i in labels]
    precision, recall, f1, _ = precision_recall_fscore_support(
        expected, predicted, average="macro", zero_division=0
    )
    return {
        "accuracy": float(accuracy_score(expected, predicted)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
    }


def _evaluate_regression(
    package: ModelPackage, dataset: Dataset, config: EvaluateConfig
) -> dict[str, float]:
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

    batches = list(
        _answers(package, dataset, config, config.output or _PREDICTION, config.label or TARGET)
    )
    predicted = np.concatenate([answers for answers, _ in batches]).astype(np.float64)
    expected = np.concatenate([values for _, values in batches]).astype(np.float64)
    mse = float(mean_squared_error(expected, predicted))
    return {
        "mse": mse,
        "rmse": mse**0.5,
        "mae": float(mean_absolute_error(expected, predicted)),
        "r2": float(r2_score(expected, predicted)) if len(expected) > 1 else 0.0,
    }


def _answers(
    package: ModelPackage, dataset: Dataset, config: EvaluateConfig, output: str, column: str
) -> Iterator[tuple[Array, Array]]:
    """What the model answers in `output`, and the dataset's `column`, batch by batch."""
    from cluster.runtimes.onnx import OnnxRuntime

    specs = _needed_inputs(package, dataset, column)
    runtime = OnnxRuntime(package.graph_path, num_threads=config.num_threads)
    rows = dataset.rows(config.split)
    for start in range(0, len(rows), config.batch_size):
        columns = rows.read(np.arange(start, min(start + config.batch_size, len(rows))))
        inputs = {spec.name: _as_sent(columns[spec.name], spec) for spec in specs}
        outputs = postprocess(package.manifest, runtime.run(preprocess(package.manifest, inputs)))
        if output not in outputs:
            raise InputError(
                f"the model has no output '{output}', it has: {', '.join(outputs)}",
                hint="set output",
                param="output",
            )
        yield outputs[output].reshape(-1), columns[column]


def _needed_inputs(package: ModelPackage, dataset: Dataset, column: str) -> list[TensorSpec]:
    raw = package.manifest.processing.raw_inputs
    specs = [spec for spec in public_inputs(package.manifest) if spec.name not in raw]
    for name in (*(spec.name for spec in specs), column):
        if name not in dataset.info.columns:
            raise InputError(
                f"dataset '{dataset.info.name}' has no column '{name}', it has: "
                f"{', '.join(dataset.info.columns)}",
                hint="choose another data.source, or set label",
                param="data",
            )
    known: Any = package.manifest.profile.get("feature_names")
    table = dataset.info.table
    if known and table is not None and list(table.feature_names) != known:
        raise InputError(
            f"dataset '{dataset.info.name}' has the features {', '.join(table.feature_names)}, and "
            f"the model takes {', '.join(known)}",
            hint="name them in this order in data.table.features",
            param="data.table.features",
        )
    return specs


def _as_sent(values: Array, spec: TensorSpec) -> Array:
    """A column in the shape and type that clients send."""
    wanted = spec.shape[1:]
    if -1 not in wanted and values[0].size != np.prod(wanted, dtype=int):
        raise InputError(
            f"a row of column '{spec.name}' has {values[0].size} values, and the model takes "
            f"'{spec}'",
            hint="give the columns that the model was trained on",
            param="data",
        )
    return values.reshape((len(values), *wanted)).astype(spec.numpy_dtype)


def _text(value: object) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
