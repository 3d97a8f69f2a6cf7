"""Evaluate a graph's package as its clients would meet it: processing, graph, answers.

A dataset with classes is a classifier's, any other a regression's. It knows nothing of registries
and tracking.

    evaluate_graph(package, dataset, config).metrics
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import InputError
from cluster.model_package import ModelPackage
from cluster.processing import Array, TensorSpec, postprocess, preprocess, public_inputs
from jobs.data.dataset import Dataset
from jobs.data.table_info import LABEL, TARGET
from jobs.evaluation.config import EvaluateConfig
from jobs.evaluation.evaluation import (
    BatchClock,
    Evaluation,
    require_finite,
    row_slices,
    slice_metrics,
)
from jobs.evaluation.outcomes import Classification, Regression

_PREDICTION, _PROBABILITIES = "prediction", "probabilities"


def evaluate_graph(package: ModelPackage, dataset: Dataset, config: EvaluateConfig) -> Evaluation:
    """A classifier's or a regression's metrics; see `classification` and `regression`.

    Raises:
        InputError: the dataset lacks an input or what is to be predicted, or the model does not
            answer with it.
    """
    if dataset.info.class_names:
        return _evaluate_classifier(package, dataset, config)
    return _evaluate_regression(package, dataset, config)


def _evaluate_classifier(
    package: ModelPackage, dataset: Dataset, config: EvaluateConfig
) -> Evaluation:
    names = dataset.info.class_names
    label, output = config.label or LABEL, config.output or LABEL
    answers = _answers(package, dataset, config, output, label)
    if answers.expected.dtype.kind not in "iu" or answers.expected.max() >= len(names):
        raise InputError(
            f"column '{label}' holds no numbers of the classes {', '.join(names[:10])}",
            hint="set label to the column of class numbers",
            param="label",
        )
    numbers = {name: i for i, name in enumerate(names)}
    predicted = np.array([numbers.get(_text(value), -1) for value in answers.predicted])
    probabilities = answers.others.get(_PROBABILITIES)
    if probabilities is not None and probabilities.shape != (len(predicted), len(names)):
        probabilities = None
    outcome = Classification(answers.expected.astype(np.int64), predicted, probabilities, names)
    return Evaluation(
        metrics=outcome.metrics(),
        row_values={"accuracy": outcome.correct},
        ms_per_row=answers.ms_per_row,
        slices=slice_metrics(
            row_slices(dataset, config.split, config.slice_by),
            lambda mask: outcome.where(mask).metrics(),
        ),
        figures=outcome.figures(),
    )


def _evaluate_regression(
    package: ModelPackage, dataset: Dataset, config: EvaluateConfig
) -> Evaluation:
    target, output = config.label or TARGET, config.output or _PREDICTION
    answers = _answers(package, dataset, config, output, target)
    for name, values in ((f"column '{target}'", answers.expected), (output, answers.predicted)):
        if values.dtype.kind not in "fiu":
            raise InputError(
                f"{name} holds no numbers, and the dataset has no classes",
                hint="set label and output to what is to be predicted, and what predicts it",
                param="label" if values is answers.expected else "output",
            )
    outcome = Regression(answers.expected.astype(np.float64), answers.predicted.astype(np.float64))
    return Evaluation(
        metrics=outcome.metrics(),
        row_values=outcome.row_values(),
        ms_per_row=answers.ms_per_row,
        slices=slice_metrics(
            row_slices(dataset, config.split, config.slice_by),
            lambda mask: outcome.where(mask).metrics(),
        ),
        figures=outcome.figures(),
    )


@dataclass(frozen=True)
class _Answers:
    """A model's answers to a split, row by row, beside what was expected."""

    predicted: Array
    expected: Array
    others: dict[str, Array]
    """The model's other outputs."""
    ms_per_row: float


def _answers(
    package: ModelPackage, dataset: Dataset, config: EvaluateConfig, output: str, column: str
) -> _Answers:
    """What the model answers in `output`, and the dataset's `column`."""
    from cluster.runtimes.onnx import OnnxRuntime

    specs = _needed_inputs(package, dataset, column)
    runtime = OnnxRuntime(package.graph_path, num_threads=config.num_threads)
    rows = dataset.rows(config.split)
    clock = BatchClock()
    batches: list[dict[str, Array]] = []
    expected: list[Array] = []
    for start in range(0, len(rows), config.batch_size):
        columns = rows.read(np.arange(start, min(start + config.batch_size, len(rows))))
        inputs = {spec.name: _as_sent(columns[spec.name], spec) for spec in specs}
        with clock.batch(len(columns[column])):
            raw = runtime.run(preprocess(package.manifest, inputs))
            outputs = postprocess(package.manifest, raw)
        if output not in outputs:
            raise InputError(
                f"the model has no output '{output}', it has: {', '.join(outputs)}",
                hint="set output",
                param="output",
            )
        batches.append(outputs)
        expected.append(columns[column])
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    for name in {output, _PROBABILITIES} & joined.keys():
        require_finite(name, joined[name])
    return _Answers(
        _one_per_row(joined.pop(output), len(rows), output, "output"),
        _one_per_row(np.concatenate(expected), len(rows), column, "label"),
        joined,
        clock.ms_per_row,
    )


def _one_per_row(values: Array, num_rows: int, name: str, param: str) -> Array:
    if values.size != num_rows:
        raise InputError(
            f"'{name}' has {values.size / num_rows:g} values per row, expected one",
            hint=f"set {param} to another",
            param=param,
        )
    return values.reshape(-1)


def client_inputs(
    package: ModelPackage, dataset: Dataset, split: str, ids: npt.NDArray[np.int64]
) -> dict[str, Array]:
    """What a client would send for some rows of a split.

    Raises:
        InputError: the dataset lacks an input.
    """
    specs = _needed_inputs(package, dataset)
    columns = dataset.rows(split).read(ids)
    return {spec.name: _as_sent(columns[spec.name], spec) for spec in specs}


def _needed_inputs(package: ModelPackage, dataset: Dataset, *labels: str) -> list[TensorSpec]:
    raw = package.manifest.processing.raw_inputs
    specs = [spec for spec in public_inputs(package.manifest) if spec.name not in raw]
    for name in (*(spec.name for spec in specs), *labels):
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
